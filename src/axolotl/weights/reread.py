"""Reads a merged model back: a writer that writes nothing, and holds what it is given against the file that is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from axolotl.errors import ModelError
from axolotl.model.files import TensorEntry, read_header
from axolotl.weights.tensors import DTYPES, read_tensor

T = TypeVar("T")
# Bytes of two files that are compared at a time.
_PIECE = 2**22


class ShardReader:
    """Has the methods of `ShardWriter`, for a file that one has written; each raises ModelError where the file differs.

    Copied tensors have to be the same bytes. Computed ones may differ by what another order of sums does: four steps
    of their number type, and 1e-5 of the block's largest number.
    """

    def __init__(self, path: Path, *_: Any) -> None:
        self.path = path
        self.entries = read_header(path)[0]

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self._same(name, read_tensor(self.path, name, self._entry(name)), tensor)

    def copy(self, name: str, source: Path, entry: TensorEntry) -> None:
        mine = self._entry(name)
        if (mine.dtype, mine.shape) != (entry.dtype, entry.shape):
            raise self._otherwise(name)
        with self.path.open("rb", buffering=0) as ours, source.open("rb", buffering=0) as theirs:
            for start in range(0, entry.nbytes, _PIECE):
                count = min(_PIECE, entry.nbytes - start)
                pieces = (
                    os.pread(f.fileno(), count, e.start + start) for f, e in ((ours, mine), (theirs, entry))
                )
                if len({*pieces}) > 1:
                    raise self._otherwise(name)

    def rewrite(
        self, name: str, source: Path, entry: TensorEntry, change: Callable[[int, torch.Tensor], T], rows: int
    ) -> Callable[[], list[T]]:
        mine = self._entry(name)
        width = entry.nbytes // entry.shape[0]
        found = []
        for first in range(0, entry.shape[0], rows):
            shape = (min(rows, entry.shape[0] - first), *entry.shape[1:])
            part = [
                TensorEntry(e.dtype, shape, e.start + first * width, e.start + (first + shape[0]) * width)
                for e in (entry, mine)
            ]
            block = read_tensor(source, name, part[0])
            found.append(change(first, block))
            self._same(name, read_tensor(self.path, name, part[1]), block)
        return lambda: found

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries or self.entries[name].dtype not in DTYPES:
            raise self._otherwise(name)
        return self.entries[name]

    def _same(self, name: str, here: torch.Tensor, wanted: torch.Tensor) -> None:
        if here.dtype != wanted.dtype or here.shape != wanted.shape:
            raise self._otherwise(name)
        if torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (here, wanted))):
            return
        step = torch.finfo(here.dtype).eps if here.is_floating_point() else 0.0
        for a, b in zip(here.reshape(-1).split(_PIECE), wanted.reshape(-1).split(_PIECE), strict=True):
            a, b = a.double(), b.double()
            if not bool(((a - b).abs() <= 4 * step * b.abs() + 1e-5 * b.abs().max()).all()):
                raise self._otherwise(name)

    def _otherwise(self, name: str) -> ModelError:
        return ModelError(
            f"`{self.path.name}` does not hold what was written to it: `{name}` is another tensor when it is read back.",
            "The disk or its driver lost data: merge onto another disk.",
        )
