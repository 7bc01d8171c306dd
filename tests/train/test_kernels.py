"""Kernels asked for by their keys, through the real trainer: the same losses, and the same saved weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from axolotl.errors import EnvironmentProblem
from axolotl.model.attention import use_kernel
from axolotl.train.session import train
from train.miniature import losses, rows, tiny_model

LORA = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True}
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted():
    import peft

    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=EVERY, task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_model(), settings)


@pytest.mark.parametrize(
    "keys",
    [
        {"cut_cross_entropy": True},
        {"liger_fused_linear_cross_entropy": True, "sample_packing": True},
        {
            "chunked_cross_entropy": True,
            "chunked_cross_entropy_num_chunks": 5,
            "gradient_accumulation_steps": 2,
        },
        {"plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]},
    ],
)
@pytest.mark.parametrize("lora", [False, True])
def test_the_fused_loss_trains_alike(trainer, keys, lora):
    data, held_out = rows(16), rows(5, seed=9)
    shared = {k: v for k, v in keys.items() if k in ("sample_packing", "gradient_accumulation_steps")}
    shared |= {"micro_batch_size": 4, "num_epochs": 2}
    ours = trainer(
        tiny_model(lora=lora), data, held_out, **shared, **{k: v for k, v in keys.items() if k not in shared}
    )
    plain = trainer(tiny_model(lora=lora), data, held_out, **shared)
    assert ours.parts.replaced.counts["fused loss"] == 1
    assert not plain.parts.replaced.counts
    assert ours.compute_loss_func is None
    ours.train()
    plain.train()
    assert losses(ours) == pytest.approx(losses(plain), abs=2e-5)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=2e-5)


def test_all_kernels_by_one_key_and_what_is_saved(trainer, tmp_path):
    data = rows(16)
    found = {}
    for name, keys in (("ours", {"fused_kernels": True}), ("plain", {})):
        run = trainer(
            adapted(), data, None, micro_batch_size=4, adapter="lora", lora_r=4, lora_alpha=8,
            lora_target_linear=True, output_dir=str(tmp_path / name), learning_rate=1e-3, **keys,
        )  # fmt: skip
        train(run, run.cfg)
        found[name] = losses(run), load_file(tmp_path / name / "adapter_model.safetensors")
    assert found["ours"][0] == pytest.approx(found["plain"][0], abs=2e-5)
    ours, plain = found["ours"][1], found["plain"][1]
    assert ours.keys() == plain.keys()
    assert all(ours[n].shape == plain[n].shape for n in plain)


def test_bfloat16_through_the_kernels_is_as_near_as_without(trainer):
    data = rows(16)
    fine = trainer(adapted(), data, micro_batch_size=8)
    fine.train()
    for keys in ({}, {**LORA, "cut_cross_entropy": True}):
        rough = trainer(adapted(), data, micro_batch_size=8, bf16=True, **keys)
        rough.train()
        assert losses(rough) == pytest.approx(losses(fine), abs=0.02)


def test_resuming_is_exact_with_kernels(trainer, tmp_path):
    data = rows(16)
    keys = {**LORA, "cut_cross_entropy": True, "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "micro_batch_size": 4,
            "lora_target_linear": True, "save_steps": 2, "save_strategy": "steps"}  # fmt: skip
    whole = trainer(adapted(), data, **keys)
    whole.train()
    folder = tmp_path / "out" / "checkpoint-2"
    rest = trainer(adapted(), data, resume=folder, **keys)
    rest.train(resume_from_checkpoint=str(folder))
    assert losses(rest)[-1] == losses(whole)[-1]


@pytest.mark.parametrize("name", ["padded", "documents", "auto"])
def test_packed_attention_in_the_way_asked_for(trainer, name, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = rows(16)
    keys = {"micro_batch_size": 4, "sample_packing": True, "sequence_len": 64}
    try:
        ours = trainer(tiny_model(), data, **keys, attn_kernel=name)
        said = capsys.readouterr().err
        ours.train()
    finally:
        use_kernel(None, "cpu", torch.float32, 8)
    plain = trainer(tiny_model(), data, **keys)
    plain.train()
    assert losses(ours) == pytest.approx(losses(plain), abs=2e-5)
    taken = ours.parts.run["attention"]["kernel"]
    assert taken == name if name != "auto" else taken in ("padded", "documents")
    if name == "auto":
        assert "padded" in said and " ms" in said
        assert (tmp_path / "cache" / "axolotl" / "attention.json").exists()


def test_a_way_that_is_not_there_is_told(trainer):
    with pytest.raises(EnvironmentProblem, match="torch_varlen"):
        trainer(tiny_model(), rows(8), sample_packing=True, attn_kernel="torch_varlen")
