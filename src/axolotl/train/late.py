"""Figures that are read one step late, so that the GPU never waits for this process to look at them.

A step's losses and gradient norm begin their way to the host when the step is computed, and are judged and logged when the
next one is queued. Nothing depends on them until then: whether a step counts is decided on the GPU, by the flag that fused
optimizers take (`found_inf`): a step that is left out changes neither weights nor their state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


class Arriving:
    """Numbers of a device on their way to the host. On a CPU they are there at once."""

    def __init__(self, figures: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if figures.device.type == "cuda":
            self._host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._host.copy_(figures, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(figures.device))
        else:
            self._host = figures.detach().clone()

    def values(self) -> list[float]:
        """The numbers; waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        found: list[float] = self._host.tolist()
        return found


@dataclass
class StepAt:
    """A step whose figures are judged later: its number from 1, and its batches as its epoch counts them."""

    step: int
    batches: range
    figures: Arriving
    has_norm: bool


@dataclass
class LineAt:
    """A line of the log that waits for its numbers: loss summed since the last line, failed losses, gradient norm."""

    step: int
    epoch: float | None
    steps: int
    """Steps since the last line."""
    learning_rate: float
    tokens: int
    trained_tokens: int
    figures: Arriving
    start_time: float | None


def flagged_optimizer(optimizer: Any) -> Any:
    """The optimizer inside of accelerate's wrapper if it takes a flag on the device that leaves its step out, or None.

    Weights that are divided among processes keep to the way without a flag.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not getattr(inner, "_step_supports_amp_scaling", False):
        return None
    whole = all(type(p.data) is torch.Tensor for group in inner.param_groups for p in group["params"])
    return inner if whole else None
