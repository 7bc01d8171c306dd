"""Rules across keys. A rule is a small pure function from the config to its problems, registered by `@rule`."""

from __future__ import annotations

from axolotl.config.rules import (
    adapter,
    data,
    devices,
    loss,
    memory,
    plugins,
    schedule,
    streaming,
    tensor,
    unread,
)
from axolotl.config.rules.rulebook import RULES, Rule, broken_rules, rule

__all__ = [
    "RULES",
    "Rule",
    "adapter",
    "broken_rules",
    "data",
    "devices",
    "loss",
    "memory",
    "plugins",
    "rule",
    "schedule",
    "streaming",
    "tensor",
    "unread",
]
