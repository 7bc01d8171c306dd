"""Keeping an eye on RAM while data is prepared and weights are loaded: a word before the kernel ends the process."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from axolotl import console
from axolotl.config.host import Ram, bytes_as_gib, memory_stalls, ram
from axolotl.errors import EnvironmentProblem, Problem

EVERY_SECONDS = 1.0
OFTEN = 0.05
"""Seconds between two looks where memory may go by a GiB a second."""
LOOKS = 3
"""So many in a row have to find nothing left: what one finds may be on its way back already."""
STALLED = 0.1
"""Share of the time that is lost in waiting for memory where it is really used up."""
LASTS = 1.0
"""Seconds: what lasts longer at the pace at which it goes is no end yet."""
FOR_DATA = "Set `dataset_num_proc: 1`, end other programs, or give the container more memory."
FOR_WEIGHTS = "End other programs, give the container more memory, or take a smaller model."


@contextmanager
def within_ram(
    what: str,
    look: Callable[[], Ram] = ram,
    every: float = EVERY_SECONDS,
    *,
    remedy: str = FOR_DATA,
    end: Callable[[EnvironmentProblem], None] | None = None,
    stalls: Callable[[], float | None] = memory_stalls,
) -> Iterator[None]:
    """Warns once when memory runs short inside. `what` is what goes on, as in "while the data is prepared".

    `end` is called, in a thread, with the error to tell when hardly anything is left and the kernel is about to end the
    process: it ends it. A run that gets along with the little that is left is let alone.
    `stalls`: see `memory_stalls`.
    """
    over = threading.Event()

    def watch() -> None:
        told = False
        row: deque[_Look] = deque(maxlen=LOOKS)
        while not over.wait(every):
            now = look()
            if not now.gone:
                row.clear()
            elif end is not None:
                row.append(_Look(time.monotonic(), now.free + now.swap, stalls()))
            if end is not None and _at_its_end(row):
                end(EnvironmentProblem(_gone(now, what, remedy)))
                return
            if not told and now.nearly_out:
                told = True
                console.show_problem(_short(now, what, remedy))
                if end is None:
                    return

    thread = threading.Thread(target=watch, name="memory watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass(frozen=True)
class _Look:
    at: float
    left: int
    stalled: float | None


def _at_its_end(row: Sequence[_Look]) -> bool:
    """Whether these looks, which all found hardly anything left, are those of a process that the kernel soon ends.

    Where the kernel counts how long is waited for memory, that decides; else whether what is left is going.
    """
    if len(row) < LOOKS:
        return False
    first, last = row[0], row[-1]
    seconds = max(last.at - first.at, 1e-6)
    if first.stalled is not None and last.stalled is not None:
        return last.stalled - first.stalled >= STALLED * seconds
    return first.left >= last.left and (first.left - last.left) / seconds * LASTS >= last.left


def _left(now: Ram) -> str:
    return f"{bytes_as_gib(now.free)} of the {now.limit}'s {bytes_as_gib(now.total)} are left"


def _short(now: Ram, what: str, remedy: str) -> Problem:
    return Problem(
        f"Memory is nearly used up {what}: {_left(now)}. The kernel ends the process (exit code -9) when nothing is.",
        remedy,
        "warning",
        code="AX1405",
    )


def _gone(now: Ram, what: str, remedy: str) -> Problem:
    return Problem(
        f"Memory was used up {what} ({_left(now)}), so this run ended itself before the kernel did.",
        remedy,
        "environment",
        code="AX1405",
    )
