"""Watching for steps out of the ordinary: what is one, what is noted down, and that resuming changes nothing about it."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axolotl.train.anomalies import LEAST, WINDOW, SpikeWatch, usual_range
from axolotl.train.session import train
from axolotl.train.steps import TrainingDiverged
from train.miniature import rows, same_weights, tiny_model, weights


@given(st.lists(st.floats(-1e6, 1e6), min_size=LEAST, max_size=WINDOW))
def test_the_usual_range_is_median_and_distance_from_it(values):
    middle, spread = usual_range(values)
    assert middle == pytest.approx(statistics.median(values), rel=1e-9, abs=1e-9)
    expected = 1.4826 * statistics.median([abs(v - middle) for v in values])
    assert spread == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_of_normal_noise_it_is_the_standard_deviation():
    draw = random.Random(0)
    _, spread = usual_range([draw.gauss(2.0, 0.1) for _ in range(20_000)])
    assert spread == pytest.approx(0.1, rel=0.05)


def quiet(watch, steps, seed=0, begin=0):
    """A loss that falls with noise, and norms that vary by factors; what the watch says of them."""
    draw = random.Random(seed)
    said = []
    for step in range(begin, begin + steps):
        loss = 1.5 + 2 * math.exp(-step / 100) + draw.gauss(0, 0.15)
        said += watch.look(loss, math.exp(draw.gauss(0, 0.4)))
    return said


@pytest.mark.parametrize("seed", range(5))
def test_an_ordinary_run_is_left_in_peace(seed):
    assert quiet(SpikeWatch(10.0), 2000, seed) == []


def test_a_spike_of_loss_or_norm_is_seen_and_forgotten():
    watch = SpikeWatch(10.0)
    quiet(watch, 400)
    (spike,) = watch.look(6.0, 1.0)
    assert spike.what == "loss" and spike.value == 6.0
    assert spike.median == pytest.approx(1.6, abs=0.3)
    assert spike.deviations > 10
    (spike,) = watch.look(1.6, 500.0)
    assert spike.what == "gradient norm" and spike.median == pytest.approx(1.0, rel=0.3)
    assert {s.what for s in watch.look(8.0, 900.0)} == {"loss", "gradient norm"}
    assert quiet(watch, 100, begin=400) == []


def test_the_first_steps_say_nothing_and_the_watch_can_be_put_off():
    watch = SpikeWatch(10.0)
    for step in range(LEAST):
        assert watch.look(1.0 if step % 2 else 900.0, 1.0) == []
    off = SpikeWatch(0.0)
    for _ in range(LEAST + 1):
        off.look(1.0, 1.0)
    assert off.look(1e9, 1e9) == []


def test_a_loss_that_hardly_varies_does_not_make_a_hair_a_spike():
    watch = SpikeWatch(10.0)
    for _ in range(WINDOW):
        watch.look(2.0, 1.0)
    assert watch.look(2.3, 2.0) == []
    assert len(watch.look(2.5, 3.0)) == 2


def wild(run, step, factor):
    """In one step the loss, and with it the gradient, is so many times as large."""
    plain = run.compute_loss

    def compute_loss(*args, **kwargs):
        loss = plain(*args, **kwargs)
        return loss * factor if torch.is_grad_enabled() and run.state.global_step + 1 == step else loss

    run.compute_loss = compute_loss


def noted(run):
    return [json.loads(line) for line in (run.parts.output_dir / "anomalies.jsonl").read_text().splitlines()]


def test_a_wild_step_is_told_with_its_rows(trainer, capsys):
    data = rows(120)
    run = trainer(tiny_model(), data, gradient_accumulation_steps=2, learning_rate=1e-4)
    wild(run, 27, 30.0)
    assert train(run, run.cfg).complete
    (line,) = noted(run)
    assert line["step"] == 27
    assert {each["what"] for each in line["spikes"]} == {"loss", "gradient norm"}
    assert all(each["deviations"] > 10 for each in line["spikes"])
    # The rows are those of the step: batches 52 and 53 of the epoch's order.
    order = run.parts.batches.loader(run.cfg.train).batch_sampler
    expected = [[i for each in order.bins_of(batch) for i in each] for batch in (52, 53)]
    assert [[row["row"] for row in each["rows"]] for each in line["micro_batches"]] == expected
    ids = data[expected[0][0]]["input_ids"]
    assert line["micro_batches"][0]["rows"][0]["tokens"] == len(ids)
    said = capsys.readouterr().err.replace("\n", " ")
    assert "Step 27 is out of the ordinary: loss" in said and "anomalies.jsonl" in said
    events = [json.loads(x) for x in (run.parts.output_dir / "run.jsonl").read_text().splitlines()]
    told = [e for e in events if e["kind"] == "event" and "out of the ordinary" in e["message"]]
    assert [e["step"] for e in told] == [26]


def test_spikes_on_end_may_end_the_run(trainer):
    run = trainer(tiny_model(), rows(80), learning_rate=1e-4, spike_patience=2)
    plain = run.compute_loss

    def compute_loss(*args, **kwargs):
        loss = plain(*args, **kwargs)
        return loss * 40 if torch.is_grad_enabled() and run.state.global_step >= 30 else loss

    run.compute_loss = compute_loss
    with pytest.raises(TrainingDiverged, match="the 2th step on end"):
        train(run, run.cfg)
    assert run.state.global_step == 31
    assert [line["step"] for line in noted(run)] == [31, 32]


def test_a_resumed_run_sees_the_same_spikes(trainer):
    keys = {"learning_rate": 1e-4, "save_steps": 24, "save_strategy": "steps"}
    run = trainer(tiny_model(), rows(80), **keys)
    wild(run, 26, 30.0)
    train(run, run.cfg)
    seen, folder = noted(run), run.parts.output_dir / "checkpoint-24"
    again = trainer(tiny_model(seed=5), rows(80), None, folder, **keys)
    assert len(again.spikes.losses) == 24
    wild(again, 26, 30.0)
    train(again, again.cfg, folder)
    assert noted(again) == seen and len(seen) == 1
    assert same_weights(weights(again.model), weights(run.model))
    assert again.run_state().losses == run.run_state().losses


def test_steps_without_a_number_are_noted_down_from_the_first_on(trainer):
    run = trainer(tiny_model(), rows(16))
    wild(run, 3, math.nan)
    assert train(run, run.cfg).complete
    (line,) = noted(run)
    assert line["step"] == 3 and line["what"] == "loss is not finite"
    assert line["micro_batches"][0]["loss"] is None and line["micro_batches"][0]["loss_is_finite"] is False
    assert all(isinstance(row["row"], int) and row["text"] for row in line["micro_batches"][0]["rows"])
