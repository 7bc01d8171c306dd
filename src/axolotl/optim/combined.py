"""Two optimizers that act as one: some methods suit matrices only, and the other parameters need another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Combined(torch.optim.Optimizer):
    """Steps several optimizers at once. Its groups are theirs, so a schedule that sets `lr` reaches them."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([g for part in parts for g in part.param_groups], dict(parts[0].defaults))
        self.share()

    def share(self) -> None:
        """Takes over the groups of the parts, after these have been replaced."""
        self.param_groups = [g for part in self.parts for g in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.share()
