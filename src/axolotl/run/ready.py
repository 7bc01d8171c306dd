"""What every verb does first: look at the machine, fill automatic values, tell every mistake before any work."""

from __future__ import annotations

from collections.abc import Sequence

from axolotl import console
from axolotl.config import Config
from axolotl.config.resolve import Hardware, resolve
from axolotl.errors import ConfigError, DataError, EnvironmentProblem, ModelError, Problem, UserError
from axolotl.plan.check import component_problems

_ERRORS: dict[str, type[UserError]] = {"data": DataError, "model": ModelError, "environment": EnvironmentProblem}


def ready(cfg: Config, hardware: Hardware) -> Config:
    """The config with automatic values filled in. Raises a UserError with all mistakes that need no work to be seen."""
    refuse([*cfg.warnings, *component_problems(cfg)])
    resolved, changes = resolve(cfg, hardware)
    for change in changes:
        if change.reason and not cfg.is_set(change.key):
            console.detail(f"{change.key}: {change.value} ({change.reason})")
    return resolved


def refuse(problems: Sequence[Problem]) -> None:
    """Shows warnings; raises for the rest, all at once."""
    for problem in problems:
        if not problem.fatal:
            console.show_problem(problem)
    fatal = [p for p in problems if p.fatal]
    if fatal:
        kinds = {p.kind for p in fatal}
        raise (_ERRORS.get(kinds.pop(), ConfigError) if len(kinds) == 1 else ConfigError)(fatal)
