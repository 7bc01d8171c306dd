"""Progress of a long preparation on stderr: a live line on a terminal, else a plain line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property

from axolotl.console import is_main_process, note, stderr

_PLAIN_EVERY = 5.0
_LIVE_EVERY = 0.2


class Progress:
    """Counts rows. `total` is asked for when there is something to say, and None where it is not known.

    Says nothing about work that is over at once.
    """

    def __init__(self, what: str, total: Callable[[], int | None], already: int = 0) -> None:
        self.what, self.done, self.already = what, already, already
        self._ask = total
        self.started = self.shown = time.monotonic()
        self._live = is_main_process() and stderr().is_terminal
        self._width = 0

    def advance(self, rows: int) -> None:
        self.done += rows
        now = time.monotonic()
        if now - self.shown < (_LIVE_EVERY if self._live else _PLAIN_EVERY):
            return
        self.shown = now
        text = self.text(now)
        if self._live:
            self._write(text)
        else:
            note(text)

    @cached_property
    def total(self) -> int | None:
        return self._ask()

    def text(self, now: float) -> str:
        """`preparing data.jsonl: 12,000 of 100,000 rows, 6,100 rows/s, 14 s left`."""
        seconds = max(now - self.started, 1e-6)
        rate = (self.done - self.already) / seconds
        of = f" of {self.total:,}" if self.total and self.total >= self.done else ""
        parts = [f"{self.what}: {self.done:,}{of} rows", f"{rate:,.0f} rows/s"]
        if of and self.total and rate > 0:
            parts.append(f"{_duration((self.total - self.done) / rate)} left")
        return ", ".join(parts)

    def close(self) -> None:
        """Takes the live line away."""
        if self._live and self._width:
            self._write("")

    def _write(self, text: str) -> None:
        columns = stderr().width - 1
        text = text[:columns]
        file = stderr().file
        file.write("\r" + text.ljust(self._width) + ("\r" if not text else ""))
        file.flush()
        self._width = len(text)


def _duration(seconds: float) -> str:
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
