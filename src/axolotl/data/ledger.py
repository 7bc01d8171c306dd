"""The ledger: what became of every input row, with the reason and the counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


class Outcome(IntEnum):
    """How an input row ended."""

    KEPT = 0
    TRUNCATED = 1
    SPLIT = 2
    DROPPED = 3

    @property
    def word(self) -> str:
        return self.name.lower()


class Reason(IntEnum):
    """Why a row, or a piece of it, is not in the data as it came."""

    NONE = 0
    LONG = 1
    SHORT = 2
    UNTRAINED = 3
    UNTRAINED_AFTER_CUT = 4
    DUPLICATE = 5

    @property
    def text(self) -> str:
        return REASON_TEXTS[self]


REASON_TEXTS = (
    "",
    "longer than sequence_len",
    "shorter than min_sample_len",
    "nothing in it is trained",
    "nothing trained is left after truncation",
    "duplicate",
)

LEDGER_SCHEMA = pa.schema(
    [
        ("set", pa.dictionary(pa.int32(), pa.string())),  # train, test_0, ...
        ("dataset", pa.int16()),  # position of the entry under `datasets` or `test_datasets`
        ("file", pa.dictionary(pa.int32(), pa.string())),
        ("row", pa.int64()),
        ("outcome", pa.dictionary(pa.int8(), pa.string())),
        ("reason", pa.dictionary(pa.int8(), pa.string())),
        ("tokens", pa.int64()),  # as rendered, before anything was cut or dropped
        ("trained_tokens", pa.int64()),  # of what is in the data
        ("cut_tokens", pa.int64()),  # rendered, and not in the data
        ("first_row", pa.int64()),  # where its rows begin in the prepared folder; -1 when it has none
        ("rows", pa.int32()),
    ]
)

ROWS_SCHEMA = pa.schema(
    [
        ("dataset", pa.int16()),
        ("ledger", pa.int64()),  # line of the ledger that this row came from, counted within its set
        ("length", pa.int32()),
        ("trained", pa.int32()),
        ("key", pa.uint64()),  # equal rows have equal keys
    ]
)
"""One line per prepared row: what split, mixture, packing and the report read instead of the tokens."""


class LedgerRows(NamedTuple):
    """Ledger columns of some consecutive input rows of one dataset, N long; `files` is what `file` indexes."""

    files: list[str]
    file: np.ndarray  # int32
    row: np.ndarray  # int64
    outcome: np.ndarray  # int8, Outcome
    reason: np.ndarray  # int8, Reason
    tokens: np.ndarray  # int64
    trained: np.ndarray  # int64
    cut: np.ndarray  # int64
    pieces: np.ndarray  # int32, rows in the data

    def batch(self, set_name: str, dataset: int, first_row: int) -> pa.RecordBatch:
        """The Arrow form; `first_row` is the number of rows that the prepared folder holds before these."""
        n = len(self.row)
        ends = np.cumsum(self.pieces, dtype=np.int64) + first_row
        firsts = np.where(self.pieces > 0, ends - self.pieces, -1)

        def words(codes: np.ndarray, texts: list[str]) -> pa.DictionaryArray:
            return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(texts, pa.string()))

        return pa.RecordBatch.from_arrays(
            [
                words(np.zeros(n, np.int32), [set_name]),
                pa.array(np.full(n, dataset, np.int16)),
                words(self.file, self.files or [""]),
                pa.array(self.row),
                words(self.outcome, [o.word for o in Outcome]),
                words(self.reason, list(REASON_TEXTS)),
                pa.array(self.tokens),
                pa.array(self.trained),
                pa.array(self.cut),
                pa.array(firsts),
                pa.array(self.pieces),
            ],
            schema=LEDGER_SCHEMA,
        )


@dataclass
class Counts:
    """The sums of a dataset's ledger."""

    read: int = 0
    kept: int = 0
    truncated: int = 0
    split: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Dropped input rows by reason."""
    rows: int = 0
    """Rows in the data."""
    tokens: int = 0
    trained_tokens: int = 0
    cut_tokens: int = 0
    """Rendered tokens that are not in the data: of dropped rows, dropped pieces, and cut ends."""

    @property
    def dropped_rows(self) -> int:
        return sum(self.dropped.values())

    def add(self, rows: LedgerRows) -> None:
        """Counts some more input rows."""
        outcomes = np.bincount(rows.outcome, minlength=len(Outcome))
        self.read += len(rows.row)
        self.kept += int(outcomes[Outcome.KEPT])
        self.truncated += int(outcomes[Outcome.TRUNCATED])
        self.split += int(outcomes[Outcome.SPLIT])
        reasons = np.bincount(rows.reason[rows.outcome == Outcome.DROPPED], minlength=len(Reason))
        for reason in Reason:
            if reasons[reason]:
                self.dropped[reason.text] = self.dropped.get(reason.text, 0) + int(reasons[reason])
        self.rows += int(rows.pieces.sum())
        self.tokens += int((rows.tokens - rows.cut).sum())
        self.trained_tokens += int(rows.trained.sum())
        self.cut_tokens += int(rows.cut.sum())

    def __add__(self, other: Counts) -> Counts:
        total = Counts(**{k: v + getattr(other, k) for k, v in vars(self).items() if k != "dropped"})
        for reason in dict.fromkeys((*self.dropped, *other.dropped)):
            total.dropped[reason] = self.dropped.get(reason, 0) + other.dropped.get(reason, 0)
        return total

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Remarks:
    """What is worth telling of a dataset besides its counts. Kept with the rows, and so told whenever they are used."""

    left_out: dict[str, int] = field(default_factory=dict)
    """What the template did not write: a sentence, and the number of turns."""
    unseen: list[str] | None = None
    """Keys that options name and no message had; None where no row was read."""
    keys: list[str] = field(default_factory=list)
    """Keys that messages had."""
    blank_lines: int = 0

    def __add__(self, other: Remarks) -> Remarks:
        left_out = dict(self.left_out)
        for what, turns in other.left_out.items():
            left_out[what] = left_out.get(what, 0) + turns
        unseen = self.unseen if other.unseen is None else other.unseen
        if self.unseen is not None and other.unseen is not None:
            unseen = sorted({*self.unseen} & {*other.unseen})
        keys = sorted({*self.keys, *other.keys})
        return Remarks(left_out, unseen, keys, self.blank_lines + other.blank_lines)


@dataclass
class DatasetSummary:
    """One dataset entry and what became of its rows."""

    set: str
    dataset: int
    name: str
    format: str
    counts: Counts
    remarks: Remarks = field(default_factory=Remarks)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> DatasetSummary:
        remarks = Remarks(**value.get("remarks", {}))
        return cls(**{**value, "counts": Counts(**value["counts"]), "remarks": remarks})


def summary_lines(summaries: Iterable[DatasetSummary]) -> list[str]:
    """The summary that ends a preparation: one line per dataset, with every row accounted for."""
    lines = []
    for s in summaries:
        c = s.counts
        parts = [f"{c.rows:,} rows from {c.read:,}" if c.rows != c.read else f"{c.rows:,} rows"]
        if c.truncated:
            parts.append(f"{c.truncated:,} truncated")
        if c.split:
            parts.append(f"{c.split:,} split into pieces")
        parts += [f"{n:,} dropped ({reason})" for reason, n in sorted(c.dropped.items())]
        share = c.trained_tokens / c.tokens if c.tokens else 0.0
        parts.append(f"{c.tokens:,} tokens, {c.trained_tokens:,} trained ({share:.0%})")
        where = "" if s.set == "train" else f" ({s.set})"
        lines.append(f"{s.name}{where}: " + "; ".join(parts))
    return lines


_GROUP_ROWS = 1 << 14
"""Rows of a Parquet row group, which are in memory before it is written."""


def write_parquet(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    """Writes a table that need not fit into memory."""
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        group: list[pa.RecordBatch] = []
        held = 0
        for batch in batches:
            group.append(batch)
            held += batch.num_rows
            if held >= _GROUP_ROWS:
                writer.write_table(pa.Table.from_batches(group, schema))
                group, held = [], 0
        if group:
            writer.write_table(pa.Table.from_batches(group, schema))
