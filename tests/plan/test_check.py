"""Names in the config against the components that answer to them, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from axolotl.data.formats import formats
from axolotl.errors import ConfigError, Problem
from axolotl.optim.registry import optimizers, schedules
from axolotl.plan.check import load_config, template_names

BASE = {
    "base_model": "base_model: x",
    "datasets": "datasets: [{path: a, type: alpaca}]",
    "learning_rate": "learning_rate: 1e-4",
}


def load(text: str, folder: Path) -> list[Problem]:
    """The problems of a text together with the base lines that it does not replace."""
    written = [line.partition(":")[0] for line in text.splitlines()]
    lines = [line for key, line in BASE.items() if key not in written]
    (folder / "c.yml").write_text("\n".join([*lines, text]) + "\n", encoding="utf-8")
    try:
        return list(load_config(folder / "c.yml").warnings)
    except ConfigError as error:
        return [p for p in error.problems if p.fatal]


@pytest.mark.parametrize(
    ("text", "kind", "key", "remedy"),
    [
        ("optimizer: adamw_troch", "invalid_value", "optimizer", "`adamw_torch`"),
        ("optimizer: nonsense_xyz", "invalid_value", "optimizer", "adamw_torch_fused"),
        ("optimizer: AdamW", "invalid_value", "optimizer", "mean `adamw_torch_fused`"),
        ("lr_scheduler: cosine_annealing", "invalid_value", "lr_scheduler", "mean `cosine`"),
        ("lr_scheduler: log_sweep", "removed", "lr_scheduler", "cosine"),
        ("datasets: [{path: a, type: pretrain}]", "invalid_value", "datasets[0].type", "pretraining_dataset"),
        ("optimizer: dion", "unavailable", "optimizer", "adamw_torch_fused"),
        ("lr_scheduler: cosin", "invalid_value", "lr_scheduler", "`cosine`"),
        ("adapter: lorra", "invalid_value", "adapter", "`lora`"),
        ("adapter: dora", "invalid_value", "adapter", "peft_use_dora"),
        ("adapter: llama-adapter", "unavailable", "adapter", "lora"),
        ("datasets: [{path: a, type: alpacca}]", "invalid_value", "datasets[0].type", "`alpaca`"),
        ("datasets: [{path: a, type: bradley_terry.chat_template}]", "unavailable", "datasets[0].type", ""),
        ("test_datasets: [{path: a, type: alpacca}]", "invalid_value", "test_datasets[0].type", "`alpaca`"),
        ("chat_template: lama3", "invalid_value", "chat_template", "`llama3`"),
        ("chat_template: '{{ messages }}'", "invalid_value", "chat_template", "chat_template_jinja"),
        (
            "datasets: [{path: a, type: chat_template, chat_template: chatmel}]",
            "invalid_value",
            "datasets[0].chat_template",
            "`chatml`",
        ),
    ],
)
def test_a_name_that_nothing_answers_to(tmp_path: Path, text: str, kind: str, key: str, remedy: str) -> None:
    [problem] = load(text, tmp_path)
    assert (problem.kind, problem.keys[0]) == (kind, key)
    assert problem.places[0].line is not None
    assert remedy in problem.remedy
    assert problem.excerpt


def test_every_name_of_the_registries_is_known(tmp_path: Path) -> None:
    for key, registry in (("optimizer", optimizers), ("lr_scheduler", schedules)):
        for name in registry:
            assert {p.kind for p in load(f"{key}: {name}", tmp_path)} <= {"unavailable"}, name
    for name in formats:
        kinds = {p.kind for p in load(f"datasets: [{{path: a, type: '{name}'}}]", tmp_path)}
        assert kinds <= {"unavailable"}, name
    for name in [*template_names(), "tokenizer_default", "tokenizer_default_fallback_chatml"]:
        assert load(f"chat_template: {name}", tmp_path) == [], name
    assert {"chatml", "llama3"} <= set(template_names())


def test_names_are_told_together_with_all_other_mistakes(tmp_path: Path) -> None:
    found = load("optimizer: adamw_troch\nlora_rank: 8\nsequence_len: -5\nadapter: lorra", tmp_path)
    assert {p.keys[0] for p in found} == {"optimizer", "lora_rank", "sequence_len", "adapter"}


def test_types_of_preference_data_are_not_told_beside_the_method(tmp_path: Path) -> None:
    found = load("rl: dpo\ndatasets: [{path: a, type: chatml.intel}]", tmp_path)
    assert [p.keys[0] for p in found] == ["rl"]


def test_a_plugin_of_the_user_may_bring_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_optimizers.py").write_text("")
    assert load("optimizer: mine\nplugins: [my_optimizers]", tmp_path) == []


def test_no_torch_is_needed(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text("\n".join(BASE.values()))
    program = "import sys; from axolotl.plan.check import load_config; load_config(sys.argv[1]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "c.yml")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("optimizer: sgd\nadam_beta1: 0.9", "adam_beta1"),
        ("optimizer: lion\nadam_epsilon: 1e-6", "adam_epsilon"),
        ("adam_beta3: 0.999", "adam_beta3"),
        ("adam_epsilon2: 1e-8", "adam_epsilon2"),
        ("optimizer: schedule_free_sgd\nadam_beta2: 0.9", "adam_beta2"),
        ("lr_div_factor: 10", "lr_div_factor"),
        ("lr_scheduler: linear\ncosine_min_lr_ratio: 0.1", "cosine_min_lr_ratio"),
        ("lr_scheduler: rex\ncosine_constant_lr_ratio: 0.1", "cosine_constant_lr_ratio"),
        ("lr_scheduler_kwargs: {num_cylces: 1}", "lr_scheduler_kwargs.num_cylces"),
        ("lr_scheduler: rex\nlr_scheduler_kwargs: {num_cycles: 1}", "lr_scheduler_kwargs.num_cycles"),
        ("lr_scheduler: constant\nlr_scheduler_kwargs: {a: 1}", "lr_scheduler_kwargs.a"),
    ],
)
def test_a_key_that_the_optimizer_or_schedule_does_not_read_is_told(
    tmp_path: Path, text: str, key: str
) -> None:
    [problem] = load(text, tmp_path)
    assert (problem.kind, problem.keys[0]) == ("warning", key)
    assert problem.places[0].line is not None


@pytest.mark.parametrize(
    "text",
    [
        "optimizer: came_pytorch\nadam_beta3: 0.999\nadam_epsilon2: 1e-8",
        "optimizer: muon\nadam_beta1: 0.9",
        "optimizer: lion_8bit\nadam_beta2: 0.9",
        "optimizer: schedule_free_adamw\nadam_beta2: 0.9",
        "lr_scheduler: one_cycle\nlr_div_factor: 10\nlr_scheduler_kwargs: {final_div_factor: 10}",
        "lr_scheduler: rex\ncosine_min_lr_ratio: 0.1\nlr_quadratic_warmup: true",
        "lr_scheduler_kwargs: {num_cycles: 1}",
        "lr_scheduler: polynomial\nlr_scheduler_kwargs: {power: 2}",
    ],
)
def test_a_key_that_is_read_is_no_problem(tmp_path: Path, text: str) -> None:
    assert load(text, tmp_path) == []


def test_every_optimizer_and_schedule_says_which_keys_it_reads() -> None:
    silent = [
        name
        for registry in (optimizers, schedules)
        for name in registry
        if not {"keys", "unavailable"} & set(registry.describe(name).facts)
    ]
    assert silent == []
