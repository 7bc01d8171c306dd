"""Evaluating and saving happen at the steps that the config means, at the edges too."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl.config.train import TrainSection
from axolotl.errors import ConfigError
from axolotl.train.cadence import cadence


def steps(kind: str, per_epoch: int, total: int, **keys):
    section = TrainSection.model_validate(keys)
    return sorted(getattr(cadence(section, per_epoch, total, has_eval_data=True), kind))


@pytest.mark.parametrize(
    ("keys", "per_epoch", "total", "expected"),
    [
        ({"evals_per_epoch": 1}, 10, 10, [10]),
        ({"evals_per_epoch": 1}, 10, 30, [10, 20, 30]),
        ({"evals_per_epoch": 4}, 10, 10, [3, 5, 8, 10]),
        ({"evals_per_epoch": 2}, 5, 10, [3, 5, 8, 10]),
        ({"evals_per_epoch": 1}, 1, 1, [1]),
        ({"evals_per_epoch": 50}, 4, 8, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"evals_per_epoch": 2}, 10, 3, [3]),
        ({"evals_per_epoch": 1}, 10, 25, [10, 20, 25]),
        ({"evals_per_epoch": 0}, 10, 10, []),
        ({"eval_steps": 4}, 10, 10, [4, 8, 10]),
        ({"eval_steps": 0.25}, 10, 20, [5, 10, 15, 20]),
        ({"eval_steps": 0.3}, 10, 10, [3, 6, 9, 10]),
        ({"eval_steps": 100}, 10, 10, [10]),
        ({"eval_strategy": "epoch"}, 4, 8, [4, 8]),
        ({"eval_strategy": "no"}, 4, 8, []),
        ({}, 4, 8, [4, 8]),
    ],
)
def test_when_to_evaluate(keys, per_epoch, total, expected):
    assert steps("evaluate", per_epoch, total, **keys) == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"saves_per_epoch": 1}, [6, 12]),
        ({"saves_per_epoch": 2, "save_first_step": True}, [1, 3, 6, 9, 12]),
        ({"save_steps": 5}, [5, 10, 12]),
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "best"}, []),
        ({}, [6, 12]),
        ({"save_steps": 12, "evals_per_epoch": 2, "load_best_model_at_end": True}, [3, 6, 9, 12]),
    ],
)
def test_when_to_save(keys, expected):
    assert steps("save", 6, 12, **keys) == expected


def test_without_eval_data_nothing_is_evaluated():
    section = TrainSection.model_validate({"evals_per_epoch": 4})
    assert not cadence(section, 10, 10, has_eval_data=False).evaluate


def test_steps_without_a_number_is_an_error():
    with pytest.raises(ConfigError, match="does not say how many"):
        steps("evaluate", 4, 8, eval_strategy="steps")
    with pytest.raises(ConfigError, match="does not say how many"):
        steps("save", 4, 8, save_strategy="steps")


@given(st.integers(1, 40), st.integers(1, 200), st.integers(1, 7))
def test_parts_of_an_epoch_are_even_and_end_with_it(parts, per_epoch, epochs):
    found = steps("evaluate", per_epoch, per_epoch * epochs, evals_per_epoch=parts)
    assert len(found) == epochs * min(parts, per_epoch)
    assert set(range(per_epoch, per_epoch * epochs + 1, per_epoch)) <= set(found)
    gaps = [b - a for a, b in zip([0, *found], found, strict=False)]
    assert max(gaps) - min(gaps) <= 1
