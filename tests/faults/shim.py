"""Faults of a disk, made inside the process: calls that touch a folder fail or write less than they were asked to.

A fault is {"kind", "under", "at", "times"}: calls on paths below `under`, from the `at`-th on, `times` of them fail.

enospc, eio, erofs   open for writing, write, fsync, rename and mkdir raise that error
short                write takes only a part of what it is given
fsize                no file may grow beyond `bytes`; enforced by the kernel, so it meets native code as well
oom                  the forward pass of the `at`-th batches runs out of memory
nan                  the loss of these batches is no number
tracker              from the `at`-th line on, the tracker's server takes the connection and never answers
clock                the time of day leaps, by up to twenty years forwards or backwards, at these calls of time.time
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import resource
import socket
import time
from collections.abc import Callable
from typing import Any

ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "erofs": errno.EROFS}


MARK = "(the fault is injected here)"
TELL = os.write


class Counter:
    """Says of each call whether it fails."""

    def __init__(self, at: int, times: int) -> None:
        self.at, self.times, self.calls = at, times, 0

    def hit(self) -> bool:
        self.calls += 1
        met = self.at <= self.calls < self.at + self.times
        if met and self.calls == self.at:
            TELL(2, MARK.encode() + b"\n")
        return met


def install(fault: dict[str, Any]) -> None:
    """Puts the fault into this process."""
    kind, at, times = fault["kind"], int(fault.get("at", 1)), int(fault.get("times", 1))
    if kind == "fsize":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault["bytes"]), resource.RLIM_INFINITY))
    elif kind in ("oom", "nan"):
        _compute(kind, Counter(at, times))
    elif kind == "clock":
        _clock(Counter(at, times), random.Random(fault.get("seed", 0)))
    elif kind == "tracker":
        _tracker(Counter(at, times))
    elif kind == "short":
        _short(os.path.abspath(fault["under"]), Counter(at, times))
    else:
        _disk(ERRORS[kind], os.path.abspath(fault["under"]), Counter(at, times))


def _below(path: Any, folder: str) -> bool:
    if isinstance(path, int):
        try:
            path = os.readlink(f"/proc/self/fd/{path}")
        except OSError:
            return False
    try:
        return os.path.abspath(os.fsdecode(path)).startswith(folder)
    except TypeError:
        return False


def _disk(number: int, folder: str, counter: Counter) -> None:
    def failing(call: Callable[..., Any], touches: Callable[..., bool]) -> Callable[..., Any]:
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if args and _below(args[0], folder) and touches(*args, **kwargs) and counter.hit():
                raise OSError(number, os.strerror(number), str(args[0]))
            return call(*args, **kwargs)

        return replaced

    def writes(path: Any, mode: Any = "r", *rest: Any, **options: Any) -> bool:
        return any(letter in str(mode) for letter in "wax+")

    def opens(path: Any, flags: int = 0, *rest: Any, **options: Any) -> bool:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    builtins.open = io.open = failing(io.open, writes)  # type: ignore[assignment]
    os.open = failing(os.open, opens)
    for name in ("write", "fsync", "replace", "rename", "mkdir", "truncate", "unlink"):
        setattr(os, name, failing(getattr(os, name), lambda *a, **k: True))


def _short(folder: str, counter: Counter) -> None:
    whole = os.write

    def write(handle: int, data: Any) -> int:
        if _below(handle, folder) and counter.hit():
            return whole(handle, bytes(data)[: max(1, len(data) // 3)])
        return whole(handle, data)

    os.write = write


def _clock(counter: Counter, draw: random.Random) -> None:
    plain, off = time.time_ns, [0]

    def time_ns() -> int:
        if counter.hit():
            off[0] = draw.randint(-(20 * 365 * 86400), 20 * 365 * 86400) * 10**9
        return plain() + off[0]

    time.time_ns = time_ns
    time.time = lambda: time_ns() / 1e9


def _tracker(counter: Counter) -> None:
    from transformers.integrations.integration_utils import TensorBoardCallback

    server, plain = socket.create_server(("127.0.0.1", 0)), TensorBoardCallback.on_log

    def on_log(self: Any, *args: Any, **kwargs: Any) -> None:
        if counter.hit():
            socket.create_connection(server.getsockname()).recv(1)
        plain(self, *args, **kwargs)

    TensorBoardCallback.on_log = on_log


def _compute(kind: str, counter: Counter) -> None:
    import torch

    from axolotl.train.trainer import TrainerMixin

    plain = TrainerMixin.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and counter.hit():
            if kind == "oom":
                raise torch.OutOfMemoryError("CUDA out of memory (made up).")
            return plain(self, model, inputs, *args, **kwargs) * float("nan")
        return plain(self, model, inputs, *args, **kwargs)

    TrainerMixin.compute_loss = compute_loss
