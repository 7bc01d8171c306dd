"""Rows that are read and tokenised while training goes on: `pretraining_dataset`, and `streaming: true`.

The rows come in buffers, cut at the same rows in every run: buffer by buffer, what training sees is a pure function of
the data and the options, and a run that is resumed reads on from where a buffer begins, without what came before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl.config.datasets import DatasetEntry
from axolotl.console import note, warn
from axolotl.data import cache
from axolotl.data.dropped import check_dropped, nothing_left
from axolotl.data.filters import FilteredRows
from axolotl.data.formats.watch import Watch
from axolotl.data.ledger import Counts, DatasetSummary, summary_lines
from axolotl.data.prepare import MOST_FAILURES, tell_unseen
from axolotl.data.sources import FileSource, Source
from axolotl.data.tasks import Task, open_tasks
from axolotl.data.work import Row, row_problem
from axolotl.data.workers import Engine
from axolotl.errors import DataError, Place, Problem

if TYPE_CHECKING:
    from axolotl.config.data import DataSection

CHUNK_ROWS = 256
"""Input rows that are rendered together, at most."""
TOKENS_PER_BUFFER = 1 << 24
"""Tokens after which a buffer ends however few rows it has, so that long texts do not fill the memory."""
_FEW_ROWS = 1000
"""Rows before which the share of dropped rows says nothing."""
_MANY_LENGTHS = 10_000
"""Rows whose lengths are told where none is left."""


@dataclass(frozen=True)
class Reading:
    """How far one dataset has been read."""

    passes: int
    """Times that it was read to its end."""
    row: int
    """Rows read of the present pass, those that `skip` leaves out included."""
    served: int
    """Rows read in all passes."""


Position = tuple[Reading, ...]
"""How far each dataset has been read."""


@dataclass(frozen=True, eq=False)
class Buffer:
    """Rows that are shuffled and packed together; `ids` and `labels` hold the K rows of `lengths` end to end."""

    start: Position
    lengths: np.ndarray  # int64, K
    ids: np.ndarray  # int32
    labels: np.ndarray  # int32


def streams(data: DataSection) -> bool:
    """Whether the training rows are streamed."""
    return bool(data.pretraining_dataset) or data.streaming


def streamed_entries(data: DataSection) -> list[tuple[str, DatasetEntry, int]]:
    """What is streamed: place in the config, entry, and rows to leave out at the beginning."""
    if not data.pretraining_dataset:
        return [(f"datasets[{i}]", entry, 0) for i, entry in enumerate(data.datasets)]
    found = []
    for i, entry in enumerate(data.pretraining_dataset):
        values = entry.model_dump(exclude_unset=True, exclude={"text_column", "skip", "type"})
        plain = entry.type in ("pretrain", "completion")
        kind = {"type": "completion", "field": entry.text_column} if plain else {"type": entry.type}
        found.append(
            (f"pretraining_dataset[{i}]", DatasetEntry.model_validate(values | kind), entry.skip or 0)
        )
    return found


def without_streams(data: DataSection) -> DataSection:
    """The same section with what is prepared on disk only: the evaluation data."""
    return data.model_copy(update={"datasets": [], "pretraining_dataset": [], "streaming": False})


def open_stream(
    data: DataSection,
    tokenizer: Any,
    *,
    seed: int = 42,
    places: Callable[[str], Place] | None = None,
    workers: int = 1,
) -> Stream:
    """Opens what is streamed. Nothing is read yet beyond what tells the columns.

    Raises DataError or ConfigError for datasets that are not there or do not fit their options.
    """
    entries = streamed_entries(data)
    trained = data.model_copy(update={"datasets": [e for _, e, _ in entries], "test_datasets": []})
    find = places or (lambda key: Place(key))
    kind = "pretraining_dataset" if data.pretraining_dataset else "datasets"
    tasks = open_tasks(
        trained, tokenizer, lambda key: find(key.replace("datasets[", f"{kind}[", 1)), seed, endless=True
    )
    for task, (key, _, _) in zip(tasks, entries, strict=True):
        task.key = key
    return Stream(data, tasks, [skip for _, _, skip in entries], cache.tokenizer_digest(tokenizer), workers)


class Stream:
    """The rows of one or several datasets without end, mixed by their size and `weight`. Each begins again at its end."""

    def __init__(
        self, data: DataSection, tasks: list[Task], skips: list[int], tokenizer: str, workers: int
    ) -> None:
        self.data, self.tasks, self.skips, self.workers = data, tasks, skips, workers
        self._tokenizer = tokenizer
        self.counts = [Counts() for _ in tasks]
        """What became of the rows read by this process."""
        self._lengths: list[int] = []  # of rows, as long as none of a dataset is left
        self._told: set[tuple[int, str]] = set()
        self._watches: dict[int, Watch | None] = {}
        self._shares = self._sizes()

    @property
    def name(self) -> str:
        return ", ".join(task.name for task in self.tasks)

    def beginning(self) -> Position:
        return tuple(Reading(0, skip, 0) for skip in self.skips)

    def _sizes(self) -> list[float]:
        """How many rows of each dataset are read for one of the others."""
        weights = [float(task.entry.weight or 1.0) for task in self.tasks]
        if len(self.tasks) == 1:
            return weights
        rows = [count_rows(task.source) for task in self.tasks]
        if all(rows):
            return [w * float(n or 1) for w, n in zip(weights, rows, strict=True)]
        note("not every dataset says how many rows it has: their `weight` alone decides how they are mixed.")
        return weights

    def digest(self) -> str:
        """A hash of what decides the rows: options, tokenizer, templates, names and sizes of the files.

        Contents are not read: a corpus may take hours to read once.
        """
        parts = {"tokenizer": self._tokenizer, **cache.option_parts(self.data)}
        parts |= cache.template_parts(self.data)
        for task, skip in zip(self.tasks, self.skips, strict=True):
            parts |= cache.entry_parts(task.entry, task.key)
            parts[f"skip of {task.key}"] = str(skip)
            parts |= {f"{k} of {task.key}": v for k, v in task.renderer.fingerprint_parts().items()}
            if isinstance(task.source, FileSource):
                parts |= {r.label: str(r.path.stat().st_size) for r in task.source.readers}
            else:
                parts |= task.source.fingerprint_parts()
        parts["buffer"] = str(self.data.streaming_multipack_buffer_size)
        return cache.fingerprint(parts)

    def buffers(self, start: Position) -> Iterator[Buffer]:
        """The buffers from a position on, without end; a buffer ends where a dataset does, so it holds no row twice.

        Raises DataError for rows that cannot be used, and where all rows of a pass are dropped.
        """
        engine = Engine([task.job for task in self.tasks], self.workers)
        ahead: deque[tuple[int, Position, bool]] = deque()
        size = self.data.streaming_multipack_buffer_size
        try:
            held: list[FilteredRows] = []
            begin, read, tokens, empty_passes = start, 0, 0, 0
            for result in engine.stream(self._feed(start, ahead)):
                which, position, ended = ahead.popleft()
                if result.failures:
                    raise DataError([row_problem(f) for f in result.failures[:MOST_FAILURES]])
                self._count(which, result.rows, result.notes)
                self._look(which, result.watch)
                if ended and position[which].passes == 1:
                    note(f"{self.tasks[which].name}: all rows were read; the stream begins again.")
                held.append(result.rows)
                read += len(result.rows.ledger.row)
                tokens += len(result.rows.ids)
                if read < size and tokens < TOKENS_PER_BUFFER and not ended:
                    continue
                if tokens:
                    empty_passes = 0
                    yield _joined(begin, held)
                else:
                    empty_passes += ended
                    self._check_empty(empty_passes)
                held, begin, read, tokens = [], position, 0, 0
        finally:
            engine.close()

    def _feed(
        self, start: Position, ahead: deque[tuple[int, Position, bool]]
    ) -> Iterator[tuple[int, list[Row]]]:
        """Chunks of rows, each with the number of its dataset; `ahead` learns where reading stands after each."""
        at = list(start)
        size = min(CHUNK_ROWS, self.data.streaming_multipack_buffer_size)
        readers = [self._read(i, size, at[i].row) for i in range(len(at))]
        following = [next(reader, None) for reader in readers]
        while True:
            i = min(range(len(at)), key=lambda i: (at[i].served / self._shares[i], i))
            chunk = following[i]
            if chunk is None:  # the data is shorter than it was when this position was saved
                if at[i].row == self.skips[i]:
                    raise self._nothing(i)
                chunk = []
            else:
                following[i] = next(readers[i], None)
            at[i] = Reading(at[i].passes, at[i].row + len(chunk), at[i].served + len(chunk))
            ended = following[i] is None
            if ended:
                at[i] = Reading(at[i].passes + 1, self.skips[i], at[i].served)
                readers[i] = self._read(i, size, self.skips[i])
                following[i] = next(readers[i], None)
            if chunk:
                ahead.append((i, tuple(at), ended))
                yield i, chunk

    def _read(self, i: int, size: int, start: int) -> Iterator[list[Row]]:
        for batch in self.tasks[i].source.batches(size, start):
            yield [((row_id.file, row_id.row), row) for row_id, row in batch]

    def _nothing(self, i: int) -> DataError:
        task = self.tasks[i]
        return DataError(
            Problem(
                f"`{task.name}` has no rows after the {self.skips[i]:,} that `skip` leaves out.",
                "Lower `skip`.",
                kind="data",
                keys=(f"{task.key}.skip",),
            )
        )

    def _count(self, which: int, rows: FilteredRows, notes: dict[str, int]) -> None:
        """Counts rows, and tells of each reason to drop some when it first comes up."""
        counts, task = self.counts[which], self.tasks[which]
        counts.add(rows.ledger)
        if not counts.rows and len(self._lengths) < _MANY_LENGTHS:
            self._lengths.extend(rows.ledger.tokens.tolist())
        for reason, n in counts.dropped.items():
            if (which, reason) not in self._told:
                self._told.add((which, reason))
                warn(f"{task.name}: rows are dropped from the stream: {reason} ({n:,} so far).")
        for what in notes:
            if (which, what) not in self._told:
                self._told.add((which, what))
                warn(f"{task.name}: {what}: they are not in the training text.")
        if counts.read >= _FEW_ROWS:
            check_dropped(self.data, [self._summary(which)])

    def _look(self, which: int, watch: Watch) -> None:
        """Tells of keys that no message of the first rows has, once for each dataset."""
        known = self._watches.get(which, watch)
        if known is None:
            return
        self._watches[which] = known = known.merge(watch)
        if not known.unseen:
            self._watches[which] = None
        elif self.counts[which].read >= min(_FEW_ROWS, self.data.streaming_multipack_buffer_size):
            self._watches[which] = None
            tell_unseen(self.tasks[which], known)

    def _check_empty(self, empty_passes: int) -> None:
        if empty_passes >= len(self.tasks):
            total = sum(self.counts, Counts())
            tokens = np.array(self._lengths, np.int64)
            raise DataError([nothing_left(self.name, "", total, tokens, self.tasks[0].job.limits)])

    def _summary(self, which: int) -> DatasetSummary:
        task = self.tasks[which]
        return DatasetSummary("train", which, task.name, task.format.name, self.counts[which])

    def summary(self) -> list[str]:
        """What became of the rows that were read, one line for each dataset."""
        return summary_lines(self._summary(i) for i in range(len(self.tasks)))


def count_rows(source: Source) -> int | None:
    """The rows of a source; None where only reading it all over a network would tell."""
    if source.rows is not None:
        return source.rows
    return sum(r.count() for r in source.readers) if isinstance(source, FileSource) else None


def _joined(start: Position, held: list[FilteredRows]) -> Buffer:
    return Buffer(
        start,
        np.concatenate([rows.lengths for rows in held]).astype(np.int64),
        np.concatenate([rows.ids for rows in held]),
        np.concatenate([rows.labels for rows in held]),
    )
