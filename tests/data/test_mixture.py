"""Order, split and mixture of the prepared rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from axolotl.config.data import DataSection
from axolotl.data.mixture import mix, shard, split
from axolotl.errors import DataError


def section(**values: Any) -> DataSection:
    return DataSection.model_validate(values)


def owners(*sizes: int) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 2),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.5, 2.0]),
)
def test_every_row_is_on_exactly_one_side(
    sizes: list[int], seed: int, merged: bool, before: bool, curriculum: bool, val: float
) -> None:
    data = section(
        shuffle_merged_datasets=merged,
        shuffle_before_merging_datasets=before,
        curriculum_sampling=curriculum,
        val_set_size=val,
    )
    mixture = mix(owners(*sizes), data, seed)
    assert sorted([*mixture.train, *mixture.held_out]) == list(range(sum(sizes)))
    again = mix(owners(*sizes), data, seed)
    assert (mixture.train == again.train).all()
    if curriculum and not before:
        assert mixture.train.tolist() == list(range(len(mixture.train)))


def test_the_order_is_the_one_that_datasets_gives() -> None:
    """Users compare runs with earlier ones: the same seed gives the same order as `Dataset.shuffle`."""
    rows = Dataset.from_dict({"i": list(range(50))}).shuffle(seed=7)
    assert mix(owners(50), section(), 7).train.tolist() == rows["i"][:]
    held_out = rows.train_test_split(test_size=0.13, shuffle=False)
    mixture = mix(owners(50), section(val_set_size=0.13), 7)
    assert mixture.train.tolist() == held_out["train"]["i"][:]
    assert mixture.held_out.tolist() == held_out["test"]["i"][:]


def test_each_dataset_is_shuffled_before_merging() -> None:
    data = section(shuffle_merged_datasets=False, shuffle_before_merging_datasets=True)
    order = mix(owners(20, 30), data, 3).train
    assert set(order[:20]) == set(range(20))
    assert order.tolist() != list(range(50))


def test_one_dataset_alone_is_not_shuffled_before_merging() -> None:
    data = section(shuffle_merged_datasets=False, shuffle_before_merging_datasets=True)
    assert mix(owners(20), data, 3).train.tolist() == list(range(20))


@pytest.mark.parametrize(("size", "held_out"), [(0.0, 0), (0.25, 3), (0.01, 1), (2.0, 2), (11.0, 11)])
def test_held_out_rows_are_the_tail(size: float, held_out: int) -> None:
    train, tail = split(np.arange(12), size)
    assert tail.tolist() == list(range(12 - held_out, 12))
    assert train.tolist() == list(range(12 - held_out))


@pytest.mark.parametrize("size", [1.0, 12.0, 500.0])
def test_a_split_that_leaves_nothing_is_an_error(size: float) -> None:
    with pytest.raises(DataError, match="val_set_size"):
        split(np.arange(12), size)


def test_shards_cover_the_rows_once() -> None:
    rows = np.arange(11)
    parts = [shard(rows, 3, i) for i in range(3)]
    assert np.concatenate(parts).tolist() == rows.tolist()
    assert [len(p) for p in parts] == [4, 4, 3]
    with pytest.raises(DataError, match="dataset_shard_idx"):
        shard(rows, 3, 3)


def test_weights_repeat_and_thin_out_training_rows_only() -> None:
    mixture = mix(owners(10, 10), section(val_set_size=0.2), 1, weights=[2.5, 0.5])
    of_first = mixture.train[mixture.train < 10]
    of_second = mixture.train[mixture.train >= 10]
    plain = mix(owners(10, 10), section(val_set_size=0.2), 1)
    assert mixture.held_out.tolist() == plain.held_out.tolist()
    firsts, seconds = (plain.train < 10).sum(), (plain.train >= 10).sum()
    assert len(of_first) == 2 * firsts + round(0.5 * firsts)
    assert len(of_second) == round(0.5 * seconds)
    assert np.unique(of_first, return_counts=True)[1].min() == 2
    assert len(set(of_second.tolist())) == len(of_second)
    assert not set(mixture.train.tolist()) & set(mixture.held_out.tolist())
