"""Figures of a report, laid out in plain numbers for inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH = 720
HEIGHT = 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 14, 34


@dataclass(frozen=True)
class Column:
    """One bin: `kept` and `lost` rows from `low` to `high` tokens; the rest are pixels."""

    low: int
    high: int
    kept: int
    lost: int
    x: float
    width: float
    kept_y: float
    kept_height: float
    lost_y: float
    lost_height: float


@dataclass(frozen=True)
class Histogram:
    """Columns, ticks (pixel, label) and the pixel of a marked value."""

    columns: list[Column]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    mark: float
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    bottom: int = HEIGHT - _BOTTOM
    right: int = WIDTH - _RIGHT
    top: int = _TOP


def histogram(kept: np.ndarray, lost: np.ndarray, top: int, mark: int, bins: int = 48) -> Histogram:
    """Counts of `kept` and `lost` values from 0 to `top`, what is above in the last bin; `mark` gets a line."""
    edges = np.unique(np.linspace(0, top, bins + 1).round().astype(int))
    counts = [np.histogram(np.clip(v, 0, top), edges)[0] for v in (kept, lost)]
    most = max(1, int((counts[0] + counts[1]).max()))
    room, wide = HEIGHT - _TOP - _BOTTOM, WIDTH - _LEFT - _RIGHT
    columns = []
    for i, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        a, b = int(counts[0][i]), int(counts[1][i])
        x, width = _LEFT + wide * low / top, wide * (high - low) / top
        tall, more = room * a / most, room * b / most
        base = HEIGHT - _BOTTOM
        columns.append(
            Column(low, high, a, b, x, max(width - 1, 0.5), base - tall, tall, base - tall - more, more)
        )
    ticks = _ticks(top, 6)
    return Histogram(
        columns,
        [(_LEFT + wide * t / top, f"{t:,}") for t in ticks],
        [(HEIGHT - _BOTTOM - room * t / most, f"{t:,}") for t in _ticks(most, 4)],
        _LEFT + wide * min(mark / top, 1.0),
    )


def _ticks(top: int, about: int) -> list[int]:
    """Round numbers from 0 to `top`, about so many."""
    raw = max(top / about, 1)
    scale = 10 ** int(np.floor(np.log10(raw)))
    step = next(scale * m for m in (1, 2, 5, 10) if scale * m >= raw)
    return list(range(0, top + 1, int(step)))


@dataclass(frozen=True)
class Bar:
    """One dataset: all its tokens, and those that are trained."""

    name: str
    tokens: int
    trained: int
    share: float = 0.0
    trained_width: float = 0.0
    masked_width: float = 0.0


def bars(values: Sequence[Bar], width: int = 420) -> list[Bar]:
    """The same with shares of the whole and widths in pixels."""
    total = sum(v.tokens for v in values) or 1
    most = max((v.tokens for v in values), default=1)
    return [
        Bar(
            v.name,
            v.tokens,
            v.trained,
            v.tokens / total,
            width * v.trained / most,
            width * (v.tokens - v.trained) / most,
        )
        for v in values
    ]
