"""Lion: every weight moves by the same amount, in the direction of the sign of a blended gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from axolotl.config.optim import OptimSection
from axolotl.optim.groups import Group
from axolotl.optim.options import adam_betas, options
from axolotl.optim.registry import optimizers


class Lion(torch.optim.Optimizer):
    """Sign of momentum, with weight decay apart from the gradient. One state tensor per parameter, of its size."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            blend, memory = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            direction = torch._foreach_lerp(grads, momenta, blend)
            torch._foreach_sign_(direction)
            torch._foreach_add_(params, direction, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, grads, 1 - memory)
        return loss


@optimizers.register("lion", "lion_32bit", keys=("adam_beta1", "adam_beta2"))
def lion(groups: list[Group], optim: OptimSection, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Lion; its learning rate is usually a third to a tenth of AdamW's."""
    return Lion(groups, lr=optim.learning_rate, betas=adam_betas(optim, (0.9, 0.99)), **options(optim))
