"""A file that is written past the page cache, from buffers that are used again.

Gigabytes that go through the page cache first push out what else is in it, and where memory is handed out by a
virtual machine's host each fresh page costs more time than its numbers. Each page is written once, and whole; the
pages that two pieces share wait until both are there.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

# Offsets, lengths and addresses of direct writes are multiples of this: of a page, and of every disk's blocks.
PAGE = max(4096, mmap.PAGESIZE)
_CHUNK = 2**26


class Buffer:
    """Memory of `size` bytes for pieces of a file, laid out so that a piece can be written as it lies there."""

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size + 2 * PAGE)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.size = size

    def piece(self, at: int, count: int) -> torch.Tensor:
        """`count` bytes whose address has the same distance from a page as `at`, their place in the file."""
        return self._bytes[at % PAGE : at % PAGE + count]


class OutputFile:
    """A file of `size` bytes, written in pieces by several threads. Raises OSError, also where the disk is full."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._lock = threading.Lock()
        self._shared: dict[int, tuple[bytearray, int]] = {}
        """Pages that are not yet written, by number: what they hold so far and how many bytes of it are there."""
        self._own = threading.local()
        self.plain = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._direct: int | None = None
        try:
            os.truncate(self.plain, size)
            self._direct = _opened_past_the_cache(path)
            if self.direct:
                _reserve(self.plain, size)
        except BaseException:
            self._close()
            raise

    @property
    def direct(self) -> bool:
        """Whether the file system can write past the page cache."""
        return self._direct is not None

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for number, (page, _) in sorted(self._shared.items()):
                    _write_all(self.plain, memoryview(page)[: self.size - number * PAGE], number * PAGE)
        finally:
            self._close()

    def _close(self) -> None:
        os.close(self.plain)
        if self._direct is not None:
            os.close(self._direct)

    def write(self, data: memoryview, at: int) -> None:
        """Writes bytes to their place. Those of a `Buffer.piece` for that place are not copied before."""
        if self._direct is None:
            _write_all(self.plain, data, at)
            return
        first = min(-(-at // PAGE) * PAGE, at + len(data))
        last = max(first, (at + len(data)) // PAGE * PAGE)
        self._share(data[: first - at], at)
        self._share(data[last - at :], last)
        middle = data[first - at : last - at]
        if not middle:
            return
        if _address(middle) % PAGE == 0:
            self._past_the_cache(middle, first)
            return
        if not hasattr(self._own, "buffer"):
            self._own.buffer = mmap.mmap(-1, 2**20)
        while middle:
            count = min(len(middle), len(self._own.buffer))
            self._own.buffer[:count] = middle[:count]
            self._past_the_cache(memoryview(self._own.buffer)[:count], first)
            middle, first = middle[count:], first + count

    def _past_the_cache(self, data: memoryview, at: int) -> None:
        assert self._direct is not None
        try:
            _write_all(self._direct, data, at)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _write_all(self.plain, data, at)  # a file system that opens such files, and wants larger blocks

    def _share(self, data: memoryview, at: int) -> None:
        """Keeps the bytes of a page that other pieces fill too, until it is full."""
        while data:
            number, start = divmod(at, PAGE)
            count = min(len(data), PAGE - start)
            with self._lock:
                page, held = self._shared.pop(number, (bytearray(PAGE), 0))
                page[start : start + count] = data[:count]
                full = held + count == PAGE
                if not full:
                    self._shared[number] = page, held + count
            if full:
                aligned = mmap.mmap(-1, PAGE)
                aligned[:] = bytes(page)
                self._past_the_cache(memoryview(aligned), number * PAGE)
            data, at = data[count:], at + count


def _opened_past_the_cache(path: Path) -> int | None:
    """The file for direct writes; None where the system or its file system has none."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return None


def _reserve(file: int, size: int) -> None:
    """Gives the file its blocks in one piece, where the file system can; a disk without room for them is told here."""
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (AttributeError, OSError):
        return
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if size and fallocate(file, 0, 0, size) != 0 and ctypes.get_errno() == errno.ENOSPC:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _address(data: memoryview) -> int:
    return int(np.frombuffer(data, np.uint8).__array_interface__["data"][0])


def _write_all(file: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(file, data[:_CHUNK], at)
        data, at = data[count:], at + count
