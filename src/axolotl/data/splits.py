"""`split:` in the config: names and slices such as `train[:500]`, `train[10%:20%]+test`."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from axolotl.errors import ConfigError, Place, Problem

_PART = re.compile(
    r"^\s*(?P<name>[\w.-]+)\s*(\[\s*(?P<start>-?[\d_]+\s*%?)?\s*:\s*(?P<stop>-?[\d_]+\s*%?)?\s*\])?\s*$"
)


@dataclass(frozen=True, slots=True)
class Bound:
    """One end of a slice: a number of rows, or percent of them; below 0, counted from the end."""

    value: int
    percent: bool


@dataclass(frozen=True, slots=True)
class Part:
    """One split, or a slice of it. `text` is the user's word."""

    name: str
    start: Bound | None
    stop: Bound | None
    text: str

    @property
    def whole(self) -> bool:
        return self.start is None and self.stop is None


def parse_split(text: str, place: Place) -> list[Part]:
    """The parts that a `split:` names, in order. Raises ConfigError for what cannot be read."""
    parts = []
    for piece in text.split("+"):
        match = _PART.match(piece)
        if match is None:
            raise ConfigError(
                Problem(
                    f"the split `{text}` cannot be read.",
                    "Write a name such as `train`, or a slice such as `train[:500]`, `train[10%:20%]`, `train[-100:]`.",
                    places=(place,),
                )
            )
        parts.append(Part(match["name"], _bound(match["start"]), _bound(match["stop"]), piece.strip()))
    return parts


def _bound(text: str | None) -> Bound | None:
    if text is None:
        return None
    number = text.replace("%", "").replace("_", "").strip()
    return Bound(int(number), "%" in text)


def ranges(parts: list[Part], total: int | None) -> tuple[list[tuple[int, int]], tuple[str, int] | None]:
    """Row numbers (start, stop) of each part of `total` rows, and the first slice that asks for more rows than there are."""
    found: list[tuple[int, int]] = []
    total = total or 0
    for part in parts:
        for bound in (part.start, part.stop):
            if bound is not None and abs(bound.value) > (100 if bound.percent else total):
                return [], (part.text, total)
        start = 0 if part.start is None else _absolute(part.start, total)
        stop = total if part.stop is None else _absolute(part.stop, total)
        found.append((start, max(start, stop)))
    return found, None


def _absolute(bound: Bound, total: int) -> int:
    if bound.percent:
        percent = bound.value if bound.value >= 0 else 100 + bound.value
        return round(percent * total / 100)
    return bound.value if bound.value >= 0 else total + bound.value


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` parts of a dataset whose rows are dealt out by `seed`."""

    count: int
    index: int
    seed: int


def shard_rows(total: int, shard: Shard) -> np.ndarray:
    """Which of `total` rows the shard holds (int64, in the order they were dealt)."""
    order = np.random.default_rng(shard.seed).permutation(total)
    size, over = divmod(total, shard.count)
    begin = size * shard.index + min(shard.index, over)
    return order[begin : begin + size + (shard.index < over)]
