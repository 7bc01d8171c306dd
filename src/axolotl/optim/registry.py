"""The registries of optimizers and of learning-rate schedules; names are known without importing torch.

An optimizer is a builder `(groups, optim, model) -> torch.optim.Optimizer`, a schedule a builder
`(optimizer, optim, warmup_steps, total_steps) -> LRScheduler`. Facts an entry may declare:

unavailable   why it cannot be used here, and what to use instead
extra         the extra that brings the package it needs
package       the module that has to be there for it
keys          the keys of the config, among those of one kind of optimizer or schedule, that it reads
kwargs        the names in `lr_scheduler_kwargs` that a schedule takes, where it would not refuse others itself
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from axolotl.config.optim import OptimSection
from axolotl.errors import Problem
from axolotl.registry import Registry, missing_extra

optimizers: Registry[Callable[..., Any]] = Registry("optimizer", "axolotl.optim", "optimizers")
schedules: Registry[Callable[..., Any]] = Registry("lr_scheduler", "axolotl.optim", "schedules")


def check(optim: OptimSection) -> list[Problem]:
    """What this machine lacks for the optimizer that was asked for. A name that is not known is told elsewhere."""
    name = optim.optimizer
    facts = optimizers.describe(name).facts if name in optimizers else {}
    if "package" not in facts:
        return []
    return missing_extra(facts["package"], facts["extra"], f"`optimizer: {name}`", "optimizer")
