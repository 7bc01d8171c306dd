"""Keeping an eye on RAM while data is prepared and weights are loaded: a word before the kernel ends the process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from axolotl import console
from axolotl.config.host import Ram, bytes_as_gib, ram
from axolotl.errors import EnvironmentProblem, Problem

EVERY_SECONDS = 1.0
OFTEN = 0.05
"""Seconds between two looks where memory may go by a GiB a second."""
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
) -> Iterator[None]:
    """Warns once when memory runs short inside. `what` is what goes on, as in "while the data is prepared".

    `end` is called, in a thread, with the error to tell when hardly anything is left: it ends the process.
    """
    over = threading.Event()

    def watch() -> None:
        told = False
        while not over.wait(every):
            now = look()
            if end is not None and now.gone:
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
