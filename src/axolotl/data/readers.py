"""Reading data files row by row: what every reader does, and those of plain text and of tables in text.

A reader keeps nothing but the row at hand in memory, numbers rows as the user would (lines of a text file, counted
from 1), and tells every bad line of a file at once.
"""

from __future__ import annotations

import abc
import bz2
import codecs
import csv
import gzip
import hashlib
import io
import itertools
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from axolotl.data.damage import Damage, damaged, decode_line
from axolotl.errors import DataError, Place, Problem

Row = dict[str, Any]
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
PEEK_ROWS = 1000
"""So many rows are looked at to learn the columns of a file without a schema."""


class RowId(NamedTuple):
    """A row of the user's data: its file, and its line there (its number, where the file has no lines), from 1."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


class Reader(abc.ABC):
    """One data file. `label` is what messages call it; `blank_lines` counts those of the last full pass."""

    counts_quickly = False
    """Whether `count` is much faster than reading the rows."""

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.path, self.label = path, label or str(path)
        self.blank_lines = 0
        self._count: int | None = None

    @abc.abstractmethod
    def rows(self, start: int = 0) -> Iterator[tuple[int, Row]]:
        """(number for messages, row) of each row, without the first `start`. Raises DataError, all bad lines at once."""

    def columns(self, look: int = PEEK_ROWS) -> list[str]:
        """The names of the columns; of the first `look` rows together, where the file has no schema."""
        names: dict[str, None] = {}
        for _, row in itertools.islice(self.rows(), look):
            names.update(dict.fromkeys(row))
        return list(names)

    def count(self) -> int:
        """The number of rows."""
        if self._count is None:
            self._count = self._counted()
        return self._count

    def _counted(self) -> int:
        return sum(1 for _ in self.rows())

    def fingerprint(self) -> str:
        """Size and content hash of the file; of the bytes, so a rewritten file with equal content is equal."""
        digest = hashlib.blake2b(digest_size=16)
        try:
            with self.path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise damaged(self.label, error) from error
        return f"{self.path.stat().st_size}:{digest.hexdigest()}"


def open_bytes(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed by the ending of its name."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, "rb")  # type: ignore[return-value]
        case ".bz2":
            return bz2.open(path, "rb")  # type: ignore[return-value]
        case ".xz":
            return lzma.open(path, "rb")  # type: ignore[return-value]
        case ".zst":
            return io.BufferedReader(pa.CompressedInputStream(str(path), "zstd"), 1 << 18)  # type: ignore[arg-type]
    return path.open("rb", buffering=1 << 18)


_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException)


class LinesReader(Reader):
    """A text file."""

    def lines(self) -> Iterator[bytes]:
        """The lines with their endings, without a byte order mark. Raises DataError for a damaged file."""
        return self._parts(lambda file: file.readline(), iter)

    def chunks(self) -> Iterator[bytes]:
        """The same bytes in chunks of a fixed size."""
        size = 1 << 18
        return self._parts(lambda file: file.read(size), lambda file: iter(lambda: file.read(size), b""))

    def _parts(
        self, first: Callable[[BinaryIO], bytes], rest: Callable[[BinaryIO], Iterator[bytes]]
    ) -> Iterator[bytes]:
        try:
            with open_bytes(self.path) as file:
                start = first(file)
                if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise DataError(
                        Problem(
                            f"`{self.label}` is UTF-16 text, UTF-8 is expected.",
                            f"Convert it: iconv -f UTF-16 -t UTF-8 {self.label}",
                            "data",
                            places=(Place(self.label, 1),),
                        )
                    )
                yield start.removeprefix(codecs.BOM_UTF8)
                yield from rest(file)
        except _DAMAGE as error:
            raise damaged(self.label, error) from error


class TextReader(LinesReader):
    """One row in each line of a text file, in the column `text`. Blank lines are skipped and counted."""

    counts_quickly = True

    def rows(self, start: int = 0) -> Iterator[tuple[int, Row]]:
        damage = Damage(self.label)
        blank = offset = 0
        for number, raw in enumerate(self.lines(), 1):
            if raw.isspace() or not raw:
                blank += bool(raw)
            elif start:
                start -= 1
            elif (line := decode_line(raw, number, offset, damage)) is not None and not damage:
                yield number, {"text": line.rstrip("\r\n")}
            offset += len(raw)
            if damage.full:
                break
        damage.raise_any()
        self.blank_lines = blank

    def columns(self, look: int = PEEK_ROWS) -> list[str]:
        return ["text"]

    def _counted(self) -> int:
        return sum(1 for raw in self.lines() if raw and not raw.isspace())


class CsvReader(LinesReader):
    """A table with a header line; every value is text, exactly as it stands there."""

    def __init__(self, path: Path, label: str | None = None, delimiter: str = ",") -> None:
        super().__init__(path, label)
        self.delimiter = delimiter

    def rows(self, start: int = 0) -> Iterator[tuple[int, Row]]:
        csv.field_size_limit(sys.maxsize)
        damage = Damage(self.label)
        table = csv.reader(self._decoded(damage), delimiter=self.delimiter, strict=True)
        blank = 0
        header: list[str] | None = None
        begun = 1
        while not damage.full:
            try:
                values = next(table, None)
            except csv.Error as error:
                damage.add(
                    begun,
                    f"not a row of a table: {error}",
                    "",
                    "Quote texts that hold quotes or line breaks.",
                )
                break
            if values is None:
                break
            line, begun = begun, table.line_num + 1
            if not values:
                blank += 1
            elif header is None:
                header = values
                if len(set(header)) != len(header):
                    twice = next(h for h in header if header.count(h) > 1)
                    damage.add(
                        line, f"the column `{twice}` is there twice", "", "Give each column its own name."
                    )
            elif len(values) != len(header):
                damage.add(line, f"{len(values)} values, and the header names {len(header)} columns", "")
            elif start:
                start -= 1
            elif not damage:
                yield line, dict(zip(header, values, strict=True))
        damage.raise_any()
        self.blank_lines = blank

    def _decoded(self, damage: Damage) -> Iterator[str]:
        offset = 0
        for number, raw in enumerate(self.lines(), 1):
            line = decode_line(raw, number, offset, damage)
            if line is None:
                return
            yield line
            offset += len(raw)

    def columns(self, look: int = PEEK_ROWS) -> list[str]:
        first = next(csv.reader(self._decoded(damage := Damage(self.label)), delimiter=self.delimiter), [])
        damage.raise_any()
        return first
