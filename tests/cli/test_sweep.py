"""Sweeps: which runs a sweep file stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from axolotl.cli.overrides import parse_overrides
from axolotl.cli.sweep import Trial, checked_trials, expand_sweep
from axolotl.config import load_config
from axolotl.errors import ConfigError

BASE = "base_model: x\ndatasets: [{path: a.jsonl, type: alpaca}]\nlearning_rate: 1e-4\n"


def expand(text: str, folder: Path) -> list[Trial]:
    (folder / "sweep.yml").write_text(text, encoding="utf-8")
    return expand_sweep(folder / "sweep.yml")


def test_every_value_with_every_value(tmp_path: Path) -> None:
    trials = expand("learning_rate: [1e-4, 2e-4]\nlora_r: [8, 16, 32]\nseed: 7\n", tmp_path)
    assert len(trials) == 6
    assert trials[0].values == {"learning_rate": 1e-4, "lora_r": 8, "seed": 7}
    assert trials[-1].values == {"learning_rate": 2e-4, "lora_r": 32, "seed": 7}
    assert len({trial.name for trial in trials}) == 6


@pytest.mark.parametrize("word", ["paired", "_"])
def test_paired_values_go_together(tmp_path: Path, word: str) -> None:
    text = f"{word}:\n  - {{micro_batch_size: 1, gradient_accumulation_steps: 8}}\n  - {{micro_batch_size: 2}}\nlora_r: [8, 16]\n"
    trials = expand(text, tmp_path)
    assert [t.values for t in trials] == [
        {"micro_batch_size": 1, "gradient_accumulation_steps": 8, "lora_r": 8},
        {"micro_batch_size": 1, "gradient_accumulation_steps": 8, "lora_r": 16},
        {"micro_batch_size": 2, "lora_r": 8},
        {"micro_batch_size": 2, "lora_r": 16},
    ]


def test_lists_nested_keys_and_old_spellings(tmp_path: Path) -> None:
    trials = expand(
        "lora_target_modules: [[q_proj], [q_proj, v_proj]]\nspecial_tokens.pad_token: ['<pad>']\nflash_attention: [true, false]\n",
        tmp_path,
    )
    assert len(trials) == 4
    assert trials[0].values["lora_target_modules"] == ["q_proj"]


def test_a_run_has_a_folder_and_a_config_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text(BASE)
    trials = expand("learning_rate: [1e-4, 3e-4]\nspecial_tokens.pad_token: [<pad>]\n", tmp_path)
    cfgs = [load_config(tmp_path / "c.yml", trial.overrides("out/mine")) for trial in trials]
    assert [cfg.optim.learning_rate for cfg in cfgs] == [1e-4, 3e-4]
    assert len({cfg.output.output_dir for cfg in cfgs}) == 2
    for cfg, trial in zip(cfgs, trials, strict=True):
        assert cfg.output.output_dir == f"out/mine/{trial.name}"
        assert cfg.model.special_tokens is not None
        assert set(trial.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._=-")


@pytest.mark.parametrize(
    ("text", "kind", "word"),
    [
        ("learning_rat: [1]\n", "unknown_key", "`learning_rate`"),
        ("paired: [{lora_rnk: 3}]\n", "unknown_key", "`lora_r`"),
        ("paired: {lora_r: 3}\n", "invalid_value", "list of mappings"),
        ("paired: [{lora_r: 3}]\nlora_r: [8]\n", "invalid_value", "twice"),
        ("lora_r: []\n", "invalid_value", "no value"),
        ("lora_r: [1]\nlora_r: [2]\n", "duplicate_key", "twice"),
        ("- a\n", "syntax", "list"),
        (
            "seed: ["
            + ", ".join(map(str, range(40)))
            + "]\nlora_r: ["
            + ", ".join(map(str, range(1, 40)))
            + "]\n",
            "invalid_value",
            "1560",
        ),
    ],
)
def test_a_wrong_sweep_is_told(tmp_path: Path, text: str, kind: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(text, tmp_path)
    [problem] = caught.value.problems
    assert problem.kind == kind
    assert word in problem.message + problem.remedy


def test_every_mistake_is_told_in_the_sweep_file(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yml"
    file.write_text("learning_rate: [1e-4, abc]\nlora_r: [4, 0]\n_:\n  - {lora_dropout: 2}\n")

    def load(flags: list[str]) -> object:
        base = tmp_path / "c.yml"
        base.write_text(
            "base_model: x\ndatasets: [{path: a, type: alpaca}]\nadapter: lora\nlora_r: 1\nlora_alpha: 2\n"
            "lora_target_linear: true\nlearning_rate: 1\n"
        )
        return load_config(base, parse_overrides(flags))

    with pytest.raises(ConfigError) as caught:
        checked_trials(file, "out", load)
    found = {(p.keys[0], p.places[0].line, p.message.split()[0]) for p in caught.value.problems}
    assert found == {
        ("learning_rate", 1, "`learning_rate`"),
        ("lora_r", 2, "`lora_r`"),
        ("lora_dropout", 4, "`lora_dropout`"),
    }
    assert {p.places[0].file for p in caught.value.problems} == {str(file)}
