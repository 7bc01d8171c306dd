"""Answers while training: what is asked, that they are the model's own, and that training does not notice."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axolotl.inference.generate import Sampling, Stops, generate
from axolotl.report.run import render_run_report
from axolotl.train.samples import parted, undisturbed
from axolotl.train.session import train
from train.miniature import losses, rows, same_weights, tiny_model, weights

KEYS = {"num_epochs": 2, "evals_per_epoch": 2, "gradient_accumulation_steps": 1}
PACKED = {"sample_packing": True, "sequence_len": 128}


def samples(run):
    lines = [json.loads(x) for x in (run.parts.output_dir / "run.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "sample"]


@pytest.mark.parametrize(
    "more", [{}, PACKED, {"gradient_checkpointing": True}], ids=["", "packed", "checkpointing"]
)
def test_training_does_not_notice(trainer, more):
    data, held_out = rows(12), rows(4, seed=3)
    plain = trainer(tiny_model(dropout=0.1), data, held_out, **KEYS, **more)
    train(plain, plain.cfg)
    assert samples(plain) == []
    run = trainer(tiny_model(dropout=0.1), data, held_out, generate_samples=True, **KEYS, **more)
    train(run, run.cfg)
    assert losses(run) == losses(plain)
    assert same_weights(weights(run.model), weights(plain.model))
    # One evaluation before the first step, and two in each epoch.
    found = samples(run)
    assert len(found) == 3 * 5
    assert {line["row"] for line in found} == {0, 1, 2}


def test_the_last_answers_are_those_of_the_trained_model(trainer, tokenizer):
    held_out = rows(4, seed=3)
    run = trainer(
        tiny_model(attention="sdpa"),
        rows(12),
        held_out,
        generate_samples=True,
        attn_implementation="sdpa",
        generation_temperature=0,
        num_generation_samples=2,
        **KEYS,
    )
    train(run, run.cfg)
    last = [line for line in samples(run) if line["step"] == run.state.global_step]
    assert len(last) == 2
    for line in last:
        ids, labels = held_out[line["row"]]["input_ids"], held_out[line["row"]]["labels"]
        first = len(parted((ids, labels), 0.5)[0])
        expected = generate(
            run.model.eval(),
            tokenizer,
            ids[:first],
            Sampling(max_new_tokens=50, temperature=0),
            Stops((4081,)),
        )
        assert line["answer"] == expected.text
        assert line["expected"] == tokenizer.decode(ids[first:], skip_special_tokens=True)
    page = render_run_report(run.parts.output_dir)
    assert f"Answers at step {run.state.global_step}" in page


def test_the_same_random_numbers_each_time(trainer):
    run = trainer(tiny_model(), rows(12), rows(4, seed=3), generate_samples=True, learning_rate=1e-12, **KEYS)
    train(run, run.cfg)
    answers = {}
    for line in samples(run):
        answers.setdefault(line["row"], set()).add(line["answer"])
    assert all(len(each) == 1 for each in answers.values())


@given(st.lists(st.tuples(st.integers(5, 100), st.booleans()), min_size=1, max_size=30), st.floats(0, 1))
def test_a_row_is_parted_where_it_begins_to_be_trained(tokens, share):
    ids = np.array([i for i, _ in tokens])
    labels = np.array([i if trained else -100 for i, trained in tokens])
    prompt, expected = parted((ids, labels), share)
    assert prompt + expected == ids.tolist() and prompt
    if -100 in labels[:2] and (labels[:2] == -100).all() and (labels != -100).any():
        assert (labels[: len(prompt)] == -100).all() and labels[len(prompt)] != -100


def test_random_numbers_are_given_back():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with undisturbed():
        random.random(), np.random.rand(), torch.rand(3), torch.manual_seed(7)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
