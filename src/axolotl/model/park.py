"""Where tensors wait between the forward and the backward pass: in CPU memory or on disk, and back in time.

On a GPU, copies run beside the computation: one on its way out, and the one that the backward pass will ask for next on
its way in. Without a GPU the same tickets are given out and the copies are plain ones.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

PIECE = 64 * 2**20
"""Bytes of pinned memory taken at a time: the allocator rounds up to powers of two, and whole tensors would lose half."""

WRITING = 2
"""Tensors that wait to be written to disk while the computation goes on."""


class Ticket(Protocol):
    """A tensor that waits somewhere."""

    def get(self) -> torch.Tensor:
        """The tensor, on its own device again."""
        ...


class Park(Protocol):
    """Takes tensors away and gives tickets for them."""

    def put(self, tensor: torch.Tensor) -> Ticket:
        """Takes a copy of a tensor; the caller drops its own."""
        ...


class PinnedPool:
    """Pieces of CPU memory that are used again from step to step."""

    def __init__(self, pin: bool) -> None:
        self.pin = pin
        self.free: dict[int, list[torch.Tensor]] = {}
        self.bytes = 0
        """Bytes taken so far."""

    def take(self, size: int) -> list[torch.Tensor]:
        """Pieces that hold `size` bytes together."""
        found = []
        while size > 0:
            part = min(size, PIECE)
            room = 1 << max(12, (part - 1).bit_length())
            waiting = self.free.get(room)
            if waiting:
                piece = waiting.pop()
            else:
                piece = torch.empty(room, dtype=torch.uint8, pin_memory=self.pin)
                self.bytes += room
            found.append(piece[:part])
            size -= part
        return found

    def give(self, pieces: list[torch.Tensor]) -> None:
        """Takes pieces back."""
        for piece in pieces:
            whole = piece._base if piece._base is not None else piece
            self.free.setdefault(whole.numel(), []).append(whole)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


class HostPark:
    """CPU memory: pinned, with streams of its own, where there is a GPU."""

    def __init__(self, device: torch.device, *, plain: bool = False) -> None:
        self.device = device
        self.asynchronous = device.type == "cuda" and not plain
        self.pool = PinnedPool(pin=self.asynchronous)
        self.out = torch.cuda.Stream(device) if self.asynchronous else None
        self.back = torch.cuda.Stream(device) if self.asynchronous else None
        self.leaving: _HostTicket | None = None
        self.order: list[weakref.ref[_HostTicket]] = []

    def put(self, tensor: torch.Tensor) -> _HostTicket:
        """Starts the copy; the memory on the GPU is free again when the next tensor is put."""
        self.settle()
        ticket = _HostTicket(self, tensor, len(self.order))
        self.order.append(weakref.ref(ticket))
        return ticket

    def settle(self) -> None:
        """Lets go of the tensor that is on its way out, once the copy is done as the device sees it."""
        if self.leaving is not None:
            self.leaving.left()
            self.leaving = None

    def before(self, place: int) -> _HostTicket | None:
        """The ticket given out before this one that still waits."""
        for reference in reversed(self.order[:place]):
            ticket = reference()
            if ticket is not None and not ticket.fetched:
                return ticket
        return None

    def done(self, place: int) -> None:
        """A tensor is back: what stands behind it in the order is forgotten."""
        while self.order and ((t := self.order[-1]()) is None or t.fetched):
            self.order.pop()


class _HostTicket:
    """A tensor in CPU memory."""

    def __init__(self, park: HostPark, tensor: torch.Tensor, place: int) -> None:
        self.park, self.place = park, place
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.fetched = False
        self.here: torch.Tensor | None = None
        self._event: Any = None
        size = tensor.numel() * tensor.element_size()
        self.pieces = park.pool.take(size)
        weakref.finalize(self, park.pool.give, self.pieces)
        flat = _bytes(tensor.contiguous())
        if park.out is None or park.back is None:
            self._copy_out(flat)
            return
        park.out.wait_stream(torch.cuda.current_stream(park.device))
        # The pieces may have been read from a moment ago.
        park.out.wait_stream(park.back)
        with torch.cuda.stream(park.out):
            self._copy_out(flat)
            self._event = park.out.record_event()
        self.here, park.leaving = flat, self

    def _copy_out(self, flat: torch.Tensor) -> None:
        start = 0
        for piece in self.pieces:
            piece.copy_(flat[start : start + piece.numel()], non_blocking=True)
            start += piece.numel()

    def left(self) -> None:
        """The computation goes on only after the copy, so the memory may be written again."""
        if self.here is not None and not self.fetched:
            torch.cuda.current_stream(self.park.device).wait_event(self._event)
            self.here = None

    def fetch(self) -> None:
        """Starts the way back."""
        if self.fetched:
            return
        self.fetched = True
        park = self.park
        if self.here is not None:
            # It has not left yet.
            self._event = None
            if park.leaving is self:
                park.leaving = None
            return
        size = sum(piece.numel() for piece in self.pieces)
        flat = torch.empty(size, dtype=torch.uint8, device=park.device)
        if park.back is None:
            self._copy_back(flat)
        else:
            park.back.wait_stream(torch.cuda.current_stream(park.device))
            with torch.cuda.stream(park.back):
                self._copy_back(flat)
                self._event = park.back.record_event()
        self.here = flat

    def _copy_back(self, flat: torch.Tensor) -> None:
        start = 0
        for piece in self.pieces:
            flat[start : start + piece.numel()].copy_(piece, non_blocking=True)
            start += piece.numel()

    def get(self) -> torch.Tensor:
        """The tensor; the one that was put before it starts on its way back."""
        if self.fetched and self.here is None:
            # Asked for once more: the pieces still hold it.
            self.fetched, self._event = False, None
        self.fetch()
        flat, self.here = self.here, None
        assert flat is not None
        if self._event is not None:
            torch.cuda.current_stream(self.park.device).wait_event(self._event)
        self.park.done(self.place)
        earlier = self.park.before(self.place)
        if earlier is not None:
            earlier.fetch()
        return flat.view(self.dtype).view(self.shape)


class DiskPark:
    """Files in a folder of its own, written and read by threads; for contexts that no CPU memory holds."""

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self.device = device
        self._folder = tempfile.TemporaryDirectory(prefix="axolotl-activations-", dir=folder)
        self.folder = Path(self._folder.name)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="axolotl-park")
        self._writing: deque[Future[None]] = deque()
        self.order: list[weakref.ref[_DiskTicket]] = []
        self.count = 0

    def put(self, tensor: torch.Tensor) -> _DiskTicket:
        """Copies a tensor to CPU memory and has it written."""
        ticket = _DiskTicket(self, tensor, self.folder / f"{self.count}.bin")
        self.count += 1
        self.order = [each for each in self.order if each() is not None]
        self.order.append(weakref.ref(ticket))
        return ticket

    def write(self, file: Path, host: np.ndarray[Any, Any]) -> Future[None]:
        """Has a file written. A disk that is slower than the computation holds it up, so that memory does not fill."""
        while len(self._writing) > WRITING:
            self._writing.popleft().result()
        self._writing.append(self._threads.submit(lambda: _write(file, host)))
        return self._writing[-1]

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Has a thread do something."""
        return self._threads.submit(work)

    def before(self, ticket: _DiskTicket) -> _DiskTicket | None:
        """The ticket given out before this one that still waits."""
        waiting = [t for each in self.order if (t := each()) is not None]
        at = waiting.index(ticket)
        return waiting[at - 1] if at else None


class _DiskTicket:
    """A tensor in a file."""

    def __init__(self, park: DiskPark, tensor: torch.Tensor, file: Path) -> None:
        self.park, self.file = park, file
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        host = _bytes(tensor.contiguous()).to("cpu", copy=True).numpy()
        self._written = park.write(file, host)
        self._read: Future[torch.Tensor] | None = None
        weakref.finalize(self, _remove, file)

    def fetch(self) -> None:
        """Starts reading."""
        if self._read is None:
            written, file = self._written, self.file

            def read() -> torch.Tensor:
                written.result()
                return torch.from_numpy(np.fromfile(file, dtype=np.uint8))

            self._read = self.park.submit(read)

    def get(self) -> torch.Tensor:
        """The tensor; the one that was put before it starts to be read. Raises OSError where the disk refused."""
        self.fetch()
        assert self._read is not None
        flat = self._read.result()
        earlier = self.park.before(self)
        if earlier is not None:
            earlier.fetch()
        return flat.to(self.device).view(self.dtype).view(self.shape)


def _write(file: Path, host: np.ndarray[Any, Any]) -> None:
    with file.open("wb") as opened:
        host.tofile(opened)


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(file)
