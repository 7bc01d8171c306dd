"""Plans: every row in exactly one bin, no bin too full, the same plan for the same seed, and hardly any padding."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.data.packing import pack, plan_epochs, single_rows
from axolotl.errors import DataError

lengths_and_capacity = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=80), st.just(capacity))
)


@settings(deadline=None)
@given(
    lengths_and_capacity,
    st.integers(0, 5),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 4)),
)
def test_every_row_lands_in_exactly_one_bin(case, seed, epoch, sequential, shuffle, limit):
    lengths, capacity = case
    plan = pack(
        np.array(lengths, dtype=int),
        capacity,
        seed=seed,
        epoch=epoch,
        sequential=sequential,
        shuffle=shuffle,
        max_rows_per_bin=limit,
    )
    bins = plan.bins()
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(b for b in bins)
    assert all(sum(lengths[i] for i in b) <= capacity for b in bins)
    assert all(len(b) <= (limit or len(lengths)) for b in bins)
    assert plan.tokens == sum(lengths)


@settings(deadline=None)
@given(lengths_and_capacity, st.booleans())
def test_epochs_have_the_same_number_of_bins(case, sequential):
    lengths, capacity = case
    counts = {
        len(pack(np.array(lengths, dtype=int), capacity, seed=3, epoch=e, sequential=sequential))
        for e in range(4)
    }
    assert len(counts) == 1


def chat_lengths(count: int, longest: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).lognormal(6.0, 0.8, count)
    return np.clip(drawn, 8, longest).astype(np.int64)


@pytest.mark.parametrize("capacity", [2048, 4096, 16384])
def test_little_padding_on_chat_lengths(capacity):
    plan = pack(chat_lengths(20_000, 2048), capacity, seed=0)
    assert plan.efficiency > 0.98


def test_a_million_rows_in_a_few_seconds():
    lengths = chat_lengths(1_000_000, 4096)
    started = time.perf_counter()
    plan = pack(lengths, 4096, seed=0)
    assert time.perf_counter() - started < 8
    assert plan.efficiency > 0.999
    assert len(plan.rows) == len(lengths)


def test_the_plan_is_a_function_of_seed_and_epoch():
    lengths = chat_lengths(500, 512)
    first = pack(lengths, 1024, seed=7, epoch=1)
    assert first.digest() == pack(lengths.copy(), 1024, seed=7, epoch=1).digest()
    others = [pack(lengths, 1024, seed=7, epoch=2), pack(lengths, 1024, seed=8, epoch=1)]
    assert len({first.digest(), *(p.digest() for p in others)}) == 3


def test_without_shuffle_rows_and_bins_keep_their_order():
    lengths = np.array([4, 3, 3, 5, 1, 1, 9])
    plan = pack(lengths, 10, seed=0, shuffle=False)
    assert plan.bins() == [[0, 1, 2], [3, 4, 5], [6]]


def test_sequential_keeps_neighbours_of_the_drawn_order_together():
    lengths = np.full(40, 5)
    orders = [pack(lengths, 20, seed=1, epoch=e, sequential=True) for e in range(2)]
    assert {tuple(b) for b in orders[0].bins()} == {tuple(b) for b in orders[1].bins()}
    assert orders[0].bins() != orders[1].bins()


def test_bad_lengths_are_told_with_their_number():
    with pytest.raises(DataError, match="2 rows"):
        pack(np.array([5, 30, 31]), 20, seed=0)
    with pytest.raises(DataError, match="1 rows"):
        pack(np.array([5, 0]), 20, seed=0)


def test_single_rows_shuffle_anew_each_epoch_and_drop_nothing():
    lengths = chat_lengths(101, 300)
    plans = [single_rows(lengths, seed=5, epoch=e) for e in range(3)]
    assert all(sorted(p.rows.tolist()) == list(range(101)) for p in plans)
    assert len({p.digest() for p in plans}) == 3
    assert single_rows(lengths, seed=5, order="sequential").rows.tolist() == list(range(101))


def test_by_length_groups_similar_rows_and_starts_with_the_longest():
    lengths = chat_lengths(400, 2000)
    plan = single_rows(lengths, seed=1, order="by_length", batch_size=4)
    batches = lengths[plan.rows].reshape(-1, 4)
    assert sorted(plan.rows.tolist()) == list(range(400))
    assert lengths[plan.rows[:4]].max() == lengths.max()
    random = lengths[single_rows(lengths, seed=1).rows].reshape(-1, 4)
    waste = [1 - b.sum() / (b.max(axis=1) * 4).sum() for b in (batches, random)]
    assert waste[0] < waste[1] / 4


def test_by_length_keeps_the_rows_of_an_uneven_end():
    plan = single_rows(np.arange(1, 12), seed=0, order="by_length", batch_size=4)
    assert sorted(plan.rows.tolist()) == list(range(11))
    assert sorted(single_rows(np.array([3, 1]), seed=0, order="by_length", batch_size=4).rows.tolist()) == [
        0,
        1,
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (10, 10, 10)),
        ({"gradient_accumulation_steps": 4}, (10, 3, 3)),
        ({"gradient_accumulation_steps": 4, "num_epochs": 2.0}, (10, 3, 6)),
        ({"num_epochs": 0.25}, (10, 10, 3)),
        ({"num_epochs": 0.3}, (10, 10, 3)),
        ({"max_steps": 7, "num_epochs": 9.0}, (10, 10, 7)),
        ({"bins_per_batch": 3}, (4, 4, 4)),
        ({"bins_per_batch": 3, "drop_last": True}, (3, 3, 3)),
        ({"bins_per_batch": 2, "ranks": 2}, (3, 3, 3)),
    ],
)
def test_the_number_of_steps_is_known(arguments, expected):
    volume = plan_epochs(single_rows(np.ones(10, dtype=int), seed=0), **arguments)
    assert (volume.batches_per_epoch, volume.steps_per_epoch, volume.total_steps) == expected


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(DataError, match="nothing to train on"):
        plan_epochs(single_rows(np.zeros(0, dtype=int), seed=0))
    with pytest.raises(DataError, match="nothing to train on"):
        plan_epochs(single_rows(np.ones(3, dtype=int), seed=0), bins_per_batch=4, drop_last=True)
