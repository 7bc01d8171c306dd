"""The registries of optimizers and of learning-rate schedules; names are known without importing torch.

An optimizer is a builder `(groups, optim, model) -> torch.optim.Optimizer`, a schedule a builder
`(optimizer, optim, warmup_steps, total_steps) -> LRScheduler`. Facts an entry may declare:

unavailable   why it cannot be used here, and what to use instead
extra         the extra that brings the package it needs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from axolotl.registry import Registry

optimizers: Registry[Callable[..., Any]] = Registry("optimizer", "axolotl.optim", "optimizers")
schedules: Registry[Callable[..., Any]] = Registry("lr_scheduler", "axolotl.optim", "schedules")
