"""Curves over the steps of a run, laid out in plain numbers for inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from axolotl.report.figures import HEIGHT, WIDTH

LEFT, RIGHT, TOP, BOTTOM = 64, 12, 14, 34
MOST_POINTS = 600

Point = tuple[float, float]
"""(step, value)"""


@dataclass(frozen=True)
class Curve:
    """Lines (each a string of SVG points), single points (x, y, what it is), and ticks (pixel, label)."""

    name: str
    unit: str
    lines: list[str]
    dots: list[tuple[float, float, str]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    last: str
    """The last value, as text."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def curve(name: str, unit: str, points: Sequence[Point], dots: Sequence[Point] = ()) -> Curve | None:
    """The layout of a curve; None where there is no finite value. A value that is not finite leaves a gap."""
    shown = [*points, *dots]
    finite = [v for _, v in shown if math.isfinite(v)]
    if not finite:
        return None
    first, last = min(s for s, _ in shown), max(s for s, _ in shown)
    low, high = min(finite), max(finite)
    # A curve that is nearly flat should look flat.
    pad = max(0.05 * (high - low), 1e-3 * max(abs(high), 1e-12))
    low, high = (0.0 if low >= 0 and low < 0.3 * high else low - pad), high + pad
    wide, room = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(step: float) -> float:
        return LEFT + wide * (step - first) / max(last - first, 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - room * (value - low) / (high - low)

    lines, stretch = [], []
    for step, value in thinned(points):
        if math.isfinite(value):
            stretch.append(f"{x(step):.1f},{y(value):.1f}")
        elif stretch:
            lines.append(" ".join(stretch))
            stretch = []
    if stretch:
        lines.append(" ".join(stretch))
    marks = [(x(s), y(v), f"step {s:g}: {number(v)}") for s, v in dots if math.isfinite(v)]
    ending = [v for _, v in points if math.isfinite(v)] or finite
    return Curve(
        name,
        unit,
        lines,
        marks,
        [(x(t), f"{t:,.0f}") for t in ticks(first, last, 6, whole=True)],
        [(y(t), number(t)) for t in ticks(low, high, 4)],
        number(ending[-1]),
    )


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about so many points: the means of neighbours. A value that is not finite stays one."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return list(points)
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [(group[-1][0], sum(v for _, v in group) / len(group)) for group in groups]


def ticks(low: float, high: float, about: int, *, whole: bool = False) -> list[float]:
    """Round numbers between two values, about so many."""
    raw = (high - low) / about
    if whole:
        raw = max(raw, 1.0)
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(scale * m for m in (1, 2, 5, 10) if scale * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number of four digits or so, without needless zeros."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
