"""Prepared rows on disk: written shard by shard, so that a killed preparation continues, in the layout of `datasets`.

A shard under construction is `part-<dataset>-<number>.*`: the rows, their ledger and their lengths, and last a small JSON
record without which the shard does not count. When all are there they are renamed to what `datasets.load_from_disk`
expects; `state.json`, without which it takes nothing for a dataset, comes last.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from axolotl.data.filters import FilteredRows
from axolotl.data.ledger import LEDGER_SCHEMA, ROWS_SCHEMA, Counts, Remarks
from axolotl.errors import EnvironmentProblem

ROWS_PER_SHARD = 1 << 14
"""Input rows after which a shard is closed."""
TOKENS_PER_SHARD = 1 << 24
"""Tokens after which a shard is closed, for datasets of long texts."""
_TOKENS_PER_BATCH = 1 << 28  # Arrow's list offsets are 32 bits wide

_COLUMNS = {"input_ids": "int32", "attention_mask": "int8", "labels": "int32"}
_FEATURES = {
    name: {"feature": {"dtype": dtype, "_type": "Value"}, "_type": "List"} for name, dtype in _COLUMNS.items()
}
DATA_SCHEMA = pa.schema(
    [(name, pa.list_(pa.type_for_alias(dtype))) for name, dtype in _COLUMNS.items()],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def disk_errors_told(folder: Path) -> Iterator[None]:
    """Turns what a full or read-only disk raises into an EnvironmentProblem that says so."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise EnvironmentProblem(
                f"no space is left for the prepared data in `{folder}`.",
                "Free some space, or set `dataset_prepared_path` to a folder on another disk; what is finished is kept, "
                "and the same command goes on from there.",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise EnvironmentProblem(
                f"the prepared data cannot be written to `{folder}`: {error.strerror}.",
                "Set `dataset_prepared_path` to a folder that you can write to.",
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Writes a small file that is there as a whole or not at all."""
    aside = path.with_name(path.name + ".new")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


@dataclass
class Part:
    """The record of a finished shard."""

    dataset: int
    number: int
    sizes: dict[str, int]
    """Bytes of each of its files, by suffix."""
    counts: Counts
    last: bool = False
    """No row of the dataset comes after it."""
    remarks: Remarks = field(default_factory=Remarks)

    @property
    def stem(self) -> str:
        return f"part-{self.dataset:04d}-{self.number:06d}"

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Part:
        remarks = Remarks(**value["remarks"])
        return cls(**{**value, "counts": Counts(**value["counts"]), "remarks": remarks})


_SUFFIXES = ("arrow", "ledger", "rows")


def finished_parts(folder: Path, dataset: int) -> list[Part]:
    """The shards of a dataset that an earlier run finished, without gaps, in order."""
    parts: list[Part] = []
    while not parts or not parts[-1].last:
        stem = f"part-{dataset:04d}-{len(parts):06d}"
        try:
            part = Part.from_dict(json.loads((folder / f"{stem}.json").read_text(encoding="utf-8")))
            whole = all((folder / f"{stem}.{s}").stat().st_size == size for s, size in part.sizes.items())
        except (OSError, ValueError, TypeError, KeyError):
            break
        if not whole or part.stem != stem:
            break
        parts.append(part)
    return parts


class PartWriter:
    """Writes one shard. `first_row`: rows that the folder holds before it; `first_line`: ledger lines before it."""

    def __init__(
        self, folder: Path, set_name: str, dataset: int, number: int, first_row: int, first_line: int
    ) -> None:
        self.folder, self.set_name = folder, set_name
        self.part = Part(dataset, number, {}, Counts())
        self.next_row, self.next_line = first_row, first_line
        schemas = (DATA_SCHEMA, LEDGER_SCHEMA, ROWS_SCHEMA)
        self._files = [self._path(s).open("wb") for s in _SUFFIXES]
        # A dictionary may change from one batch to the next: the ledger is in the stream format for that reason.
        self._writers = [pa.ipc.new_stream(f, s) for f, s in zip(self._files, schemas, strict=True)]

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.part.stem}.{suffix}"

    @property
    def full(self) -> bool:
        return self.part.counts.read >= ROWS_PER_SHARD or self.part.counts.tokens >= TOKENS_PER_SHARD

    def add(self, rows: FilteredRows) -> None:
        """Appends the rows of one chunk."""
        data, ledger, index = self._writers
        for batch in _data_batches(rows):
            data.write_batch(batch)
        ledger.write_batch(rows.ledger.batch(self.set_name, self.part.dataset, self.next_row))
        k = len(rows.lengths)
        columns = [
            np.full(k, self.part.dataset, np.int16),
            rows.owner.astype(np.int64) + self.next_line,
            rows.lengths,
            rows.trained,
            rows.keys,
        ]
        index.write_batch(
            pa.RecordBatch.from_arrays(
                [pa.array(c, f.type) for c, f in zip(columns, ROWS_SCHEMA, strict=True)], schema=ROWS_SCHEMA
            )
        )
        self.part.counts.add(rows.ledger)
        self.next_row += k
        self.next_line += len(rows.ledger.row)

    def close(self, last: bool) -> Part:
        """Finishes the shard: from here on it survives a kill."""
        self.part.last = last
        for writer, file, suffix in zip(self._writers, self._files, _SUFFIXES, strict=True):
            writer.close()
            file.flush()
            os.fsync(file.fileno())
            self.part.sizes[suffix] = file.tell()
            file.close()
        write_whole(self._path("json"), json.dumps(asdict(self.part)))
        sync_folder(self.folder)
        return self.part

    def abandon(self) -> None:
        """Removes an unfinished shard."""
        for file, suffix in zip(self._files, _SUFFIXES, strict=True):
            with contextlib.suppress(OSError):
                file.close()
            with contextlib.suppress(OSError):
                self._path(suffix).unlink()


def _data_batches(rows: FilteredRows) -> Iterator[pa.RecordBatch]:
    """The rows as Arrow, without a copy of the tokens."""
    ends = np.cumsum(rows.lengths, dtype=np.int64)
    start_row, start_token = 0, 0
    while start_row < len(ends):
        stop_row = max(
            start_row + 1, int(np.searchsorted(ends, start_token + _TOKENS_PER_BATCH, side="right"))
        )
        stop_token = int(ends[stop_row - 1])
        offsets = np.concatenate(([0], ends[start_row:stop_row] - start_token)).astype(np.int32)
        values = (
            rows.ids[start_token:stop_token],
            np.ones(stop_token - start_token, np.int8),
            rows.labels[start_token:stop_token],
        )
        arrays = [pa.ListArray.from_arrays(pa.array(offsets), pa.array(v)) for v in values]
        yield pa.RecordBatch.from_arrays(arrays, schema=DATA_SCHEMA)
        start_row, start_token = stop_row, stop_token


def read_stream(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of a stream file, one at a time."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        yield from reader


def part_batches(folder: Path, parts: list[Part], suffix: str) -> Iterator[pa.RecordBatch]:
    """The ledger lines or row lengths of finished shards."""
    for part in parts:
        yield from read_stream(folder / f"{part.stem}.{suffix}")


def data_file(index: int, count: int) -> str:
    return f"data-{index:05d}-of-{count:05d}.arrow"


def arrange(folder: Path, stems: list[str], fingerprint: str) -> None:
    """Gives finished shards their final names; repeats harmlessly what an interrupted call had begun."""
    names = [data_file(i, len(stems)) for i in range(len(stems))]
    for stem, name in zip(stems, names, strict=True):
        if (folder / f"{stem}.arrow").exists():
            os.replace(folder / f"{stem}.arrow", folder / name)
    info = {"citation": "", "description": "", "features": _FEATURES, "homepage": "", "license": ""}
    write_whole(folder / "dataset_info.json", json.dumps(info, indent=2))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json.new").write_text(json.dumps(state, indent=2), encoding="utf-8")


def reveal(folder: Path, time_ns: int) -> None:
    """Makes a folder one that `datasets.load_from_disk` takes; the first revealed is the oldest by its time stamp."""
    state = folder / "state.json"
    if not state.exists():
        os.replace(folder / "state.json.new", state)
    os.utime(state, ns=(time_ns, time_ns))
    for pattern in ("part-*", "seen.sqlite*"):
        for left in folder.glob(pattern):
            left.unlink()
    sync_folder(folder)
