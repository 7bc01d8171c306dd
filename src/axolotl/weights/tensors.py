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
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from axolotl.errors import ModelError
from axolotl.model.files import TensorEntry
from axolotl.weights.direct import PAGE, Buffer, OutputFile

T = TypeVar("T")
_CHUNK = 2**26
# Bytes of a file that one thread works on at a time.
_PIECE = 2**21
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
    """Writes one safetensors file whose tensors are known beforehand, in any order, by their place in the file.

    Tensors that fill whole pages come first, so that nearly all of the file can be written past the page cache.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self.path, self._specs = path, dict(specs)
        self._waiting = set(self._specs)
        table: dict[str, object] = {"__metadata__": dict(metadata) or {"format": "pt"}}
        at = 0
        places: dict[str, int] = {}
        for name in sorted(self._specs, key=lambda n: self._specs[n].nbytes % PAGE != 0):
            spec = self._specs[name]
            places[name] = at
            table[name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [at, at + spec.nbytes],
            }
            at += spec.nbytes
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % (PAGE if at >= PAGE else 8))
        self._header = struct.pack("<Q", len(text)) + text
        self._size = len(self._header) + at
        self._places = {name: len(self._header) + place for name, place in places.items()}
        self._threads = torch.get_num_threads()
        self._own = threading.local()
        self._file: OutputFile
        self._pool: ThreadPoolExecutor
        self._under_way: deque[Future[Any]] = deque()

    def __enter__(self) -> ShardWriter:
        self._file = OutputFile(self.path, self._size)
        # While some wait for the disk, others compute.
        self._pool = ThreadPoolExecutor(self._threads + 2)
        self._file.write(memoryview(self._header), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait_for(0)
        except BaseException as failure:
            kind, error, trace = type(failure), failure, failure.__traceback__
            raise
        finally:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)
            self._file.__exit__(kind, error, trace)
        if kind is None and self._waiting:
            raise RuntimeError(f"{self.path} was closed before all its tensors were written")

    def _place(self, name: str, dtype: str, shape: tuple[int, ...]) -> int:
        self._waiting.remove(name)
        if self._specs[name] != Spec(dtype, shape):
            raise RuntimeError(f"{self.path}: `{name}` is {dtype} {shape}, announced as {self._specs[name]}")
        return self._places[name]

    def _submit(self, work: Callable[[int], T], starts: range) -> list[Future[T]]:
        """Does `work` for each start beside what is being done already; waits while much of it is under way."""
        made = []
        for start in starts:
            self._wait_for(4 * self._threads + 4)
            made.append(self._pool.submit(work, start))
            self._under_way.append(made[-1])
        return made

    def _wait_for(self, left: int) -> None:
        while len(self._under_way) > left:
            self._under_way.popleft().result()

    def _buffer(self, size: int) -> Buffer:
        """Memory of this thread for a piece of the file."""
        held: Buffer | None = getattr(self._own, "buffer", None)
        if held is None or held.size < size:
            self._own.buffer = held = Buffer(size)
        return held

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor from memory."""
        at = self._place(name, NAMES[tensor.dtype], tuple(tensor.shape))
        if not tensor.numel():
            return
        data = _bytes_of(tensor.detach().cpu().contiguous())

        def work(start: int) -> None:
            self._file.write(data[start : start + _PIECE], at + start)

        for piece in self._submit(work, range(0, len(data), _PIECE)):
            piece.result()

    def copy(self, name: str, source: Path, entry: TensorEntry) -> None:
        """A tensor byte by byte from another file; it may still be under way afterwards."""
        at = self._place(name, entry.dtype, entry.shape)

        def work(start: int) -> None:
            count = min(_PIECE, entry.nbytes - start)
            with source.open("rb", buffering=0) as file:
                if not self._file.direct:
                    _copy_range(
                        file.fileno(), self._file.plain, source, count, entry.start + start, at + start
                    )
                    return
                data = _bytes_of(self._buffer(count).piece(at + start, count))
                _read_at(file.fileno(), source, data, entry.start + start)
                self._file.write(data, at + start)

        self._submit(work, range(0, entry.nbytes, _PIECE))

    def rewrite(
        self, name: str, source: Path, entry: TensorEntry, change: Callable[[int, torch.Tensor], T], rows: int
    ) -> Callable[[], list[T]]:
        """A tensor from another file, changed on the way in blocks of `rows` rows that are worked on side by side.

        `change(first_row, block)` changes the block itself; what it returns for all blocks is given by the function
        that is returned, which waits for them.
        """
        at = self._place(name, entry.dtype, entry.shape)
        dtype, width = DTYPES[entry.dtype], entry.nbytes // entry.shape[0]
        whole_pages = PAGE // math.gcd(PAGE, width)  # rows that fill pages
        if rows > whole_pages:
            rows -= rows % whole_pages
        several = rows * max(1, _PIECE // (rows * width))
        torch.set_num_threads(1)  # whole blocks side by side, instead of many threads in each small product

        def work(first: int) -> list[T]:
            last = min(first + several, entry.shape[0])
            place, count = at + first * width, (last - first) * width
            data = self._buffer(count).piece(place, count)
            with source.open("rb", buffering=0) as file:
                _read_at(file.fileno(), source, _bytes_of(data), entry.start + first * width)
            values = data.view(dtype).view(last - first, *entry.shape[1:])
            found = [change(first + i, values[i : i + rows]) for i in range(0, last - first, rows)]
            self._file.write(_bytes_of(data), place)
            return found

        pieces = self._submit(work, range(0, entry.shape[0], several))
        return lambda: [each for piece in pieces for each in piece.result()]


def not_finite(tensor: torch.Tensor) -> int:
    """How many numbers of a tensor are infinite or NaN."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    wide = tensor if tensor.element_size() > 1 else tensor.float()
    # A sum takes one pass and no mask; it is not finite where one of its numbers is not.
    if math.isfinite(float(wide.sum(dtype=torch.float64 if wide.element_size() == 8 else torch.float32))):
        return 0
    return int((~wide.isfinite()).sum())


def larger(a: float, b: float) -> float:
    """The greater of two; NaN where one is, which `max` may drop."""
    return b if math.isnan(b) or b > a else a


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    data: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(data)


def _read_at(file: int, path: Path, data: memoryview, at: int) -> None:
    while data:
        count = os.preadv(file, [data[:_CHUNK]], at)
        if not count:
            raise ModelError(f"`{path}` ends before its last tensor.", "Copy or download the file again.")
        data, at = data[count:], at + count


def _copy_range(source: int, target: int, path: Path, count: int, start: int, at: int) -> None:
    """Copies bytes between files, inside the kernel where it can."""
    while count and hasattr(os, "copy_file_range"):
        try:
            done = os.copy_file_range(source, target, count, start, at)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            break
        if not done:
            break
        count, start, at = count - done, start + done, at + done
    if count:
        data = memoryview(bytearray(count))
        _read_at(source, path, data, start)
        while data:
            done = os.pwrite(target, data, at)
            data, at = data[done:], at + done


def make_index(layout: Mapping[str, Sequence[str]], total_bytes: int, parameters: int) -> dict[str, object]:
    """The index of a model in several files: `layout` maps each file to its tensors."""
    weight_map = {tensor: file for file, tensors in layout.items() for tensor in tensors}
    return {
        "metadata": {"total_parameters": parameters, "total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
