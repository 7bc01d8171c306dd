"""The courses of the learning rate: transformers' own by name, and ours as plain functions of the step."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers.optimization import get_scheduler

from axolotl.config.optim import OptimSection
from axolotl.optim.registry import schedules


@schedules.register("constant", "constant_with_warmup", keys=(), kwargs=())
@schedules.register(
    "linear",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
    keys=(),
)
def transformers_schedule(optimizer: Optimizer, optim: OptimSection, warmup: int, total: int) -> LRScheduler:
    """A schedule of transformers, with `lr_scheduler_kwargs` as its own arguments."""
    arguments = dict(optim.lr_scheduler_kwargs or {})
    if optim.lr_scheduler == "warmup_stable_decay" and not {"num_decay_steps", "num_stable_steps"} & set(
        arguments
    ):
        # A tenth of the run for the decay, where the user does not say.
        arguments["num_decay_steps"] = max(1, total // 10)
    # Polynomial divides by the steps after the warmup, even where there are none.
    steps = max(total, warmup + 1) if optim.lr_scheduler == "polynomial" else total
    return get_scheduler(
        optim.lr_scheduler,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments,
    )


@schedules.register(
    "cosine",
    keys=("cosine_min_lr_ratio", "cosine_constant_lr_ratio", "lr_quadratic_warmup"),
    kwargs=("num_cycles",),
)
def cosine(optimizer: Optimizer, optim: OptimSection, warmup: int, total: int) -> LRScheduler:
    """Half a cosine from the full rate down to `cosine_min_lr_ratio` of it (0 by default).

    With `cosine_constant_lr_ratio` the end is reached after that share of the steps, and kept from there on.
    """
    low = optim.cosine_min_lr_ratio or 0.0
    end = (
        total if optim.cosine_constant_lr_ratio is None else math.ceil(total * optim.cosine_constant_lr_ratio)
    )
    cycles = float((optim.lr_scheduler_kwargs or {}).get("num_cycles", 0.5))

    def factor(step: int) -> float:
        if step < warmup:
            return _warm(step, warmup, optim.lr_quadratic_warmup)
        progress = (step - warmup) / max(1, end - warmup)
        if optim.cosine_constant_lr_ratio is not None and progress >= 1:
            return low
        wave = 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * progress))
        return max(0.0, wave * (1 - low) + low)

    return LambdaLR(optimizer, factor)


@schedules.register("rex", keys=("cosine_min_lr_ratio", "lr_quadratic_warmup"), kwargs=())
def rex(optimizer: Optimizer, optim: OptimSection, warmup: int, total: int) -> LRScheduler:
    """REX: stays high for long and drops late; ends at `cosine_min_lr_ratio` of the full rate."""
    low = optim.cosine_min_lr_ratio or 0.0

    def factor(step: int) -> float:
        if step < warmup:
            return _warm(step, warmup, optim.lr_quadratic_warmup)
        left = max(0.0, (total - step) / max(1, total - warmup))
        return low + (1 - low) * left / (0.1 + 0.9 * left)

    return LambdaLR(optimizer, factor)


@schedules.register("one_cycle", keys=("lr_div_factor",), kwargs=("div_factor", "final_div_factor"))
def one_cycle(optimizer: Optimizer, optim: OptimSection, warmup: int, total: int) -> LRScheduler:
    """One cycle: up from 1/`lr_div_factor` (25) of the full rate by a cosine, then down to a tiny rate by another."""
    arguments = optim.lr_scheduler_kwargs or {}
    start = 1.0 / float(optim.lr_div_factor or arguments.get("div_factor", 25.0))
    end = start / float(arguments.get("final_div_factor", 1e4))
    peak = max(1, warmup - 1)

    def factor(step: int) -> float:
        if step <= peak:
            return _between(start, 1.0, step / peak)
        return _between(1.0, end, min(1.0, (step - peak) / max(1, total - 1 - peak)))

    return LambdaLR(optimizer, factor)


def _warm(step: int, warmup: int, quadratic: bool) -> float:
    share = step / max(1, warmup)
    return share * share if quadratic else share


def _between(a: float, b: float, share: float) -> float:
    """From a to b along half a cosine."""
    return b + (a - b) * 0.5 * (1.0 + math.cos(math.pi * share))
