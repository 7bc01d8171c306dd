"""What is said about a DeepSpeed config before anything runs, and what DeepSpeed gets in the end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.config import Config, Hardware, load_config
from axolotl.distributed.deepspeed import STALE, free_stale_locks
from axolotl.distributed.zero import GATHER, SHIPPED, check, compiling, completed, read_zero
from axolotl.distributed.zero_keys import KEYS
from axolotl.errors import ConfigError, Problem

CPU = Hardware()
Load = Callable[..., Config]
LORA = {"lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
ZERO2 = {"zero_optimization": {"stage": 2}}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """A config whose `deepspeed` is a file with this text (`z.json`), or this mapping."""
    monkeypatch.chdir(tmp_path)

    def make(deepspeed: str | dict[str, Any], /, **keys: Any) -> Config:
        if isinstance(deepspeed, str):
            Path("z.json").write_text(deepspeed)
        values = {
            "base_model": "b",
            "datasets": [{"path": "d.jsonl", "type": "alpaca"}],
            "learning_rate": 1e-4,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "deepspeed": "z.json" if isinstance(deepspeed, str) else deepspeed,
        } | keys
        Path("config.yml").write_text(yaml.safe_dump(values, sort_keys=False))
        return load_config("config.yml")

    return make


def problems(cfg: Config, processes: int = 4) -> list[Problem]:
    return list(check(cfg, CPU, processes, installed=False))


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.json")), ids=lambda f: f.stem)
def test_what_is_shipped_is_right(file: Path, load: Load) -> None:
    cfg = load(file.read_text(), bf16=True)
    assert problems(cfg) == []
    zero = read_zero(cfg)
    assert zero is not None
    whole = completed(cfg, zero, CPU, 4)
    assert (whole["train_micro_batch_size_per_gpu"], whole["gradient_accumulation_steps"]) == (2, 3)
    assert (whole["train_batch_size"], whole["gradient_clipping"]) == (24, 1.0)
    assert whole["bf16"]["enabled"] is True and whole["fp16"]["enabled"] is False
    # Only what depends on the width of the model is left open.
    left = {k for k, v in whole["zero_optimization"].items() if v == "auto"}
    assert left <= {
        "reduce_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
    }
    assert '"auto"' not in json.dumps({k: v for k, v in whole.items() if k != "zero_optimization"})


@pytest.mark.parametrize(
    "text, line, column, words",
    [
        ('{\n  "zero_optimization": {"stage": 2,}\n}', 2, None, "is not JSON"),
        (
            '{\n\t"zero_optimization":\t{"stage": 2},\n\t"zero_optimisation": {}\n}',
            3,
            2,
            "`zero_optimisation`",
        ),
        (
            '{\n  "zero_optimization": {\n    "stage": 2,\n    "overlap_com": true\n  }\n}',
            4,
            5,
            "`overlap_comm`",
        ),
        ('{\n  "zero_optimization": {"stage": 5}\n}', 2, 25, "it takes `1`, `2`, `3`"),
        ('{\n  "zero_optimization": {"stage": 0}\n}', 2, 25, "divides nothing"),
        ('{\n  "train_batch_size": "auto"\n}', 1, 1, "does not say what is divided"),
        (
            '{"zero_optimization": {"stage": 2},\n "train_micro_batch_size_per_gpu": 8}',
            2,
            2,
            "micro_batch_size",
        ),
        ('{"zero_optimization": {"stage": 2},\n "train_batch_size": 8}', 2, 2, "says 24"),
        ('{"zero_optimization": {"stage": 2},\n "gradient_accumulation_steps": 8}', 2, 2, "says 3"),
        ('{"zero_optimization": {"stage": 2},\n "gradient_clipping": 0.5}', 2, 2, "max_grad_norm"),
        ('{"zero_optimization": {"stage": 2},\n "bf16": {"enabled": true}}', 2, 11, "no bf16"),
        (
            '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}',
            1,
            36,
            "no effect in stage 2",
        ),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}', 1, 36, "whole number"),
        ('{"zero_optimization": {"stage": 2, "overlap_comm": "yes"}}', 1, 36, "true or false"),
        ('{"zero_optimization": {"stage": 2},\n "amp": {}}', 2, 2, "any more"),
        (
            '{"zero_optimization": {"stage": 2},\n "bf16": {"check_grad_overflow": false}}',
            2,
            11,
            "no number into the weights",
        ),
        ('{"zero_optimization": {"stage": 2},\n "gradient_allreduce_op": "sum"}', 2, 2, "mean"),
        ('{"zero_optimization": {"stage": 2},\n "optimizer": {"type": "Lamb"}}', 2, 2, "`Lamb`"),
        (
            '{"zero_optimization": {"stage": 2},\n "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}',
            2,
            44,
            "the YAML says 0.0001",
        ),
        (
            '{"zero_optimization": {"stage": 2},\n "scheduler": {"type": "WarmupLR"}}',
            2,
            2,
            "lr_scheduler: cosine",
        ),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', 1, 36, "twice"),
        ("[1]", 1, 1, "no JSON object"),
    ],
)
def test_mistakes_are_told_with_their_place(
    text: str, line: int, column: int | None, words: str, load: Load
) -> None:
    (found, *more) = problems(load(text))
    assert not more
    assert words in found.message + found.remedy
    (place,) = found.places[:1]
    assert (place.file, place.line) == ("z.json", line)
    assert column is None or place.column == column


def test_all_mistakes_are_told_at_once_and_a_mapping_in_the_yaml_has_places_too(load: Load) -> None:
    cfg = load({"zero_optimization": {"stage": 2, "stge": 1}, "train_batch_size": 7, "amp": {}})
    found = problems(cfg)
    assert len(found) == 3
    lines = Path("config.yml").read_text().splitlines()
    for problem in found:
        (place,) = problem.places
        assert place.file == "config.yml" and place.line
        assert lines[place.line - 1].strip().partition(":")[0] in ("stge", "train_batch_size", "amp")


def test_a_file_that_is_not_there_is_told_with_what_brings_it(load: Load) -> None:
    cfg = load(ZERO2, deepspeed="configs/zero2.json")
    (found,) = problems(cfg)
    assert found.kind == "path" and "axolotl fetch deepspeed_configs" in found.remedy
    (near,) = problems(load(ZERO2, deepspeed="zero_2.json"))
    assert "zero2.json" in near.remedy
    with pytest.raises(ConfigError):
        read_zero(cfg)


@pytest.mark.parametrize(
    "keys, named",
    [
        ({"load_in_4bit": True, "adapter": "qlora"} | LORA, "load_in_4bit"),
        ({"device_map": "auto"}, "device_map"),
        ({"fix_untrained_tokens": [1]}, "fix_untrained_tokens"),
    ],
)
def test_what_stage_3_cannot_do_is_told(keys: dict[str, Any], named: str, load: Load) -> None:
    three = json.dumps({"zero_optimization": {"stage": 3}})
    (found,) = problems(load(three, **keys))
    assert named in found.message and found.places[0].file == "config.yml"
    assert problems(load(json.dumps(ZERO2), **keys)) == []


def test_optimizer_and_schedule_that_agree_are_taken_from_the_yaml(load: Load) -> None:
    agreeing = ZERO2 | {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": 0.0}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto", "warmup_min_lr": 0}},
    }
    cfg = load(json.dumps(agreeing), lr_scheduler="linear", optimizer="adamw_torch")
    assert problems(cfg) == []
    zero = read_zero(cfg)
    assert zero is not None
    assert not {"optimizer", "scheduler"} & completed(cfg, zero, CPU, 2).keys()


def test_an_optimizer_of_the_yaml_is_not_replaced_by_deepspeeds(load: Load) -> None:
    offload = json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    for name, kept in (("lion_pytorch", False), ("adamw_torch", None)):
        cfg = load(offload, optimizer=name)
        zero = read_zero(cfg)
        assert zero is not None
        assert completed(cfg, zero, CPU, 2).get("zero_force_ds_cpu_optimizer") is kept
    (found,) = problems(load(offload, optimizer="adamw_8bit"))
    assert "adamw_8bit" in found.message


def test_stage_3_saves_whole_weights_unless_it_is_told_not_to(load: Load) -> None:
    for written, wanted in (({}, True), ({GATHER: False}, False)):
        cfg = load({"zero_optimization": {"stage": 3} | written})
        zero = read_zero(cfg)
        assert zero is not None
        assert completed(cfg, zero, CPU, 2)["zero_optimization"][GATHER] is wanted


@settings(max_examples=30, deadline=None)
@given(
    micro=st.integers(1, 9),
    steps=st.integers(1, 9),
    processes=st.integers(2, 16),
    clip=st.none() | st.floats(0, 5),
    open_=st.sets(st.sampled_from(["train_batch_size", "gradient_clipping", "gradient_accumulation_steps"])),
)
def test_what_deepspeed_gets_agrees_with_the_yaml(
    micro: int, steps: int, processes: int, clip: float | None, open_: set[str]
) -> None:
    written: dict[str, Any] = ZERO2 | dict.fromkeys(open_, "auto")
    values = {"micro_batch_size": micro, "gradient_accumulation_steps": steps, "deepspeed": written}
    sections: Any = {
        key: value for key, value in (values | {"max_grad_norm": clip}).items() if value is not None
    }
    cfg = Config().with_values(sections, {})
    zero = read_zero(cfg)
    assert zero is not None
    whole = completed(cfg, zero, CPU, processes)
    assert whole["train_batch_size"] == micro * steps * processes
    assert whole["gradient_clipping"] == (1.0 if clip is None else clip)
    assert written == ZERO2 | dict.fromkeys(open_, "auto")


@pytest.mark.extras
def test_the_keys_are_those_of_deepspeed() -> None:
    from deepspeed.compile.config import CompileConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    from axolotl.distributed.zero_keys import ELSEWHERE, GONE, OLD_COMPILE

    def names(model: Any) -> set[str]:
        return set(model.model_fields) | {f.alias for f in model.model_fields.values() if f.alias}

    assert KEYS["zero_optimization"] == names(DeepSpeedZeroConfig)
    assert KEYS["zero_optimization.offload_optimizer"] == names(DeepSpeedZeroOffloadOptimizerConfig)
    assert KEYS["zero_optimization.offload_param"] == names(DeepSpeedZeroOffloadParamConfig)
    assert KEYS["bf16"] == names(DeepSpeedBF16Config)
    assert KEYS["fp16"] == names(DeepSpeedFP16Config)
    assert KEYS["compile"] == names(CompileConfig) | set(OLD_COMPILE)

    import deepspeed
    from deepspeed.runtime import config as theirs

    assert set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS) == GONE
    source = "".join(f.read_text() for f in Path(deepspeed.__file__).parent.rglob("*.py"))
    for key in KEYS[""] | set(ELSEWHERE):
        assert f'"{key}"' in source or f"'{key}'" in source, key


def test_a_lock_of_a_compilation_that_was_killed_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, young = tmp_path / "py311_cpu" / "cpu_adam" / "lock", tmp_path / "py311_cpu" / "shm" / "lock"
    for lock in (old, young):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(old, (0, time.time() - STALE - 60))
    free_stale_locks(tmp_path)
    assert not old.exists() and young.exists()
    assert "cpu_adam" in capsys.readouterr().err.replace("\n", "")


def test_compile_as_it_was_once_written_turns_torch_compile_on(load: Load) -> None:
    for name, on in (("zero2_torch_compile", True), ("zero2", False)):
        cfg = compiling(load((SHIPPED / f"{name}.json").read_text()))
        assert (cfg.train.torch_compile is True) is on
        assert cfg.train.torch_compile_backend == ("inductor" if on else None)
        zero = read_zero(cfg)
        assert zero is not None
        assert not {"disable", "backend"} & completed(cfg, zero, CPU, 2).get("compile", {}).keys()
    cfg = load((SHIPPED / "zero2_torch_compile.json").read_text(), torch_compile=False)
    (found,) = problems(cfg)
    assert "torch_compile: false" in found.message
