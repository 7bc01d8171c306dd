"""Figures that are read a step late say and decide what figures read at once do."""

from __future__ import annotations

import json
import math

import pytest
import torch

from axolotl.train.late import Arriving
from axolotl.train.session import train
from axolotl.train.steps import Steps, TrainingDiverged
from train.miniature import rows, same_weights, tiny_model, weights
from train.test_anomalies import noted, wild

TIMES = ("seconds", "per_second", "time", "memory")


def lines(run) -> list[dict]:
    """The lines of the log, without what a clock says."""
    found = [json.loads(line) for line in (run.parts.output_dir / "run.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not any(t in k for t in TIMES)}
        for line in found
        if line["kind"] != "event"
    ]


@pytest.fixture
def both(trainer, monkeypatch, tmp_path):
    """Runs the same config twice, with figures read at once and late."""

    def run(change=lambda run: None, count=24, **keys):
        found = []
        for late in (False, True):
            monkeypatch.setattr(Steps, "late_anywhere", late)
            made = trainer(
                tiny_model(),
                rows(count),
                output_dir=str(tmp_path / str(late)),
                optimizer="adamw_torch_fused",
                **keys,
            )
            change(made)
            assert made.reads_late is False  # the optimizer is made when training begins
            result = train(made, made.cfg)
            assert result.complete
            assert made.reads_late is late
            found.append(made)
        return found

    return run


@pytest.mark.parametrize(
    "keys",
    [
        {"num_epochs": 2, "logging_steps": 1},
        {
            "num_epochs": 2,
            "logging_steps": 3,
            "save_strategy": "steps",
            "save_steps": 5,
            "gradient_accumulation_steps": 2,
        },
        {"max_steps": 5, "logging_steps": 2, "max_grad_norm": 0.0},
    ],
)
def test_the_same_lines_and_weights(both, keys):
    at_once, late = both(**keys)
    assert lines(late) == lines(at_once)
    assert same_weights(weights(late.model), weights(at_once.model))


def test_a_step_that_is_no_number_is_left_out(both):
    at_once, late = both(lambda run: wild(run, 3, math.nan), logging_steps=1, max_steps=7)
    assert same_weights(weights(late.model), weights(at_once.model))
    assert late.bad_steps == at_once.bad_steps == 1
    assert [line["step"] for line in noted(late)] == [3]
    ours, theirs = lines(late), lines(at_once)
    assert [line.get("loss") for line in ours] == [line.get("loss") for line in theirs]
    assert ours[2]["loss"] is None
    assert all(bool(torch.isfinite(p).all()) for p in late.model.parameters())


def test_a_run_that_only_gives_no_numbers_ends_with_the_rows(trainer, monkeypatch):
    monkeypatch.setattr(Steps, "late_anywhere", True)
    run = trainer(tiny_model(), rows(24), optimizer="adamw_torch_fused", logging_steps=1)
    plain = run.compute_loss
    run.compute_loss = lambda *a, **k: plain(*a, **k) * math.nan
    before = weights(run.model)
    with pytest.raises(TrainingDiverged, match="3 times on end, at step 3"):
        train(run, run.cfg)
    assert same_weights(weights(run.model), before)
    told = json.loads((run.parts.output_dir / "bad_batch.json").read_text())
    assert told["step"] == 3
    assert [line["step"] for line in lines(run)] == [1, 2, 3]


def test_a_run_that_dies_leaves_the_line_of_its_last_step(trainer, monkeypatch):
    monkeypatch.setattr(Steps, "late_anywhere", True)
    run = trainer(tiny_model(), rows(24), optimizer="adamw_torch_fused", logging_steps=1)
    plain = run.compute_loss

    def dying(*args, **kwargs):
        if run.state.global_step == 3:
            raise KeyError("in the fourth step")
        return plain(*args, **kwargs)

    run.compute_loss = dying
    with pytest.raises(KeyError, match="fourth"):
        train(run, run.cfg)
    assert [line["step"] for line in lines(run)] == [1, 2, 3]


def test_numbers_arrive():
    figures = torch.tensor([1.0, math.inf, -2.5], dtype=torch.float64)
    arriving = Arriving(figures)
    figures.zero_()
    assert arriving.values() == [1.0, math.inf, -2.5] == arriving.values()
