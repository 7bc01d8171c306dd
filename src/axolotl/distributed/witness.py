"""A tiny process beside a command that says in words when the kernel has ended the command for want of memory.

The command itself gets no chance to speak then, and "Killed" is all that a shell knows. The witness is forked before any
library is loaded, holds nothing, and changes nothing for the command: its number, signals and exit code stay its own.
Imports no torch.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from axolotl import console
from axolotl.config.host import Ram, bytes_as_gib, oom_kills, ram
from axolotl.distributed.exits import killed
from axolotl.distributed.failure import among_several, started_by_us
from axolotl.errors import Problem

TOLD_BY = "AXOLOTL_TOLD_BY"
"""Set for commands whose starter tells of their end: they have no witness."""
LOOK_SECONDS = 1.0
_FAREWELL = b"."
_IGNORED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT")

_to_witness: tuple[int, int] | None = None
"""The pipe's end and the number of the witness of this process."""


@contextmanager
def witnessed(verb: str) -> Iterator[None]:
    """Has a witness beside `axolotl VERB`, which goes on inside.

    Without one on systems without fork, in processes that somebody else looks after, and where threads run already.
    """
    global _to_witness
    others = among_several() or started_by_us() or bool(os.environ.get(TOLD_BY))
    if (
        others
        or not sys.platform.startswith("linux")
        or "torch" in sys.modules
        or threading.active_count() > 1
    ):
        yield
        return
    kills, main = oom_kills(), os.getpid()
    heard, speaks = os.pipe()
    try:
        child = os.fork()
    except OSError:  # no process more is allowed here
        os.close(heard)
        os.close(speaks)
        yield
        return
    if child == 0:
        try:
            os.close(speaks)
            _witness(heard, kills, main, verb)
        finally:
            os._exit(0)
    os.close(heard)
    _to_witness = (speaks, child)
    try:
        yield
    finally:
        # A fork of this process that comes by here has no witness.
        if os.getpid() == main:
            farewell()


def farewell() -> None:
    """Tells the witness that this process ends, or becomes another program, of its own accord."""
    global _to_witness
    if _to_witness is None:
        return
    (speaks, child), _to_witness = _to_witness, None
    with suppress(OSError):
        os.write(speaks, _FAREWELL)
    os.close(speaks)
    with suppress(OSError):
        os.waitpid(child, 0)


def _witness(heard: int, kills: int, main: int, verb: str) -> None:
    """Waits for the end of the command, and says what can be said of it."""
    for name in _IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    # Whoever reads the command's output shall see its end when the command ends.
    for descriptor in (0, 1):
        with suppress(OSError):
            os.close(descriptor)
    ends = [heard]
    with suppress(OSError, AttributeError):
        # Processes that the command forks hold the pipe open beyond its end.
        ends.append(os.pidfd_open(main))
    last = ram()
    while not select.select(ends, [], [], LOOK_SECONDS)[0]:
        last = ram()
    said = os.read(heard, 1) if select.select([heard], [], [], 0)[0] else b""
    if said != _FAREWELL and (told := told_of(last, oom_kills() - kills, verb)):
        console.show_problem(told)


def told_of(last: Ram, kernel_kills: int, verb: str) -> Problem | None:
    """What is told of a command that ended without a farewell; None where nothing speaks of memory.

    `last`: the memory that was left when it was looked at last, within a second of the end.
    """
    if not kernel_kills and not last.nearly_out:
        return None  # somebody ended it, and knows
    problem = killed(f"`axolotl {verb}`", kernel_kills, verb)
    left = f"{bytes_as_gib(last.free)} of the {last.limit}'s {bytes_as_gib(last.total)} were left shortly before."
    return replace(problem, message=f"{problem.message} {left}") if last.total else problem
