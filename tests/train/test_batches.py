"""Batches over epochs and ranks: nothing is lost, and one step sees the same rows whatever the number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from axolotl.config.data import DataSection
from axolotl.config.train import TrainSection
from axolotl.data.packing import single_rows
from axolotl.model.attention import PACKED, AttentionChoice
from axolotl.train.batches import EpochBatches, build_batches
from train.miniature import rows

JOINED, APART = AttentionChoice(PACKED, "test", joined=True), AttentionChoice("sdpa", "test")


def sampler(count: int, rank: int = 0, ranks: int = 1, **options) -> EpochBatches:
    lengths = np.ones(count, dtype=int)
    return EpochBatches(
        lambda epoch: single_rows(lengths, seed=0, epoch=epoch), rank=rank, ranks=ranks, **options
    )


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_a_step_sees_the_same_rows_on_any_number_of_ranks(ranks, accumulation):
    parts = [list(sampler(37, r, ranks, bins_per_batch=2)) for r in range(ranks)]
    assert len({len(p) for p in parts}) == 1
    steps = []
    for start in range(0, len(parts[0]), accumulation):
        seen = [
            i
            for part in parts
            for batch in part[start : start + accumulation]
            for bin_ in batch
            for i in bin_
        ]
        steps.append(sorted(seen))
    reference = list(sampler(37, bins_per_batch=2))
    whole = [
        sorted(i for b in reference[s : s + 4] for bin_ in b for i in bin_)
        for s in range(0, len(reference), 4)
    ]
    assert steps == whole
    assert sorted(i for step in steps for i in step) == list(range(37))


def test_epochs_differ_and_come_back():
    order = sampler(20)
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    order.set_epoch(0)
    assert first == list(order) != second


def test_drop_last():
    assert len(sampler(10, bins_per_batch=4, drop_last=True)) == 2
    assert len(sampler(10, bins_per_batch=4)) == 3
    assert [len(b) for b in sampler(10, bins_per_batch=4)] == [4, 4, 2]


def source(attention=JOINED, count=30, evaluation=False, train=None, **keys):
    data = DataSection.model_validate({"sequence_len": 64} | keys)
    section = TrainSection.model_validate({"micro_batch_size": 2, "seed": 1} | (train or {}))
    return build_batches(
        rows(count), data, section, attention, pad_token_id=0, evaluation=evaluation
    ), section


def shapes(built, section, **options):
    return [tuple(b["input_ids"].shape) for b in built.loader(section, **options)]


def test_joined_rows_fill_micro_batch_size_times_sequence_len():
    built, section = source(sample_packing=True, pad_to_sequence_len=True)
    assert set(shapes(built, section)) == {(1, 128)}
    assert built.plan_of(0).capacity == 128


def test_rows_that_stay_apart_are_sequence_len_long():
    built, section = source(APART, sample_packing=True, pad_to_sequence_len=True)
    found = shapes(built, section)
    assert set(found[:-1]) == {(2, 64)}
    assert found[-1] in ((2, 64), (1, 64))


def test_without_packing_rows_are_padded_to_the_longest_or_as_asked():
    lengths = np.sort(source()[0].rows.lengths)
    assert max(t for _, t in shapes(*source())) == lengths[-1]
    assert {t for _, t in shapes(*source(pad_to_sequence_len=True))} == {64}
    assert all(t % 16 == 0 for _, t in shapes(*source(pad_to_multiple_of=16)))


def test_flattening_joins_the_rows_of_a_batch_without_padding():
    built, section = source(batch_flattening=True)
    batches = list(built.loader(section))
    assert len(batches) == 15
    assert all(
        b["input_ids"].shape == (1, b["token_counts"][0]) and len(b["cu_seq_lens_q"]) == 3 for b in batches
    )


def test_curriculum_keeps_the_order_of_the_data():
    built, _ = source(curriculum_sampling=True)
    assert built.plan_of(0).rows.tolist() == built.plan_of(3).rows.tolist() == list(range(30))
    packed, _ = source(curriculum_sampling=True, sample_packing=True)
    assert packed.plan_of(2).rows.tolist() == list(range(30))


def test_evaluation_keeps_the_order_and_its_own_batch_size():
    built, section = source(evaluation=True, train={"eval_batch_size": 5})
    assert built.plan_of(0).rows.tolist() == list(range(30))
    assert len(list(built.loader(section, evaluation=True))) == 6
    apart, _ = source(evaluation=True, sample_packing=True, eval_sample_packing=False)
    assert apart.plan_of(0).capacity is None
    packed, _ = source(evaluation=True, sample_packing=True)
    assert packed.plan_of(0).digest() == packed.plan_of(1).digest()


def test_the_limit_on_rows_counts_only_where_the_user_wrote_it():
    assert max(len(b) for b in source(sample_packing=True)[0].plan_of(0).bins()) > 1
    built, _ = source(sample_packing=True, sample_packing_bin_size=1)
    assert len(built.plan_of(0)) == 30


def test_a_digest_sees_order_lengths_and_content():
    same = source()[0].digest()
    assert same == source()[0].digest()
    others = [
        source(train={"seed": 2})[0].digest(),
        source(count=29)[0].digest(),
        source(train={"micro_batch_size": 3})[0].digest(),
        source(sample_packing=True)[0].digest(),
    ]
    assert len({same, *others}) == 5
