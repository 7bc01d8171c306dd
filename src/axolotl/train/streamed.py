"""Batches of streamed rows: packed buffer by buffer, numbered from 0, the same in every run however often it is resumed."""

from __future__ import annotations

import hashlib
import json
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from axolotl.config.data import DataSection
from axolotl.config.train import TrainSection
from axolotl.data.collate import PackedCollator, PaddedCollator, Row
from axolotl.data.packing import Plan, Volume, pack, single_rows
from axolotl.data.stream import Buffer, Position, Reading, Stream
from axolotl.errors import ConfigError
from axolotl.model.attention import AttentionChoice
from axolotl.train.batches import Collator

PLACE = "stream.json"
"""Name of the file in a checkpoint that says where the stream is read on."""


@dataclass(frozen=True)
class Place:
    """Where a buffer begins: its number, that of its first batch, and how far the datasets were read before it."""

    buffer: int
    batch: int
    position: Position

    @classmethod
    def read(cls, file: Path) -> Place | None:
        """The place in a file; None where it is missing or damaged."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            position = tuple(Reading(**reading) for reading in values["position"])
            return cls(int(values["buffer"]), int(values["batch"]), position)
        except (OSError, ValueError, TypeError, KeyError):
            return None


@dataclass(frozen=True, eq=False)
class Packed:
    """A buffer with its plan."""

    place: Place
    rows: Buffer
    plan: Plan
    batches: int


PlanOf = Callable[[np.ndarray, int], Plan]
"""(lengths, number of the buffer) → which rows share a packed row, and their order."""


class StreamedRows(Dataset[Any]):
    """`rows.__getitems__([n])` gives the bins of batch n. Made to be read forwards; going back reads again.

    `apart`: the documents of a bin stay documents. Otherwise they are joined, and see each other.
    """

    def __init__(self, stream: Stream, plan_of: PlanOf, bins_per_batch: int, apart: bool) -> None:
        self.stream, self.plan_of, self.bins_per_batch, self.apart = stream, plan_of, bins_per_batch, apart
        self._places = [Place(0, 0, stream.beginning())]
        self._ahead: _Ahead | None = None
        self._now: Packed | None = None

    def go_to(self, place: Place) -> None:
        """Makes known where a later buffer begins, so that what comes before need not be read."""
        self._places.append(place)

    def place_of(self, batch: int) -> Place:
        """Where the buffer of a batch begins, or the last known one before it."""
        return max((p for p in self._places if p.batch <= batch), key=lambda p: p.batch)

    def __getitems__(self, batches: Sequence[int]) -> list[list[Row]]:
        return [bin_ for n in batches for bin_ in self._batch(n)]

    def _batch(self, n: int) -> list[list[Row]]:
        now = self._now
        if now is None or n < now.place.batch:
            now = self._open(self.place_of(n))
        while n >= now.place.batch + now.batches:
            now = self._next()
        first = (n - now.place.batch) * self.bins_per_batch
        bins = range(first, min(first + self.bins_per_batch, len(now.plan)))
        ends = np.cumsum(now.rows.lengths)
        return [
            self._bin(now, [(int(ends[r] - now.rows.lengths[r]), int(ends[r])) for r in now.plan[b]])
            for b in bins
        ]

    def _bin(self, now: Packed, spans: list[tuple[int, int]]) -> list[Row]:
        rows = [(now.rows.ids[a:b], now.rows.labels[a:b]) for a, b in spans]
        if self.apart:
            return rows
        return [(np.concatenate([ids for ids, _ in rows]), np.concatenate([labels for _, labels in rows]))]

    def _open(self, place: Place) -> Packed:
        self.close()
        self._ahead = _Ahead(lambda: self._packed(place))
        return self._next()

    def _next(self) -> Packed:
        assert self._ahead
        self._now = self._ahead.next()
        # A checkpoint asks for the buffer in use or one of the few before it.
        self._places = [self._places[0], *self._places[1:][-50:], self._now.place]
        return self._now

    def _packed(self, place: Place) -> Iterator[Packed]:
        number, batch = place.buffer, place.batch
        for rows in self.stream.buffers(place.position):
            plan = self.plan_of(rows.lengths, number)
            batches = math.ceil(len(plan) / self.bins_per_batch)
            yield Packed(Place(number, batch, rows.start), rows, plan, batches)
            number, batch = number + 1, batch + batches

    def close(self) -> None:
        """Stops reading ahead."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = self._now = None


