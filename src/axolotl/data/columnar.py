"""Reading Parquet and Arrow files, and folders that `datasets` saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from axolotl.data.damage import damaged
from axolotl.data.readers import PEEK_ROWS, Reader, Row
from axolotl.errors import DataError, Place, Problem

_BATCH = 1000
_BATCH_BYTES = 1 << 23
_DAMAGE = (pa.ArrowException, OSError, EOFError, ValueError)


def _rows_at_once(size: int, rows: int) -> int:
    """How many of `rows` rows, which take `size` bytes in all, are turned into Python values together."""
    return max(1, min(_BATCH, _BATCH_BYTES * rows // max(size, 1)))


class TableReader(Reader):
    """A file of record batches."""

    counts_quickly = True

    def schema(self) -> pa.Schema:
        raise NotImplementedError

    def batches(self) -> Iterator[pa.RecordBatch]:
        raise NotImplementedError

    def columns(self, look: int = PEEK_ROWS) -> list[str]:
        try:
            names = list(self.schema().names)
        except _DAMAGE as error:
            raise damaged(self.label, error) from error
        for name in names:
            if names.count(name) > 1:
                raise DataError(
                    Problem(
                        f"`{self.label}` has the column `{name}` twice.",
                        "Give each column its own name: which of them is meant cannot be known.",
                        "data",
                        places=(Place(self.label),),
                    )
                )
        return names

    def rows(self, start: int = 0) -> Iterator[tuple[int, Row]]:
        number = 0
        try:
            for batch in self.batches():
                if number + batch.num_rows <= start:
                    number += batch.num_rows
                    continue
                first, step = max(0, start - number), _rows_at_once(batch.nbytes, batch.num_rows)
                for at in range(first, batch.num_rows, step):
                    part = batch.slice(at, min(step, batch.num_rows - at))
                    yield from enumerate(part.to_pylist(), number + at + 1)
                number += batch.num_rows
        except UnicodeDecodeError as error:
            raise DataError(
                Problem(
                    f"`{self.label}` holds a text that is not UTF-8, in one of the rows after {number}.",
                    "Write the file again from text that is UTF-8.",
                    "data",
                    places=(Place(self.label),),
                )
            ) from error
        except _DAMAGE as error:
            raise damaged(self.label, error, number) from error


class ParquetReader(TableReader):
    """A Parquet file, read one piece of a row group at a time."""

    def schema(self) -> pa.Schema:
        return pq.read_schema(self.path)

    def batches(self) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(self.path, memory_map=True) as file:
            size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
            yield from file.iter_batches(batch_size=_rows_at_once(size, file.metadata.num_rows))

    def _counted(self) -> int:
        try:
            return int(pq.read_metadata(self.path).num_rows)
        except _DAMAGE as error:
            raise damaged(self.label, error) from error


class ArrowReader(TableReader):
    """An Arrow file, in the file format or the stream format."""

    def _open(self) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
        source = pa.memory_map(str(self.path))
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)

    def schema(self) -> pa.Schema:
        return self._open().schema

    def batches(self) -> Iterator[pa.RecordBatch]:
        reader = self._open()
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from reader

    def _counted(self) -> int:
        try:
            return sum(batch.num_rows for batch in self.batches())
        except _DAMAGE as error:
            raise damaged(self.label, error) from error


def saved_splits(folder: Path) -> list[str] | None:
    """The splits of a folder that `DatasetDict.save_to_disk` wrote; None for any other folder."""
    file = folder / "dataset_dict.json"
    return _json(file, "splits") if file.is_file() else None


def saved_files(folder: Path) -> list[Path] | None:
    """The Arrow files, in order, of a folder that `Dataset.save_to_disk` wrote; None for any other folder.

    Raises DataError for one whose rows were selected but not written out, and for one that misses files.
    """
    state = folder / "state.json"
    if not state.is_file():
        return None
    if _json(state, "_indices_data_files", None):
        raise DataError(
            f"`{folder}` was saved by an old version of `datasets`, with its rows in another order than its files.",
            "Write it again: load_from_disk(...).flatten_indices().save_to_disk(...).",
        )
    files = [folder / entry["filename"] for entry in _json(state, "_data_files")]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise DataError(f"`{folder}` misses files of the dataset saved there: {', '.join(missing)}.")
    return files


_REQUIRED = object()


def _json(file: Path, key: str, default: object = _REQUIRED) -> list:  # type: ignore[type-arg]
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return content[key] if default is _REQUIRED else content.get(key, default)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise damaged(str(file), error) from error
