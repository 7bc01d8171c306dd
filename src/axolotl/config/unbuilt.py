"""Keys that load and are checked although `train` cannot run their feature yet."""

from __future__ import annotations

from axolotl.config.config import Config
from axolotl.config.keys import SECTIONS
from axolotl.config.renames import is_off
from axolotl.config.section import default_of, facts
from axolotl.errors import Problem


def unbuilt(cfg: Config) -> list[Problem]:
    """One `unavailable` problem for each key in use whose feature is declared but not built."""
    problems = []
    for section in SECTIONS.values():
        for key in section.model_fields:
            said = facts(section, key)
            if said.get("state") != "validated" or not cfg.is_set(key):
                continue
            value = cfg.get(key)
            if (
                is_off(value)
                or value == default_of(section, key)
                or (isinstance(value, int) and value <= 1 and "axes" in said["feature"])
            ):
                continue
            problems.append(
                cfg.problem(
                    f"`{key}` is valid, but {said['feature']} is not available yet.",
                    "Delete the line to train without it.",
                    key,
                    kind="unavailable",
                )
            )
    return problems