class _Ahead:
    """Runs an iterator in a thread of its own, one item ahead of whoever takes them."""

    def __init__(self, make: Callable[[], Iterator[Packed]]) -> None:
        self._items: queue.Queue[Packed | BaseException] = queue.Queue(1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[], Iterator[Packed]]) -> None:
        items = make()
        try:
            for item in items:
                if not self._put(item):
                    break
        except BaseException as error:
            self._put(error)
        finally:
            items.close()  # type: ignore[attr-defined]

    def _put(self, item: Packed | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._items.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def next(self) -> Packed:
        """The next item; raises what the iterator raised."""
        item = self._items.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class Numbers(Sampler[list[int]]):
    """Batch sampler of one rank: rank r of n takes batches r, r+n, r+2n, ... of the stream."""

    def __init__(self, count: int, rank: int, ranks: int) -> None:
        self.count, self.rank, self.ranks = count, rank, ranks

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: a stream has no epochs, and its passes follow from the number of the batch."""

    def __len__(self) -> int:
        return self.count

    def bins_of(self, i: int) -> list[int]:
        """What the rows are asked for to get the i-th batch of this rank."""
        return [i * self.ranks + self.rank]

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(self.count):
            yield self.bins_of(i)


@dataclass(frozen=True)
class StreamSource:
    """What `BatchSource` is for prepared rows: streamed rows and all that makes batches of them."""

    rows: StreamedRows
    collator: Collator
    options: str
    """All that decides the batches beside the rows."""

    def volume(self, train: TrainSection, ranks: int = 1) -> Volume:
        """The run as one epoch of max_steps; tokens are not known beforehand and count as 0."""
        steps = _max_steps(train)
        return Volume(steps * train.gradient_accumulation_steps, steps, steps, 1.0, 0, 1.0)

    def digest(self) -> str:
        """A hash of what decides the rows and how they are batched; no row is read for it."""
        return hashlib.sha256(f"{self.rows.stream.digest()} {self.options}".encode()).hexdigest()[:16]

    def loader(
        self, train: TrainSection, rank: int = 0, ranks: int = 1, *, evaluation: bool = False
    ) -> DataLoader[Any]:
        """The data loader of one rank. Its rows are tokenised by processes of their own, so it has no workers."""
        pin = train.dataloader_pin_memory
        return DataLoader(
            self.rows,
            batch_sampler=Numbers(_max_steps(train) * train.gradient_accumulation_steps, rank, ranks),
            collate_fn=self.collator,
            pin_memory=torch.cuda.is_available() if pin is None else pin and torch.cuda.is_available(),
            # A generator of its own: iterating must not draw from the one that dropout draws from.
            generator=torch.Generator().manual_seed(0),
        )

    def place(self, batch: int) -> dict[str, str]:
        """File name → text: what a checkpoint keeps to find batch `batch` again."""
        return {PLACE: json.dumps(asdict(self.rows.place_of(batch))) + "\n"}

    def close(self) -> None:
        """Stops reading ahead."""
        self.rows.close()

    def go_to(self, checkpoint: Path) -> None:
        """Reads on from where a checkpoint says."""
        place = Place.read(checkpoint / PLACE)
        if place is not None and len(place.position) == len(self.rows.stream.tasks):
            self.rows.go_to(place)


def stream_batches(
    stream: Stream,
    data: DataSection,
    train: TrainSection,
    attention: AttentionChoice,
    *,
    pad_token_id: int,
    alignment: int | None = None,
) -> StreamSource:
    """Batches of a stream as the config asks for them; `alignment` as for `build_batches`."""
    seed = 42 if train.seed is None else train.seed
    micro, length = train.rows_at_once, data.sequence_len
    multiple = data.pad_to_multiple_of or alignment
    fill = length if data.pad_to_sequence_len else None
    in_order = data.curriculum_sampling or not data.shuffle_merged_datasets
    packs = data.sample_packing or data.pretraining_sample_concatenation
    apart = not data.pretraining_dataset or (data.sample_packing and data.pretrain_multipack_attn)
    joined = packs and apart and attention.joined
    capacity = length * micro if joined else length
    limit = data.sample_packing_bin_size if "sample_packing_bin_size" in data.model_fields_set else None

    def packed(lengths: np.ndarray, buffer: int) -> Plan:
        return pack(
            lengths,
            capacity,
            seed=seed,
            epoch=buffer,
            max_rows_per_bin=limit,
            sequential=data.sample_packing_sequentially,
            shuffle=not in_order,
        )

    def single(lengths: np.ndarray, buffer: int) -> Plan:
        order = "sequential" if in_order else "by_length" if data.group_by_length else "shuffled"
        return single_rows(lengths, seed=seed, epoch=buffer, order=order, batch_size=micro)  # type: ignore[arg-type]

    collator: Collator = PaddedCollator(pad_token_id, fill, multiple)
    if packs and apart:
        full = capacity if data.pad_to_sequence_len else None
        collator = PackedCollator(pad_token_id, attention.joined, full, multiple)
    per_batch = 1 if joined else micro
    rows = StreamedRows(stream, packed if packs else single, per_batch, apart or not packs)
    options = (
        f"{seed} {capacity} {per_batch} {packs} {apart} {in_order} {limit} {data.sample_packing_sequentially}"
    )
    return StreamSource(rows, collator, f"{options} {data.group_by_length}")


def _max_steps(train: TrainSection) -> int:
    if not train.max_steps:
        raise ConfigError("a stream has no end: it needs `max_steps`.", "Set `max_steps`.")
    return train.max_steps
