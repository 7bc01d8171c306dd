"""The grid of GPU runs: which there are, and which are held out."""

from __future__ import annotations

from collections import Counter

from scripts import script

grid = script("grid_points").grid


def test_the_grid_is_balanced_wherever_it_is_broken_off() -> None:
    points = grid()
    assert len({p["name"] for p in points}) == len(points) == 48
    for i in range(0, 48, 3):
        assert sum(p["held_out"] for p in points[i : i + 3]) == 1
    held = [p for p in points if p["held_out"]]
    assert {p["model"] for p in held} == {p["model"] for p in points}
    assert min(Counter(p["adapter"] for p in held)[a] for a in (None, "lora", "qlora")) >= 4
    for what in ("recompute", "packed", "keys"):
        assert 0 < sum(bool(p[what]) for p in held) < len(held), what
    assert {p["model"] for p in points[:8]} == {p["model"] for p in points}
    assert {p["length"] for p in points} >= {1024, 2048, 4096, 8192, 16384, 32768}
