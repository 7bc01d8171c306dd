"""Which prepared rows are trained on and in which order, and which are held out: index plans, computed from the saved rows.

Rows on disk stay in the order of their sources. Shuffling, mixing and splitting choose row numbers, so that another seed
or split needs no new preparation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from axolotl.errors import DataError, Problem

if TYPE_CHECKING:
    from axolotl.config.data import DataSection


class Mixture(NamedTuple):
    """Row numbers of the prepared train folder, each in its order."""

    train: np.ndarray  # int64
    held_out: np.ndarray  # int64, what val_set_size keeps for evaluation


def mix(
    datasets: np.ndarray, data: DataSection, seed: int, weights: Sequence[float] | None = None
) -> Mixture:
    """Orders and splits rows; `datasets` (int, K) names the dataset of each saved row, and is not decreasing.

    The held-out rows are the tail of the merged order. A dataset of weight w appears w times in the training rows:
    whole copies, and for the fraction a random choice of its rows. Raises DataError where a split leaves a side empty.
    """
    order = merge_order(datasets, data, seed)
    if data.dataset_shard_num:
        order = shard(order, data.dataset_shard_num, data.dataset_shard_idx or 0)
    train, held_out = split(order, data.val_set_size)
    if weights and any(w != 1 for w in weights):
        train = _weighted(train, datasets, weights, seed)
        if _shuffles_merged(data):
            train = np.random.default_rng(seed).permutation(train)
    return Mixture(train, held_out)


def _shuffles_merged(data: DataSection) -> bool:
    return data.shuffle_merged_datasets and not data.curriculum_sampling


def merge_order(datasets: np.ndarray, data: DataSection, seed: int) -> np.ndarray:
    """All rows, merged: dataset after dataset, each shuffled first if asked, and all shuffled unless told not to."""
    order = np.arange(len(datasets), dtype=np.int64)
    if data.shuffle_before_merging_datasets and len(np.unique(datasets)) > 1:
        ends = np.flatnonzero(np.diff(datasets)) + 1
        order = np.concatenate([_permuted(block, seed) for block in np.split(order, ends)])
    return _permuted(order, seed) if _shuffles_merged(data) else order


def _permuted(rows: np.ndarray, seed: int) -> np.ndarray:
    return rows[np.random.default_rng(seed).permutation(len(rows))]


def shard(rows: np.ndarray, count: int, index: int) -> np.ndarray:
    """Part `index` of `count` parts that follow each other; the first ones are longer by one where it does not divide."""
    if index >= count:
        raise DataError(
            f"`dataset_shard_idx` is {index}, but there are {count} shards, counted from 0.",
            f"Use a number from 0 to {count - 1}.",
        )
    return np.array_split(rows, count)[index]


def split(rows: np.ndarray, val_set_size: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows without their tail, and the tail: up to 1 a share (rounded up), above that a number of rows."""
    count = held_out(len(rows), val_set_size)
    return rows[: len(rows) - count], rows[len(rows) - count :]


def held_out(rows: int, val_set_size: float) -> int:
    """How many of `rows` rows are held out. Raises DataError where none would be left."""
    if not val_set_size:
        return 0
    count = int(val_set_size) if val_set_size > 1 else math.ceil(val_set_size * rows)
    if count >= rows:
        message = f"`val_set_size` {int(val_set_size) if val_set_size > 1 else val_set_size:,} would hold out {count:,} of {rows:,} rows"
        raise DataError(
            Problem(
                f"{message} and leave nothing to train on.",
                "Choose a smaller one: up to 1 it is a share of the rows, above 1 a number of rows.",
                "data",
                ("val_set_size",),
            )
        )
    return count


def _weighted(rows: np.ndarray, datasets: np.ndarray, weights: Sequence[float], seed: int) -> np.ndarray:
    """Repeats or thins out rows by the weight of their dataset; copies of a row stand apart, one pass after another."""
    random = np.random.default_rng([seed, 1])
    passes: list[np.ndarray] = []
    for number in range(math.ceil(max(weights))):
        kept = []
        for dataset, weight in enumerate(weights):
            mine = np.flatnonzero(datasets[rows] == dataset)
            share = min(1.0, max(0.0, weight - number))
            if share < 1.0:
                mine = random.permutation(mine)[: round(share * len(mine))]
            kept.append(mine)
        passes.append(rows[np.sort(np.concatenate(kept))])
    return np.concatenate(passes)
