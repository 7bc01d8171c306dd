"""Answers to keys that are not built, not known, or in the wrong place: each says what a user can do."""

from __future__ import annotations

from pathlib import Path

import pytest

from axolotl.config import load_config
from axolotl.config.keys import SECTIONS
from axolotl.config.plugins import INTEGRATIONS
from axolotl.config.section import facts
from axolotl.config.unbuilt import _WITHOUT
from axolotl.errors import ConfigError, Problem

BASE = "base_model: x\ndatasets: [{path: a.jsonl, type: alpaca}]\nlearning_rate: 1e-4\n"


def refused(text: str, folder: Path) -> list[Problem]:
    file = folder / "c.yml"
    file.write_text(BASE + text + "\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    return [p for p in caught.value.problems if p.fatal]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("rl: dpo", "preferred answers"),
        ("rl: grpo", "given answers"),
        ("reward_model: true", "one that writes"),
        ("processor_type: AutoProcessor", "text alone"),
        ("context_parallel: {size: 2}", "`context_parallel_size:`"),
        ("plugins: [axolotl.integrations.diffusion.DiffusionPlugin]", "left to right"),
    ],
)
def test_a_method_that_is_not_built_is_no_line_to_delete(tmp_path: Path, line: str, says: str) -> None:
    [problem] = refused(line, tmp_path)
    assert problem.kind == "unavailable"
    assert says in problem.remedy
    assert "to train without it" not in problem.remedy


def test_what_trains_instead_is_said_once(tmp_path: Path) -> None:
    first, *others = refused("rl: kto\nrl_beta: 0.5\nkto_desirable_weight: 0.2", tmp_path)
    assert "preferred answers" in first.remedy
    assert [p.keys[0] for p in others] == ["rl_beta", "kto_desirable_weight"]
    assert all("goes with `rl`" in p.remedy for p in others)


def test_remedies_are_of_features_that_are_still_missing() -> None:
    features: set[object] = set(INTEGRATIONS.values())
    for section in SECTIONS.values():
        for key in section.model_fields:
            said = facts(section, key)
            features |= {said.get("feature"), *said.get("by_value", {}).values()}
    assert {feature for feature in _WITHOUT if feature not in features} == set()


@pytest.mark.parametrize(
    "word", ["weights_cpu_offload", "nodes", "env", "shared_dir", "parent_id", "rdzv_backend"]
)
def test_words_that_only_end_alike_are_not_offered(tmp_path: Path, word: str) -> None:
    [problem] = refused(f"{word}: 1", tmp_path)
    assert problem.kind == "unknown_key"
    assert "Did you mean" not in problem.remedy


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("rl_config: {beta: 1}", "Did you mean `trl`?"),
        ("eta_min: 0", "Did you mean `cosine_min_lr_ratio`?"),
        ("use_auth_token: true", "Did you mean `hf_use_auth_token`?"),
        ("pretraining_dataset: [{path: a, field: body}]", "Did you mean `text_column`?"),
        (
            "test_datasets: [{path: a, type: alpaca, image_dir: b}]",
            "`axolotl explain test_datasets` lists the keys.",
        ),
    ],
)
def test_words_of_other_places_lead_to_ours(tmp_path: Path, line: str, remedy: str) -> None:
    assert remedy in [p.remedy for p in refused(line, tmp_path)]


def test_an_empty_entry_of_a_list(tmp_path: Path) -> None:
    problems = refused("lora_target_modules:\n  - q_proj\n  -\ntest_datasets:\n  -", tmp_path)
    assert {(p.keys[0], p.remedy) for p in problems} == {
        ("lora_target_modules[1]", "Delete the empty `-`, or fill it in."),
        ("test_datasets[0]", "Delete the empty `-`, or fill it in."),
    }


@pytest.mark.parametrize("written", ["${ROWS}", "$ROWS", "${ROWS:-4}"])
def test_a_variable_where_no_text_can_stand(tmp_path: Path, written: str) -> None:
    [problem] = refused(f"micro_batch_size: {written}", tmp_path)
    assert problem.kind == "invalid_value"
    assert "Write the value itself" in problem.remedy
