"""Steps that are out of the ordinary: losses and gradients far above their usual range, and the rows they came from.

What is usual is the median of the last steps, and how far is counted in robust deviations: 1.4826 times the median
distance from that median, which for normal noise is its standard deviation. Single wild steps change neither.

{output_dir}/anomalies.jsonl    one line for each such step: what, value, median, spread, deviations, the rows
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.data.types import IGNORE_INDEX

if TYPE_CHECKING:
    from axolotl.train.trainer import TrainerMixin

FILE = "anomalies.jsonl"
WINDOW, LEAST = 128, 20  # steps that say what is usual; fewer than the second say nothing
LOSS_FLOOR, NORM_FLOOR = 0.02, 0.1  # least spread: a share of the median loss; in logarithms of the norm
KEPT = 200  # steps whose rows are written down
SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class Spike:
    """A figure far above its usual range."""

    what: str
    value: float
    median: float
    spread: float
    """A robust deviation: of the loss itself; of the gradient norm as a factor."""
    deviations: float

    def __str__(self) -> str:
        return f"{self.what} {self.value:.4g}, {self.deviations:.0f} robust deviations above the usual {self.median:.4g}"


class SpikeWatch:
    """Compares the loss and the gradient norm of each step with those of the last ones.

    Norms are compared by their logarithms: they vary by factors.
    """

    def __init__(self, threshold: float, losses: Iterable[float] = (), norms: Iterable[float] = ()) -> None:
        self.threshold = threshold
        self.losses, self.norms = deque(losses, WINDOW), deque(norms, WINDOW)
        self.count, self.streak = 0, 0
        """Steps with a spike since the run began, and those on end."""

    def look(self, loss: float, norm: float | None) -> list[Spike]:
        """What is far above its usual range in this step, whose figures count as usual ones from here on."""
        if not self.threshold:
            return []
        found = []
        usual = usual_range(self.losses)
        if usual is not None:
            middle, spread = usual
            spread = max(spread, LOSS_FLOOR * abs(middle))
            if spread and (loss - middle) / spread > self.threshold:
                found.append(Spike("loss", loss, middle, spread, (loss - middle) / spread))
        self.losses.append(loss)
        if norm is not None and norm > 0:
            usual, height = usual_range(self.norms), math.log(norm)
            if usual is not None:
                middle, spread = usual[0], max(usual[1], NORM_FLOOR)
                if (height - middle) / spread > self.threshold:
                    deviations = (height - middle) / spread
                    found.append(Spike("gradient norm", norm, math.exp(middle), math.exp(spread), deviations))
            self.norms.append(height)
        return found


def usual_range(values: Sequence[float]) -> tuple[float, float] | None:
    """(median, 1.4826 × median distance from it), or None for too few values."""
    if len(values) < LEAST:
        return None
    middle = _median(values)
    return middle, 1.4826 * _median([abs(each - middle) for each in values])


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def rows_of_step(trainer: TrainerMixin, batches: range, losses: Sequence[float]) -> list[dict[str, Any]]:
    """The micro batches of a step of the present epoch on this rank: their losses, and how their rows begin.

    `row` is a row's number in the prepared data; a row of a stream has none.
    """
    source, tokenizer = trainer.parts.batches.rows, trainer.processing_class
    decode: Any = getattr(tokenizer, "decode", str)
    order: Any = trainer.order
    shown = []
    for batch, loss in zip(batches, losses, strict=False):
        numbered = hasattr(source, "saved_row")
        numbers = [i for each in order.bins_of(batch) for i in each] if numbered else []
        mine: list[dict[str, Any]] = []
        for ids, labels in (row for each in trainer._rows_of(batch) for row in each):
            text = decode(ids.tolist())
            trained = int((labels[1:] != IGNORE_INDEX).sum())
            mine.append({"tokens": len(ids), "trained_tokens": trained, "text": text[:SHOWN_CHARACTERS]})
            if numbers:
                mine[-1]["row"] = source.saved_row(numbers[len(mine) - 1])
        finite = math.isfinite(loss)
        shown.append(
            {"batch": batch, "loss": loss if finite else None, "loss_is_finite": finite, "rows": mine}
        )
    return shown


def note_down(output_dir: Path, rank: int, line: dict[str, Any]) -> Path:
    """Adds a line to this rank's file, as long as the disk takes it; returns the file."""
    file = output_dir / (FILE if rank == 0 else f"anomalies-{rank}.jsonl")
    with contextlib.suppress(OSError):
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps(line, ensure_ascii=False) + "\n").encode())
        finally:
            os.close(handle)
    return file
