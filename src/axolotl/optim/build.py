"""From the config to an optimizer and a schedule."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from axolotl.config.adapter import AdapterSection
from axolotl.config.optim import OptimSection
from axolotl.errors import ConfigError, Problem
from axolotl.optim.groups import parameter_groups
from axolotl.optim.registry import optimizers, schedules

WARMUP_SHARE, LONGEST_WARMUP = 0.03, 100


def warmup_steps(optim: OptimSection, total_steps: int) -> int:
    """Steps in which the learning rate rises: as the config says, else 3 % of all steps, at most 100."""
    # Beside a share, 0 steps mean that the share decides.
    if optim.warmup_steps or (optim.warmup_steps == 0 and not optim.warmup_ratio):
        return min(optim.warmup_steps, total_steps)
    if optim.warmup_ratio is not None:
        return math.ceil(round(total_steps * optim.warmup_ratio, 6))
    return min(int(WARMUP_SHARE * total_steps), LONGEST_WARMUP)


def build_optimizer(model: nn.Module, optim: OptimSection, adapter: AdapterSection) -> Optimizer:
    """The optimizer over the trained parameters of `model`.

    Raises ConfigError for an unknown name or arguments it does not take, EnvironmentProblem for a missing package.
    """
    build = optimizers.get(optim.optimizer)
    groups = parameter_groups(model, optim, adapter)
    try:
        return build(groups, optim, model)
    except (TypeError, ValueError) as error:
        message = f"`optimizer: {optim.optimizer}` does not take these arguments: {error}."
        keys = ("optimizer", "optim_args")
        raise ConfigError(
            Problem(message, "Check optim_args and the adam_* keys.", "invalid_value", keys)
        ) from error


def build_schedule(optimizer: Optimizer, optim: OptimSection, total_steps: int) -> LRScheduler:
    """The schedule over `total_steps`. Raises ConfigError for an unknown name or arguments it does not take."""
    build = schedules.get(optim.lr_scheduler)
    try:
        return build(optimizer, optim, warmup_steps(optim, total_steps), total_steps)
    except (TypeError, ValueError) as error:
        message = f"`lr_scheduler: {optim.lr_scheduler}` does not take these arguments: {error}."
        keys = ("lr_scheduler", "lr_scheduler_kwargs")
        raise ConfigError(Problem(message, "Check lr_scheduler_kwargs.", "invalid_value", keys)) from error
