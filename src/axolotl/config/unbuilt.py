"""Keys that are accepted although something about them is missing: features that cannot run yet, and keys without effect."""

from __future__ import annotations

from collections.abc import Iterator

from axolotl.config.config import Config
from axolotl.config.keys import SECTIONS
from axolotl.config.old_keys import is_off
from axolotl.config.section import default_of, facts
from axolotl.errors import Problem


def _in_use(cfg: Config, state: str) -> Iterator[tuple[str, str]]:
    """Keys of a state that the user set to something else than off or the default, with the feature or reason."""
    for section in SECTIONS.values():
        for key in section.model_fields:
            said = facts(section, key)
            if said.get("state") == state and cfg.is_set(key):
                value = cfg.get(key)
                if not is_off(value) and value != default_of(section, key):
                    yield key, said["feature"]


def unbuilt(cfg: Config) -> list[Problem]:
    """One `unavailable` problem for each key in use that is checked, but whose feature `train` cannot run yet."""
    return [
        cfg.problem(
            f"`{key}` is valid, but {feature} is not available yet.",
            "Delete the line to train without it.",
            key,
            kind="unavailable",
        )
        for key, feature in _in_use(cfg, "validated")
        # One device on an axis is no axis.
        if cfg.get(key) not in (0, 1)
    ]


def idle_keys(cfg: Config) -> list[Problem]:
    """A warning for each key in use that does nothing."""
    return [
        cfg.problem(f"`{key}` has no effect: {reason}.", "", key, kind="warning")
        for key, reason in _in_use(cfg, "idle")
    ]
