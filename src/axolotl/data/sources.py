"""Where rows come from: files, folders, globs, URLs, the Hub; each as a stream of (row id, row) in a fixed order."""

from __future__ import annotations

import abc
import importlib
import itertools
import random
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl.config.secrets import without_secrets
from axolotl.data.local import TYPES, local_readers
from axolotl.data.readers import PEEK_ROWS, Reader, RowId
from axolotl.data.splits import Part, Shard, parse_split, ranges, shard_rows
from axolotl.errors import ConfigError, DataError, Place, Problem

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry

Row = dict[str, Any]
_URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


SIZE_PER_BATCH = 1 << 22
"""Characters of text after which a batch ends, however few rows it has."""


def size(value: Any) -> int:
    """About how many characters of text a row holds; a number counts as eight."""
    kind = type(value)
    if kind is str:
        return len(value)
    if kind is dict:
        return sum(map(size, value.values()))
    if kind is list and value:
        return 8 * len(value) if type(value[0]) in (int, float) else sum(map(size, value))
    return 8


class Source(abc.ABC):
    """The rows of one dataset entry. `label` names it in messages."""

    label: str
    blank_lines: int = 0
    """Blank lines that the last full pass skipped."""

    @property
    @abc.abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns; of the first thousand rows together, where a file has no schema."""

    @property
    def rows(self) -> int | None:
        """The number of rows, where it is known without reading them."""
        return None

    @abc.abstractmethod
    def fingerprint_parts(self) -> dict[str, str]:
        """What the rows depend on, by names that a user knows: the content of each file, the revision on the Hub."""

    @abc.abstractmethod
    def stream(self, start: int = 0) -> Iterator[tuple[RowId, Row]]:
        """The rows in order, without the first `start`. Raises DataError for what cannot be read."""

    def batches(self, batch_size: int, start: int = 0) -> Iterator[list[tuple[RowId, Row]]]:
        """The same rows in lists of `batch_size`, shorter where rows are large; only one list is in memory."""
        batch: list[tuple[RowId, Row]] = []
        held = 0
        for item in self.stream(start):
            batch.append(item)
            held += size(item[1])
            if len(batch) >= batch_size or held >= SIZE_PER_BATCH:
                yield batch
                batch, held = [], 0
        if batch:
            yield batch


class FileSource(Source):
    """Rows of local files: those that `split` and `shards` select, in the order of the files."""

    def __init__(
        self, label: str, readers: list[Reader], parts: list[Part], shard: Shard | None, place: Place
    ) -> None:
        self.label, self.readers, self.parts, self.shard, self.place = label, readers, parts, shard, place

    @cached_property
    def columns(self) -> tuple[str, ...]:
        names: dict[str, None] = {}
        look = max(20, PEEK_ROWS // len(self.readers))
        for reader in self.readers:
            names.update(dict.fromkeys(reader.columns(look)))
        if not names:
            raise self._empty("it has no rows")
        return tuple(names)

    @cached_property
    def _total(self) -> int:
        return sum(reader.count() for reader in self.readers)

    @property
    def rows(self) -> int | None:
        if not all(reader.counts_quickly for reader in self.readers):
            return None
        return len(self._chosen) if self.shard else sum(b - a for a, b in self._ranges(self._total))

    def _ranges(self, total: int | None) -> list[tuple[int, int]]:
        found, short = ranges(self.parts, total)
        if short:
            wanted, have = short
            raise DataError(
                Problem(
                    f"`{wanted}` asks for more rows than `{self.label}` has: {have}.",
                    f"Write a slice of at most {have} rows.",
                    "data",
                    places=(self.place,),
                )
            )
        return found

    @cached_property
    def _chosen(self) -> np.ndarray:
        """Row numbers that the shard holds, sorted (int64)."""
        assert self.shard
        picked = np.concatenate([np.arange(a, b) for a, b in self._ranges(self._total)])
        return np.sort(picked[shard_rows(len(picked), self.shard)])

    def fingerprint_parts(self) -> dict[str, str]:
        return {reader.label: reader.fingerprint() for reader in self.readers}

    def stream(self, start: int = 0) -> Iterator[tuple[RowId, Row]]:
        given = 0
        whole = self.shard is None and len(self.parts) == 1 and self.parts[0].whole
        for item in self._from(start) if whole else itertools.islice(self._selected(), start, None):
            given += 1
            yield item
        self.blank_lines = sum(reader.blank_lines for reader in self.readers)
        if not given and not start:
            raise self._empty("`split` or `shards` leave no row" if self._total else "it has no rows")

    def _selected(self) -> Iterator[tuple[RowId, Row]]:
        """The rows that slices and shards choose."""
        if self.shard:
            wanted = iter(self._chosen.tolist())
            following = next(wanted, None)
            for number, item in enumerate(self._from(0)):
                if following is None:
                    return
                while number == following:  # more than once, where slices overlap
                    following = next(wanted, None)
                    yield item
        else:
            for a, b in self._ranges(self._total):
                yield from itertools.islice(self._from(a), b - a)

    def _from(self, start: int) -> Iterator[tuple[RowId, Row]]:
        """All rows of all files, without the first `start`."""
        for reader in self.readers:
            if start and start >= reader.count():
                start -= reader.count()
                continue
            for number, row in reader.rows(start):
                yield RowId(reader.label, number), row
            start = 0

    def _empty(self, why: str) -> DataError:
        files = ", ".join(f"`{r.label}`" for r in self.readers[:3]) + (
            ", ..." if len(self.readers) > 3 else ""
        )
        return DataError(
            Problem(
                f"nothing can be read from `{self.label}`: {why}.",
                f"Read: {files}. Check the file, `data_files` and `split`.",
                "data",
                places=(self.place,),
            )
        )


class SyntheticSource(Source):
    """Rows of random tokens, for measuring speed."""

    label = "synthetic"

    def __init__(self, entry: DatasetEntry, data: DataSection, place: Place) -> None:
        if entry.max_input_id is None:
            raise ConfigError(
                Problem(
                    "a synthetic dataset needs `max_input_id`.",
                    "Set it to the size of the model's vocabulary.",
                    "missing",
                    places=(place,),
                )
            )
        self.count = entry.length or 1000
        self.length = entry.sequence_length or data.sequence_len
        self.low = 100 if entry.min_input_id is None else entry.min_input_id
        self.high = entry.max_input_id
        self.seed = 42 if entry.seed is None else entry.seed
        if self.low >= self.high:
            raise ConfigError(
                Problem(
                    f"`min_input_id` {self.low} is not below `max_input_id` {self.high}.",
                    "Lower `min_input_id`, or raise `max_input_id`.",
                    "conflict",
                    places=(place,),
                )
            )

    columns = ("input_ids", "attention_mask", "labels")  # type: ignore[assignment]

    @property
    def rows(self) -> int | None:
        return self.count

    def fingerprint_parts(self) -> dict[str, str]:
        return {self.label: f"{self.count} {self.length} {self.low} {self.high} {self.seed}"}

    def stream(self, start: int = 0) -> Iterator[tuple[RowId, Row]]:
        for number in range(start, self.count):
            draw = random.Random(self.seed * 1_000_003 + number)
            ids = [draw.randrange(self.low, self.high) for _ in range(self.length)]
            yield (
                RowId(self.label, number + 1),
                {"input_ids": ids, "attention_mask": [1] * self.length, "labels": list(ids)},
            )


def open_source(
    entry: DatasetEntry,
    data: DataSection,
    place: Place,
    *,
    default_split: str = "train",
    seed: int = 42,
    endless: bool = False,
) -> Source:
    """Opens what a dataset entry names. `place`: where the entry stands in the config.

    `default_split` is taken where the entry names none and there are several (train, if it is not there either);
    `seed` decides which rows a shard holds; `endless` reads whole splits of the Hub row by row instead of downloading
    them first. Raises DataError for what is not there or cannot be read, ConfigError for
    options that contradict each other, EnvironmentProblem for a missing extra.
    """
    if entry.type == "_synthetic":
        return SyntheticSource(entry, data, place)
    shard = _shard(entry, place, seed)
    parts = parse_split(entry.split or default_split, place)
    path = entry.path
    if not path:
        raise ConfigError(
            Problem("this dataset has no `path`.", "Say where it is.", "missing", places=(place,))
        )
    # `datasets` takes seconds to import, and most runs read local files.
    if _URL.match(path):
        remote = importlib.import_module("axolotl.data.remote")
        local, shown = remote.fetch(path, data, place), without_secrets(path)
        readers, used = local_readers(entry, place, parts, bool(entry.split), path=local, shown=shown)
        return FileSource(shown, readers, used, shard, place)
    if is_local(path, entry):
        readers, used = local_readers(entry, place, parts, bool(entry.split))
        return FileSource(path, readers, used, shard, place)
    remote = importlib.import_module("axolotl.data.remote")
    if endless and shard is None and len(parts) == 1 and parts[0].whole:
        return remote.stream_hub(entry, data, place, default_split)  # type: ignore[no-any-return]
    return remote.open_hub(entry, data, place, default_split, shard)  # type: ignore[no-any-return]


def is_local(path: str, entry: DatasetEntry) -> bool:
    """Whether a path names local files, there or not; anything else is looked up on the Hub."""
    return (
        (entry.data_files is not None and path in TYPES)
        or Path(path).expanduser().exists()
        or not _HUB_NAME.match(path)
        or path.startswith(".")
        or re.search(_DATA_ENDING, path.lower()) is not None
    )


_DATA_ENDING = r"\.(json|jsonl|ndjson|csv|tsv|parquet|arrow|txt|text)(\.(gz|bz2|xz|zst))?$"


def _shard(entry: DatasetEntry, place: Place, seed: int) -> Shard | None:
    if entry.shards is None:
        if entry.shards_idx is not None:
            raise ConfigError(
                Problem(
                    "`shards_idx` is set, and `shards` is not.",
                    "Set both, or none.",
                    "conflict",
                    places=(place,),
                )
            )
        return None
    index = entry.shards_idx or 0
    if index >= entry.shards:
        raise ConfigError(
            Problem(
                f"`shards_idx` {index} is not among {entry.shards} shards.",
                f"They count from 0 to {entry.shards - 1}.",
                "conflict",
                places=(place,),
            )
        )
    return Shard(entry.shards, index, seed)
