"""Progress is told seldom, in one line, and only about work that lasts."""

from __future__ import annotations

import pytest

from axolotl.data import progress as module
from axolotl.data.progress import Progress


def test_the_line_has_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress("preparing a.jsonl", lambda: 10_000, already=2000)
    progress.done = 4000
    line = progress.text(progress.started + 4.0)
    assert line == "preparing a.jsonl: 4,000 of 10,000 rows, 500 rows/s, 12 s left"
    progress.done = 2010
    assert progress.text(progress.started + 10).endswith("1 rows/s, 2 h 13 min left")


def test_without_a_total_nothing_is_guessed() -> None:
    progress = Progress("preparing", lambda: None)
    progress.done = 300
    assert progress.text(progress.started + 3.0) == "preparing: 300 rows, 100 rows/s"


def test_plain_lines_come_every_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    said: list[str] = []
    asked: list[int] = []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module, "note", said.append)
    progress = Progress("preparing", lambda: asked.append(1) or 5000)
    for second in range(1, 5):
        clock[0] = float(second)
        progress.advance(100)
    assert not said, "work that is over at once is not talked about"
    assert not asked, "counting rows may take a while: only when there is something to say"
    for second in range(5, 16):
        clock[0] = float(second)
        progress.advance(100)
    assert len(said) == 3
    assert asked == [1]
