"""Safetensors files as streams: one tensor is read at a time, and a file is written tensor by tensor.

Neither memory-maps a file nor holds one, so that memory follows the largest tensor and not the model.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from axolotl.errors import ModelError
from axolotl.model.files import TensorEntry

T = TypeVar("T")
_CHUNK = 2**26
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_tensor(path: Path, name: str, entry: TensorEntry) -> torch.Tensor:
    """One tensor of a file, in memory of its own. Raises ModelError for a number type that torch has not."""
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise ModelError(
            f"`{path}`: tensor `{name}` has the number type {entry.dtype}, which cannot be computed with."
        )
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=dtype)
    tensor = torch.empty(entry.shape, dtype=dtype)
    with path.open("rb", buffering=0) as file:
        _read_at(file.fileno(), path, _bytes_of(tensor), entry.start)
    return tensor


@dataclass(frozen=True, slots=True)
class Spec:
    """Number type (safetensors' name) and shape of a tensor that will be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1)


class ShardWriter:
    """Writes one safetensors file whose tensors are known beforehand, in any order, by their place in the file."""

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self.path, self._specs = path, dict(specs)
        self._waiting = set(self._specs)
        table: dict[str, object] = {"__metadata__": dict(metadata) or {"format": "pt"}}
        at = 0
        places: dict[str, int] = {}
        for name, spec in self._specs.items():
            places[name] = at
            table[name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [at, at + spec.nbytes],
            }
            at += spec.nbytes
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        self._size = len(self._header) + at
        self._places = {name: len(self._header) + place for name, place in places.items()}
        self._file: int

    def __enter__(self) -> ShardWriter:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        _write_at(self._file, memoryview(self._header), 0)
        os.truncate(self._file, self._size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        if kind is None and self._waiting:
            raise RuntimeError(f"{self.path} was closed before all its tensors were written")

    def _place(self, name: str, dtype: str, shape: tuple[int, ...]) -> int:
        self._waiting.remove(name)
        if self._specs[name] != Spec(dtype, shape):
            raise RuntimeError(f"{self.path}: `{name}` is {dtype} {shape}, announced as {self._specs[name]}")
        return self._places[name]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor from memory."""
        at = self._place(name, NAMES[tensor.dtype], tuple(tensor.shape))
        if tensor.numel():
            _write_at(self._file, _bytes_of(tensor.detach().cpu().contiguous()), at)

    def copy(self, name: str, source: Path, entry: TensorEntry) -> None:
        """A tensor byte by byte from another file."""
        at = self._place(name, entry.dtype, entry.shape)
        with source.open("rb", buffering=0) as file:
            start = entry.start
            while start < entry.end:
                count = _copy_range(file.fileno(), self._file, entry.end - start, start, at)
                if not count:
                    raise ModelError(
                        f"`{source}` ends before its last tensor.", "Copy or download the file again."
                    )
                start, at = start + count, at + count

    def rewrite(
        self, name: str, source: Path, entry: TensorEntry, change: Callable[[int, torch.Tensor], T], rows: int
    ) -> list[T]:
        """A tensor from another file, changed on the way in blocks of `rows` rows that are worked on side by side.

        `change(first_row, block)` changes the block itself; what it returns is collected.
        """
        at = self._place(name, entry.dtype, entry.shape)
        dtype, width = DTYPES[entry.dtype], entry.nbytes // entry.shape[0]
        threads, scratch = torch.get_num_threads(), threading.local()

        def work(row: int) -> T:
            if not hasattr(scratch, "rows"):
                scratch.rows = torch.empty((rows, *entry.shape[1:]), dtype=dtype)
            block = scratch.rows[: min(rows, entry.shape[0] - row)]
            _read_at(file.fileno(), source, _bytes_of(block), entry.start + row * width)
            result = change(row, block)
            _write_at(self._file, _bytes_of(block), at + row * width)
            return result

        with source.open("rb", buffering=0) as file:
            torch.set_num_threads(
                1
            )  # whole blocks side by side, instead of many threads in each small product
            try:
                with ThreadPoolExecutor(threads) as pool:
                    return list(pool.map(work, range(0, entry.shape[0], rows)))
            finally:
                torch.set_num_threads(threads)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    data: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(data)


def _write_at(file: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(file, data[:_CHUNK], at)
        data, at = data[count:], at + count


def _read_at(file: int, path: Path, data: memoryview, at: int) -> None:
    while data:
        count = os.preadv(file, [data[:_CHUNK]], at)
        if not count:
            raise ModelError(f"`{path}` ends before its last tensor.", "Copy or download the file again.")
        data, at = data[count:], at + count


def _copy_range(source: int, target: int, count: int, start: int, at: int) -> int:
    """Copies bytes between files, inside the kernel where it can; returns how many."""
    count = min(count, 2**30)
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, count, start, at)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
    data = os.pread(source, min(count, _CHUNK), start)
    _write_at(target, memoryview(data), at)
    return len(data)


def make_index(layout: Mapping[str, Sequence[str]], total_bytes: int, parameters: int) -> dict[str, object]:
    """The index of a model in several files: `layout` maps each file to its tensors."""
    weight_map = {tensor: file for file, tensors in layout.items() for tensor in tensors}
    return {
        "metadata": {"total_parameters": parameters, "total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
