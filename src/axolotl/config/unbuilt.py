"""Keys that are accepted although something about them is missing: features that cannot run yet, and keys without effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from axolotl.config.config import Config
from axolotl.config.keys import SECTIONS
from axolotl.config.old_keys import is_off
from axolotl.config.section import Block, default_of, facts
from axolotl.errors import Problem


def _in_use(cfg: Config, state: str) -> Iterator[tuple[str, Any, str]]:
    """Keys of a state that the user set to something else than off or the default: key, value, feature or reason."""
    for section in SECTIONS.values():
        for key in section.model_fields:
            if cfg.is_set(key):
                yield from _used(section, key, key, cfg.get(key), state)


def _used(
    model: type[BaseModel], name: str, key: str, value: Any, state: str
) -> Iterator[tuple[str, Any, str]]:
    said = facts(model, name)
    if said.get("state") == state and not is_off(value) and value != default_of(model, name):
        yield key, value, said["feature"]
    for index, block in enumerate(value if isinstance(value, list) else [value]):
        if isinstance(block, Block):
            at = f"{key}[{index}]" if isinstance(value, list) else key
            for inner in type(block).model_fields:
                if inner in block.model_fields_set:
                    yield from _used(type(block), inner, f"{at}.{inner}", getattr(block, inner), state)


def unbuilt(cfg: Config) -> list[Problem]:
    """One `unavailable` problem for each key in use that is checked, but whose feature `train` cannot run yet."""
    return [
        cfg.problem(
            f"`{key}` is valid, but {feature} is not available yet.",
            "Delete the line to train without it.",
            key,
            kind="unavailable",
        )
        for key, value, feature in _in_use(cfg, "validated")
        # One device on an axis is no axis.
        if value is True or value not in (0, 1)
    ]


def idle_keys(cfg: Config) -> list[Problem]:
    """A warning for each key in use that does nothing."""
    return [
        cfg.problem(f"`{key}` has no effect: {reason}.", "", key, kind="warning")
        for key, _, reason in _in_use(cfg, "idle")
    ]
