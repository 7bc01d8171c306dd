"""Which rows go into which batch: a plan, computed from row lengths before training starts.

A plan is a pure function of the lengths, the seed and the epoch, so a run knows its number of steps beforehand, and a
resumed run finds the same batches again. Only numpy is used here.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

import numpy as np

from axolotl.errors import DataError

Order = Literal["shuffled", "sequential", "by_length"]
MEGABATCH = (
    50  # batches among which `by_length` sorts: wide enough to pad little, narrow enough to stay random
)


@dataclass(frozen=True, eq=False)
class Plan:
    """The bins of one epoch in the order of training; a bin is the list of rows that share one packed row.

    `rows` holds row numbers, bin after bin; bin i is `rows[offsets[i]:offsets[i + 1]]`.
    """

    rows: np.ndarray
    offsets: np.ndarray
    tokens: int
    """Tokens of all rows, padding not counted."""
    capacity: int | None = None
    """Tokens that fit in a bin; None where each bin is a single row."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> list[int]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return self.rows[self.offsets[i] : self.offsets[i + 1]].tolist()

    def bins(self) -> list[list[int]]:
        """All bins as lists of row numbers."""
        return [self[i] for i in range(len(self))]

    @property
    def efficiency(self) -> float:
        """Share of the bins' room that holds tokens; 1.0 for bins of single rows, which have no fixed room."""
        room = len(self) * (self.capacity or 0)
        return self.tokens / room if room else 1.0

    def digest(self) -> str:
        """A hash of the plan: equal digests mean the same rows in the same batches."""
        sha = hashlib.sha256()
        for array in (self.rows, self.offsets):
            sha.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        return sha.hexdigest()[:16]


def pack(
    lengths: np.ndarray,
    capacity: int,
    *,
    seed: int,
    epoch: int = 0,
    max_rows_per_bin: int | None = None,
    sequential: bool = False,
    shuffle: bool = True,
) -> Plan:
    """Puts rows of `lengths` tokens into bins of at most `capacity` tokens. Every row lands in exactly one bin.

    The usual way fills one bin after the other with the longest row that still fits (best fit decreasing). Which of
    several rows of one length is taken, and the order of the bins, is drawn anew for each epoch; the number of bins
    is the same in every epoch. `sequential` keeps neighbours together: rows are taken in one order (drawn once per
    run, or the rows' own order without `shuffle`) and a bin ends where the next row does not fit.
    `shuffle=False` also keeps the order of the bins.

    Raises DataError for rows that are empty or longer than `capacity`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    _check(lengths, capacity)
    composition = np.random.default_rng([seed, 0])
    draw = np.random.default_rng([seed, 1, epoch])
    limit = max_rows_per_bin or len(lengths) or 1
    if sequential or not shuffle:
        rows = composition.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
        offsets = _next_fit(lengths[rows], capacity, limit)
    else:
        by_length = np.lexsort((draw.random(len(lengths)), lengths))
        slots, offsets = _best_fit(lengths[by_length], capacity, limit)
        rows = by_length[slots]
    if shuffle:
        rows, offsets = _reorder(rows, offsets, draw.permutation(len(offsets) - 1))
    return Plan(rows, offsets, int(lengths.sum()), capacity)


def single_rows(
    lengths: np.ndarray, *, seed: int, epoch: int = 0, order: Order = "shuffled", batch_size: int = 1
) -> Plan:
    """Bins of one row each: the plan without packing.

    `by_length` brings rows of similar length together in batches of `batch_size` rows, the longest batch first so
    that a memory shortage shows at once.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    _check(lengths, None)
    count = len(lengths)
    draw = np.random.default_rng([seed, 1, epoch])
    if order == "sequential":
        rows = np.arange(count)
    elif order == "shuffled":
        rows = draw.permutation(count)
    else:
        rows = _by_length(lengths, draw, batch_size)
    return Plan(rows, np.arange(count + 1), int(lengths.sum()))


@dataclass(frozen=True)
class Volume:
    """How much work a run is, known exactly before it starts."""

    batches_per_epoch: int
    """Forward passes of one rank in one epoch."""
    steps_per_epoch: int
    total_steps: int
    epochs: float
    """Epochs that `total_steps` go through; not always whole."""
    tokens_per_epoch: int
    efficiency: float
    """Share of packed rows that is not padding."""


