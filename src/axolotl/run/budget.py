"""Keeping an eye on RAM while data is prepared and weights are loaded: a warning before the kernel ends the process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from axolotl import console
from axolotl.config.host import Ram, bytes_as_gib, ram
from axolotl.errors import Problem

EVERY_SECONDS = 1.0


@contextmanager
def within_ram(what: str, look: Callable[[], Ram] = ram, every: float = EVERY_SECONDS) -> Iterator[None]:
    """Warns once when memory runs short inside. `what` is what goes on, as in "while the data is prepared"."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every):
            now = look()
            if now.nearly_out:
                console.show_problem(_short(now, what))
                return

    thread = threading.Thread(target=watch, name="memory watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _short(now: Ram, what: str) -> Problem:
    return Problem(
        f"Memory is nearly used up {what}: {bytes_as_gib(now.free)} of the {now.limit}'s {bytes_as_gib(now.total)} are "
        "left. The kernel ends the process (exit code -9) when nothing is.",
        "Set `dataset_num_proc: 1`, end other programs, or give the container more memory.",
        "warning",
        code="AX1405",
    )
