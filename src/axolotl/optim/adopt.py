"""ADOPT: Adam whose second moment lags one step, so that it converges with any beta2."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from axolotl.config.optim import OptimSection
from axolotl.optim.groups import Group
from axolotl.optim.options import adam_betas, options
from axolotl.optim.registry import optimizers


class Adopt(torch.optim.Optimizer):
    """The gradient is divided by the root of the *earlier* second moment, clipped, then averaged.

    The first step only measures the second moment. Weight decay stands apart from the gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["mean"], state["square"] = torch.zeros_like(p), p.grad * p.grad
                else:
                    bound = state["step"] ** 0.25
                    scaled = (p.grad / state["square"].sqrt().clamp_(min=group["eps"])).clamp_(-bound, bound)
                    state["mean"].lerp_(scaled, 1 - beta1)
                    if group["weight_decay"]:
                        p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(state["mean"], alpha=-group["lr"])
                    state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                state["step"] += 1
        return loss


@optimizers.register("adopt_adamw", keys=("adam_beta1", "adam_beta2", "adam_epsilon"))
def adopt_adamw(groups: list[Group], optim: OptimSection, model: torch.nn.Module) -> torch.optim.Optimizer:
    """ADOPT with weight decay apart from the gradient."""
    eps = optim.adam_epsilon or 1e-6
    return Adopt(
        groups, lr=optim.learning_rate, betas=adam_betas(optim, (0.9, 0.9999)), eps=eps, **options(optim)
    )
