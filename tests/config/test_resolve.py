"""Automatic values: filled in one place, with a reason, and never over what the user wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from axolotl.config import Config, Hardware, load_config, resolve
from axolotl.config.keys import owners

CPU = Hardware(cpus=3)
GPU = Hardware(
    device="cuda", gpu_names=("H100",), bf16=True, tf32=True, cpus=64, gpu_memory_bytes=(80 << 30,)
)
OLD_GPU = Hardware(device="cuda", gpu_names=("T4",), cpus=2)
BASE = "base_model: x\ndatasets: [{path: a.jsonl, type: alpaca}]\nlearning_rate: 1e-4\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def load(text: str, folder: Path) -> Config:
    (folder / "c.yml").write_text(BASE + text + "\n", encoding="utf-8")
    return load_config(folder / "c.yml")


@pytest.mark.parametrize(
    ("text", "hardware", "values"),
    [
        ("", CPU, {"bf16": False, "fp16": None, "tf32": False, "seed": 42, "dataset_num_proc": 3}),
        ("", GPU, {"bf16": True, "fp16": None, "tf32": True, "dataset_num_proc": 16}),
        ("", OLD_GPU, {"bf16": False, "fp16": True, "tf32": False}),
        ("fp16: false", OLD_GPU, {"bf16": False, "fp16": False}),
        ("fp16: true", GPU, {"bf16": False, "fp16": True}),
        ("float16: true", GPU, {"bf16": False}),
        ("bf16: true", CPU, {"bf16": True}),
        ("bf16: full", CPU, {"bf16": True}),
        ("bf16: false\ntf32: true", GPU, {"bf16": False, "tf32": True}),
        (
            "",
            GPU,
            {"fused_kernels": True, "cut_cross_entropy": True, "lora_mlp_kernel": None, "liger_rope": True},
        ),
        (
            "adapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true",
            GPU,
            {"lora_mlp_kernel": True, "lora_o_kernel": True},
        ),
        (
            "fused_kernels: false",
            GPU,
            {"fused_kernels": False, "cut_cross_entropy": None, "liger_rms_norm": None},
        ),
        ("liger_rope: false", GPU, {"fused_kernels": True, "liger_rope": False}),
        ("fsdp_version: 2", GPU, {"fused_kernels": None, "cut_cross_entropy": None}),
        ("torch_compile: true", GPU, {"fused_kernels": None}),
        ("", CPU, {"fused_kernels": None, "cut_cross_entropy": None}),
        ("", OLD_GPU, {"fused_kernels": None}),
        ("seed: 0", CPU, {"seed": 0}),
        ("micro_batch_size: 3", CPU, {"eval_batch_size": 3, "gradient_accumulation_steps": 1}),
        ("micro_batch_size: 2\nbatch_size: 8", CPU, {"gradient_accumulation_steps": 4}),
        ("sample_packing: true", CPU, {"eval_sample_packing": True, "pad_to_sequence_len": True}),
        ("sample_packing: true\npad_to_sequence_len: false", CPU, {"pad_to_sequence_len": False}),
        ("", CPU, {"eval_sample_packing": False, "pad_to_sequence_len": None, "min_sample_len": 2}),
        ("sequence_len: 64", CPU, {"eval_sequence_len": 64, "excess_length_strategy": "drop"}),
        ("gradient_checkpointing: true", CPU, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
        (
            "gradient_checkpointing: true\ngradient_checkpointing_kwargs: {use_reentrant: true}",
            CPU,
            {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        ),
        ("flash_attention: true", CPU, {"attn_implementation": "flash_attention_2"}),
        ("", GPU, {"attn_implementation": None, "use_wandb": False}),
        ("wandb_project: p", CPU, {"use_wandb": True, "use_mlflow": False}),
        ("wandb_project: p\nuse_wandb: false", CPU, {"use_wandb": False}),
        (
            "plugins: [axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin]",
            GPU,
            {"cut_cross_entropy": True},
        ),
        (
            "plugins: [axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin]\nliger_cross_entropy: true",
            GPU,
            {"cut_cross_entropy": None},
        ),
        ("fsdp_config: {offload_params: true}", GPU, {"fsdp_version": 2}),
        ("fsdp_config: {fsdp_version: 1}", GPU, {"fsdp_version": 1}),
        ("chat_template_jinja: t.jinja", CPU, {"chat_template": "jinja"}),
    ],
)
def test_automatic_values(folder: Path, text: str, hardware: Hardware, values: dict[str, Any]) -> None:
    cfg, changes = resolve(load(text, folder), hardware)
    assert {key: cfg.get(key) for key in values} == values
    told = {change.key: change for change in changes}
    for key, value in values.items():
        if key in told:
            assert (told[key].value, bool(told[key].reason)) == (value, True)
            assert cfg.origin(key).kind == "resolved"


def test_what_the_user_wrote_stays(folder: Path) -> None:
    before = load("seed: 7\nbf16: true\nlora_r: 8\nnum_epochs: 2", folder)
    after, changes = resolve(before, GPU)
    for key in owners():
        if before.is_set(key):
            assert after.get(key) == before.get(key)
            assert key not in {change.key for change in changes}


def test_resolving_is_pure_and_done_once(folder: Path) -> None:
    cfg = load("sample_packing: true", folder)
    first, changes = resolve(cfg, GPU)
    assert resolve(cfg, GPU) == (first, changes)
    assert resolve(first, GPU)[1] == []
    assert cfg.train.seed is None
