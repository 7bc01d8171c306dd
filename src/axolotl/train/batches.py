"""The batches of a run: which plan each epoch follows, and what of it a rank gets to see."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from axolotl.config.data import DataSection
from axolotl.config.train import TrainSection
from axolotl.data.collate import Batch, PackedCollator, PaddedCollator, Row
from axolotl.data.packing import Order, Plan, Volume, pack, plan_epochs, single_rows
from axolotl.model.attention import AttentionChoice
from axolotl.train.rows import TokenRows

SAMPLED = 512  # rows whose content goes into a digest
Collator = Callable[[Sequence[Sequence[Row]]], Batch]


class EpochBatches(Sampler[list[list[int]]]):
    """Batch sampler: yields the bins of each batch of one rank, as a pure function of the epoch.

    Rank r of n takes batches r, r+n, r+2n, ... of the epoch, so that one step sees the same rows whatever the number
    of ranks, as long as batch size times accumulation times ranks stays. Where the last round does not reach every
    rank, the others get a batch without rows, which the collator fills with padding.
    """

    def __init__(
        self,
        plan_of: Callable[[int], Plan],
        *,
        bins_per_batch: int = 1,
        rank: int = 0,
        ranks: int = 1,
        drop_last: bool = False,
    ) -> None:
        self.plan_of, self.bins_per_batch, self.rank, self.ranks = plan_of, bins_per_batch, rank, ranks
        self.drop_last = drop_last
        self.epoch = 0
        self._planned: tuple[int, Plan] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration follows."""
        self.epoch = epoch

    @property
    def plan(self) -> Plan:
        """The plan of the present epoch."""
        if self._planned is None or self._planned[0] != self.epoch:
            self._planned = (self.epoch, self.plan_of(self.epoch))
        return self._planned[1]

    def __len__(self) -> int:
        per_round = self.bins_per_batch * self.ranks
        return len(self.plan) // per_round if self.drop_last else math.ceil(len(self.plan) / per_round)

    def bins_of(self, i: int) -> list[list[int]]:
        """The bins of the i-th batch of this epoch on this rank."""
        plan, size = self.plan, self.bins_per_batch
        start = (i * self.ranks + self.rank) * size
        return [list(plan[j]) for j in range(start, min(start + size, len(plan)))]

    def __iter__(self) -> Iterator[list[list[int]]]:
        plan, size = self.plan, self.bins_per_batch
        for i in range(len(self)):
            start = (i * self.ranks + self.rank) * size
            yield [plan[j] for j in range(start, min(start + size, len(plan)))]


@dataclass(frozen=True)
class BatchSource:
    """All that makes batches from a dataset: its rows, the plan of each epoch, the collator."""

    rows: TokenRows
    plan_of: Callable[[int], Plan]
    collator: Collator
    bins_per_batch: int

    def volume(self, train: TrainSection, ranks: int = 1) -> Volume:
        """How many steps training on it takes."""
        return plan_epochs(
            self.plan_of(0),
            bins_per_batch=self.bins_per_batch,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            ranks=ranks,
            num_epochs=train.num_epochs,
            max_steps=train.max_steps,
            drop_last=bool(train.dataloader_drop_last),
        )

    def digest(self) -> str:
        """A hash of the first epoch: rows, their lengths, a sample of their tokens, and how they are batched."""
        sha = hashlib.sha256(self.plan_of(0).digest().encode())
        sha.update(np.ascontiguousarray(self.rows.lengths).tobytes())
        for i in range(0, len(self.rows), max(1, len(self.rows) // SAMPLED)):
            for part in self.rows.row(i):
                sha.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
        sha.update(f"{self.bins_per_batch}".encode())
        return sha.hexdigest()[:16]

    def place(self, batch: int) -> dict[str, str]:
        """Nothing has to be kept to find batch `batch` again: which rows come next follows from the step's number."""
        return {}

    def go_to(self, checkpoint: Path) -> None:
        """Does nothing, for the same reason."""

    def close(self) -> None:
        """Does nothing: the rows are mapped from disk."""

    def loader(
        self, train: TrainSection, rank: int = 0, ranks: int = 1, *, evaluation: bool = False
    ) -> DataLoader[Any]:
        """The data loader of one rank."""
        sampler = EpochBatches(
            self.plan_of,
            bins_per_batch=self.bins_per_batch,
            rank=rank,
            ranks=ranks,
            drop_last=bool(train.dataloader_drop_last) and not evaluation,
        )
        workers = train.dataloader_num_workers or 0
        pin = train.dataloader_pin_memory
        return DataLoader(
            self.rows,
            batch_sampler=sampler,
            collate_fn=self.collator,
            num_workers=workers,
            pin_memory=torch.cuda.is_available() if pin is None else pin and torch.cuda.is_available(),
            prefetch_factor=train.dataloader_prefetch_factor if workers else None,
            persistent_workers=False,
            # A generator of its own: iterating must not draw from the one that dropout draws from.
            generator=torch.Generator().manual_seed(0),
        )


def build_batches(
    dataset: datasets.Dataset,
    data: DataSection,
    train: TrainSection,
    attention: AttentionChoice,
    *,
    pad_token_id: int,
    evaluation: bool = False,
    alignment: int | None = None,
) -> BatchSource:
    """Batches as the config asks for them. `alignment` is the multiple that rows are padded to when nothing else says.

    Evaluation keeps the order of the rows where they are not packed.
    """
    rows = TokenRows(dataset)
    seed = train.seed if train.seed is not None else 42
    packing = data.sample_packing if not evaluation else _eval_packing(data)
    sequence_len = (data.eval_sequence_len if evaluation else None) or data.sequence_len
    micro = (train.eval_batch_size if evaluation else None) or train.rows_at_once
    multiple = data.pad_to_multiple_of or alignment
    if packing:
        capacity = sequence_len * micro if attention.joined else sequence_len
        limit = data.sample_packing_bin_size if "sample_packing_bin_size" in data.model_fields_set else None

        @lru_cache(maxsize=2)
        def packed(epoch: int) -> Plan:
            return pack(
                rows.lengths,
                capacity,
                seed=seed,
                epoch=0 if evaluation else epoch,
                max_rows_per_bin=limit,
                sequential=data.sample_packing_sequentially and not evaluation,
                shuffle=evaluation or not data.curriculum_sampling,
            )

        fill = capacity if data.pad_to_sequence_len else None
        collator = PackedCollator(pad_token_id, attention.joined, fill, multiple)
        return BatchSource(rows, packed, collator, 1 if attention.joined else micro)

    order: Order = "shuffled"
    if evaluation or data.curriculum_sampling:
        order = "sequential"
    elif data.group_by_length:
        order = "by_length"

    @lru_cache(maxsize=2)
    def single(epoch: int) -> Plan:
        return single_rows(rows.lengths, seed=seed, epoch=epoch, order=order, batch_size=micro)

    if data.batch_flattening and attention.joined:
        return BatchSource(rows, single, PackedCollator(pad_token_id, True, None, multiple), micro)
    fill = sequence_len if data.pad_to_sequence_len else None
    return BatchSource(rows, single, PaddedCollator(pad_token_id, fill, multiple), micro)


def _eval_packing(data: DataSection) -> bool:
    return data.sample_packing if data.eval_sample_packing is None else data.eval_sample_packing
