"""Safetensors files as streams: one tensor is read at a time, and a file is written tensor by tensor.

Neither memory-maps a file nor holds one, so that memory follows the largest tensor and not the model.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from axolotl.errors import ModelError
from axolotl.model.files import TensorEntry

_CHUNK = 8 * 2**20
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
        raise ModelError(f"`{path}`: tensor `{name}` has the number type {entry.dtype}, which cannot be computed with.")
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=dtype)
    data = bytearray(entry.nbytes)
    with path.open("rb") as file:
        file.seek(entry.start)
        if file.readinto(data) != entry.nbytes:
            raise ModelError(f"`{path}` ends in the middle of `{name}`.", "Copy or download the file again.")
    return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)


@dataclass(frozen=True, slots=True)
class Spec:
    """Number type (safetensors' name) and shape of a tensor that will be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1)


class ShardWriter:
    """Writes one safetensors file: its header first, then its tensors, which have to come in the order of `specs`."""

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self.path, self._specs = path, dict(specs)
        self._waiting = iter(self._specs)
        self._header = self._make_header(metadata)
        self._file: BinaryIO

    def _make_header(self, metadata: Mapping[str, str]) -> bytes:
        table: dict[str, object] = {"__metadata__": dict(metadata) or {"format": "pt"}}
        at = 0
        for name, spec in self._specs.items():
            table[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
            at += spec.nbytes
        text = json.dumps(table, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)

    def __enter__(self) -> ShardWriter:
        self._file = self.path.open("wb")
        self._file.write(struct.pack("<Q", len(self._header)))
        self._file.write(self._header)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if kind is None and next(self._waiting, None) is not None:
            raise RuntimeError(f"{self.path} was closed before all its tensors were written")

    def _next(self, name: str) -> Spec:
        expected = next(self._waiting, None)
        if expected != name:
            raise RuntimeError(f"{self.path}: `{name}` comes where `{expected}` was announced")
        return self._specs[name]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor, from memory."""
        spec = self._next(name)
        if tuple(tensor.shape) != spec.shape or NAMES.get(tensor.dtype) != spec.dtype:
            raise RuntimeError(f"{self.path}: `{name}` is {tensor.dtype} {tuple(tensor.shape)}, announced as {spec}")
        if tensor.numel():
            self._file.write(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))

    def copy(self, name: str, source: Path, entry: TensorEntry) -> None:
        """The next tensor, byte by byte from another file."""
        spec = self._next(name)
        if spec.shape != entry.shape or spec.dtype != entry.dtype:
            raise RuntimeError(f"{self.path}: `{name}` is not as announced")
        for chunk in _chunks(source, entry.start, entry.end):
            self._file.write(chunk)


def _chunks(path: Path, start: int, end: int) -> Iterator[memoryview]:
    buffer = bytearray(min(_CHUNK, end - start))
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left = end - start
        while left:
            count = file.readinto(view[: min(left, len(buffer))])
            if not count:
                raise ModelError(f"`{path}` ends before its last tensor.", "Copy or download the file again.")
            yield view[:count]
            left -= count


def spec_of(tensor: torch.Tensor) -> Spec:
    """The spec with which a tensor is written."""
    return Spec(NAMES[tensor.dtype], tuple(tensor.shape))


def make_index(layout: Mapping[str, Sequence[str]], total_bytes: int, parameters: int) -> dict[str, object]:
    """The index of a model in several files: `layout` maps each file to its tensors."""
    weight_map = {tensor: file for file, tensors in layout.items() for tensor in tensors}
    return {
        "metadata": {"total_parameters": parameters, "total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
