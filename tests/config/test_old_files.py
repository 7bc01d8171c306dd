"""What files of the field carry that is neither today's language nor a mistake, and how mistakes beside it are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from axolotl.config import Config, load_config
from axolotl.config.descriptions import state
from axolotl.config.examples import example
from axolotl.config.keys import owner, owners
from axolotl.config.section import facts
from axolotl.config.yaml_file import parse_value
from axolotl.errors import ConfigError, Problem

BASE = "base_model: x\ndatasets: [{path: a.jsonl, type: alpaca}]\nlearning_rate: 1e-4\n"


def load(text: str, folder: Path, base: str = BASE) -> Config:
    file = folder / "c.yml"
    file.write_text(base + text + "\n", encoding="utf-8")
    return load_config(file)


def refused(text: str, folder: Path, base: str = BASE) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load(text, folder, base)
    return [p for p in caught.value.problems if p.fatal]


ZERO = [
    "save_steps",
    "eval_steps",
    "save_total_limit",
    "early_stopping_patience",
    "loss_watchdog_threshold",
    "neftune_noise_alpha",
    "embedding_lr_scale",
    "loraplus_lr_ratio",
    "pad_to_multiple_of",
    "dataset_shard_num",
    "torch_empty_cache_steps",
]


@pytest.mark.parametrize("key", ZERO)
@pytest.mark.parametrize("zero", ["0", "0.0", "false"])
def test_nought_turns_off_what_cannot_be_nought(tmp_path: Path, key: str, zero: str) -> None:
    cfg = load(f"{key}: {zero}", tmp_path)
    assert cfg.get(key) is None
    assert not cfg.is_set(key)
    assert cfg.warnings == ()


@pytest.mark.parametrize(
    "key", ["micro_batch_size", "lora_r", "sequence_len", "logging_steps", "learning_rate"]
)
def test_nought_is_a_mistake_elsewhere(tmp_path: Path, key: str) -> None:
    base = BASE.replace("learning_rate: 1e-4\n", "") if key == "learning_rate" else BASE
    [problem] = refused(f"{key}: 0", tmp_path, base)
    assert (problem.kind, problem.keys) == ("invalid_value", (key,))


def test_a_mapping_of_nothing_is_off(tmp_path: Path) -> None:
    assert load("rope_scaling: {type: , factor: }\nqat: {weight_dtype: }", tmp_path).warnings == ()
    assert refused("rope_scaling: {type: linear, factor: }", tmp_path)[0].kind == "removed"


def test_tokens_were_a_mapping_once(tmp_path: Path) -> None:
    cfg = load('tokens: {pad_token: "<p>", eos_token: </s>}\nspecial_tokens: {pad_token: <p>}', tmp_path)
    assert cfg.model.tokens is None
    assert cfg.model.special_tokens is not None
    assert (cfg.model.special_tokens.pad_token, cfg.model.special_tokens.eos_token) == ("<p>", "</s>")
    [warned] = cfg.warnings
    assert "special_tokens" in warned.message
    assert str(cfg.place("special_tokens.eos_token")).endswith(":4:39")
    [clash] = refused("tokens: {pad_token: a}\nspecial_tokens: {pad_token: b}", tmp_path)
    assert (clash.kind, clash.keys) == ("conflict", ("tokens.pad_token", "special_tokens.pad_token"))
    assert refused("tokens: {pad_token: a, more: b}", tmp_path)[0].kind == "invalid_value"


def test_bfloat16_by_the_hardware(tmp_path: Path) -> None:
    cfg = load("bfloat16: auto", tmp_path)
    assert (cfg.model.bfloat16, cfg.model.bf16) == (False, "auto")
    assert "bf16: auto" in cfg.warnings[0].remedy


def test_a_kernel_on_the_hub_beside_the_old_boolean_of_its_kind(tmp_path: Path) -> None:
    kernel = "attn_implementation: kernels-community/vllm-flash-attn3\n"
    cfg = load(kernel + "flash_attention: true", tmp_path)
    assert cfg.model.attn_implementation == "kernels-community/vllm-flash-attn3"
    assert "no effect" in cfg.warnings[0].message
    for other in (kernel + "sdp_attention: true", "attn_implementation: sdpa\nflash_attention: true"):
        assert refused(other, tmp_path)[0].kind == "conflict"


@pytest.mark.parametrize(
    ("text", "key", "word"),
    [
        ("evaluation_strategy: weekly", "evaluation_strategy", "weekly"),
        ("dataset_processes: many", "dataset_processes", "many"),
        ("adam_eps: small", "adam_eps", "small"),
        ("model_config: 3", "model_config", "3"),
        ("fsdp_config: {fsdp_offload_params: perhaps}", "fsdp_config.fsdp_offload_params", "perhaps"),
        ("relora_steps: 100", "relora_steps", "not available"),
    ],
)
def test_a_mistake_is_told_by_the_name_that_the_file_has(
    tmp_path: Path, text: str, key: str, word: str
) -> None:
    [problem] = refused(text, tmp_path)
    assert problem.keys == (key,)
    assert f"`{key}`" in problem.message
    assert word in problem.message


def test_a_sharding_that_is_gone_is_not_lost_silently(tmp_path: Path) -> None:
    cfg = load("fsdp_config: {fsdp_sharding_strategy: HYBRID_SHARD}", tmp_path)
    assert "HYBRID_SHARD" in cfg.warnings[0].message
    sharded = load("fsdp_config: {fsdp_sharding_strategy: SHARD_GRAD_OP}", tmp_path)
    assert sharded.warnings == ()
    assert sharded.distributed.fsdp_config is not None
    assert sharded.distributed.fsdp_config.reshard_after_forward is False


@pytest.mark.parametrize(
    ("value", "feature"), [("dpo", "preference tuning"), ("grpo", "reinforcement learning")]
)
def test_the_feature_of_a_value(tmp_path: Path, value: str, feature: str) -> None:
    [problem] = refused(f"rl: {value}", tmp_path)
    assert problem.kind == "unavailable"
    assert feature in problem.message


def test_only_what_is_known_is_unavailable(tmp_path: Path) -> None:
    [problem] = refused("rl: guessing", tmp_path)
    assert problem.kind == "invalid_value"


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("warmup_steps: 0.1", "`warmup_ratio: 0.1`"),
        ("lora_modules_to_save: lm_head", "`lora_modules_to_save: [lm_head]`"),
        ("plugins: axolotl.integrations.liger.LigerPlugin", "[axolotl.integrations.liger.LigerPlugin]"),
        ("datasets: [a/b]", "`- path: a/b`"),
        ("datasets: [{path: a, roles: {user: human}}]", "`user: [human]`"),
        ("lr_groups: [{name: a, modules: [b]}]", "`lr:`"),
        ("val_datasets: [{path: a}]", "`test_datasets`"),
        ("use_rslora: true", "`peft_use_rslora`"),
        ("wandb_run_name: a", "`wandb_name`"),
        ("adapter_path: a", "`lora_model_dir`"),
    ],
)
def test_the_remedy_is_the_users_own_value_in_the_right_form(tmp_path: Path, text: str, remedy: str) -> None:
    base = (
        BASE.replace("datasets: [{path: a.jsonl, type: alpaca}]\n", "")
        if text.startswith("datasets")
        else BASE
    )
    assert remedy in refused(text, tmp_path, base)[0].remedy


def test_a_misspelt_key_is_not_missing_as_well(tmp_path: Path) -> None:
    base = BASE.replace("learning_rate", "learing_rate")
    assert [p.kind for p in refused("", tmp_path, base)] == ["unknown_key"]
    assert [p.kind for p in refused("", tmp_path, base.replace("learing_rate", "#"))] == ["missing"]


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yml").write_text(BASE)
    for name, remedy in (("confg.yml", "Did you mean `config.yml`?"), ("lora_r=8", "`--lora-r 8`")):
        with pytest.raises(ConfigError) as caught:
            load_config(name)
        assert remedy in caught.value.problems[0].remedy


@pytest.mark.parametrize("key", [k for k in owners() if state(owner(k), k) != "unavailable"])
def test_the_example_of_a_key_is_valid(key: str) -> None:
    shown = example(owner(key), (key,))
    if facts(owner(key), key).get("secret"):
        assert shown == ""
        return
    value: Any = parse_value(shown, "example")
    assert getattr(owner(key).model_validate({key: value}), key) is not None