def plan_epochs(
    plan: Plan,
    *,
    bins_per_batch: int = 1,
    gradient_accumulation_steps: int = 1,
    ranks: int = 1,
    num_epochs: float = 1.0,
    max_steps: int | None = None,
    drop_last: bool = False,
) -> Volume:
    """How many steps a run takes whose every epoch has as many bins as `plan`. Raises DataError where there is none."""
    per_round = bins_per_batch * ranks
    batches = len(plan) // per_round if drop_last else math.ceil(len(plan) / per_round)
    if not batches:
        raise DataError(
            "There is nothing to train on: the data fills no batch.",
            "Add rows, or set `dataloader_drop_last: false` or a smaller micro_batch_size."
            if len(plan)
            else "Add rows, or check which rows were dropped in preparation.",
        )
    steps = math.ceil(batches / gradient_accumulation_steps)
    # A product such as 3 * 0.1 * 10 must not become one step more through binary rounding.
    total = max_steps if max_steps is not None else max(1, math.ceil(round(num_epochs * steps, 6)))
    return Volume(batches, steps, total, total / steps, plan.tokens, plan.efficiency)


def _check(lengths: np.ndarray, capacity: int | None) -> None:
    if len(lengths) and lengths.min() <= 0:
        raise DataError(
            f"{int((lengths <= 0).sum())} rows of the prepared data have no tokens.",
            "Prepare the data again with `axolotl preprocess`.",
        )
    if capacity is not None and len(lengths) and lengths.max() > capacity:
        raise DataError(
            f"{int((lengths > capacity).sum())} rows have more than the {capacity} tokens that a packed row holds.",
            "Raise `sequence_len`, or prepare the data again so that long rows are dropped or cut.",
        )


def _best_fit(lengths: np.ndarray, capacity: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Bins over the positions of ascending `lengths`: (positions bin after bin, offsets)."""
    distinct, first, counts = np.unique(lengths, return_index=True, return_counts=True)
    available: list[int] = distinct.tolist()  # lengths of which rows are left, ascending
    next_row: list[int] = first.tolist()
    left: list[int] = counts.tolist()
    slots: list[int] = []
    offsets = [0]
    place = slots.append
    while available:
        room, rows = capacity, 0
        i = len(available) - 1
        while True:
            take = min(left[i], room // available[i], limit - rows)
            start = next_row[i]
            if take == 1:
                place(start)
            else:
                slots.extend(range(start, start + take))
            room -= take * available[i]
            rows += take
            if left[i] == take:
                del available[i], next_row[i], left[i]
            else:
                next_row[i] = start + take
                left[i] -= take
            if rows >= limit:
                break
            i = bisect_right(available, room) - 1
            if i < 0:
                break
        offsets.append(len(slots))
    return np.asarray(slots, dtype=np.int64), np.asarray(offsets, dtype=np.int64)


def _next_fit(lengths: np.ndarray, capacity: int, limit: int) -> np.ndarray:
    """Offsets of bins over rows taken in the order given."""
    ends = np.cumsum(lengths)
    offsets = [0]
    while offsets[-1] < len(lengths):
        start = offsets[-1]
        before = int(ends[start - 1]) if start else 0
        offsets.append(min(int(np.searchsorted(ends, before + capacity, side="right")), start + limit))
    return np.asarray(offsets, dtype=np.int64)


def _reorder(rows: np.ndarray, offsets: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same bins in another order."""
    sizes = np.diff(offsets)[order]
    new_offsets = np.concatenate([[0], np.cumsum(sizes)])
    source = np.repeat(offsets[:-1][order] - new_offsets[:-1], sizes) + np.arange(len(rows))
    return rows[source], new_offsets


def _by_length(lengths: np.ndarray, draw: np.random.Generator, batch_size: int) -> np.ndarray:
    rows = draw.permutation(len(lengths))
    span = batch_size * MEGABATCH
    pieces = []
    for start in range(0, len(rows), span):
        piece = rows[start : start + span]
        pieces.append(piece[np.argsort(-lengths[piece], kind="stable")])
    rows = np.concatenate(pieces) if pieces else rows
    full = len(rows) // batch_size * batch_size
    batches = rows[:full].reshape(-1, batch_size)
    if not len(batches):
        return rows
    batches = batches[draw.permutation(len(batches))]
    longest = int(lengths[batches].max(axis=1).argmax())
    batches[[0, longest]] = batches[[longest, 0]]
    return np.concatenate([batches.reshape(-1), rows[full:]])
