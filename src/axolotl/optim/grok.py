"""GrokAdamW: AdamW that amplifies the slow part of the gradient. Its package, with a state that checkpoints can hold."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from axolotl.config.optim import OptimSection
from axolotl.optim.groups import Group
from axolotl.optim.options import adam
from axolotl.optim.registry import optimizers
from axolotl.registry import require_extra


@functools.cache
def _kind(plain: type[Any]) -> type[Any]:
    """The package's optimizer. It keeps its state inside the groups, under the weights themselves, where a checkpoint
    would hold copies of weights and nothing would find the state again.
    """

    class GrokAdamW(plain):  # type: ignore[valid-type, misc]
        def state_dict(self) -> dict[str, Any]:
            kept = [group.pop("state", {}) for group in self.param_groups]
            try:
                found: dict[str, Any] = super().state_dict()
            finally:
                for group, states in zip(self.param_groups, kept, strict=True):
                    group["state"] = states
            pairs = zip(self.param_groups, kept, strict=True)
            found["slow"] = [[states.get(p) for p in group["params"]] for group, states in pairs]
            return found

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict({k: v for k, v in state_dict.items() if k != "slow"})
            for group, states in zip(self.param_groups, state_dict["slow"], strict=True):
                found = zip(group["params"], states, strict=True)
                group["state"] = {p: dict(state) for p, state in found if state is not None}

    return GrokAdamW


@optimizers.register(
    "grokadamw", keys=("adam_beta1", "adam_beta2", "adam_epsilon"), extra="optimizers", package="grokadamw"
)
def grokadamw(groups: list[Group], optim: OptimSection, model: torch.nn.Module) -> torch.optim.Optimizer:
    """GrokAdamW: AdamW that amplifies slow gradients."""
    before = logging.root.handlers[:], logging.root.level
    package = require_extra("grokadamw", "optimizers", f"`optimizer: {optim.optimizer}`", "optimizer")
    # Its import turns on the log lines of every library.
    logging.root.handlers[:], _ = before
    logging.root.setLevel(before[1])
    made: torch.optim.Optimizer = _kind(package.GrokAdamW)(groups, **adam(optim))
    return made
