"""What every verb does first: fill automatic values, show warnings, tell every mistake before any work."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from transformers.utils import logging as transformers_logging

from axolotl import console
from axolotl.config import Config, Hardware, resolve
from axolotl.config.plugins import import_plugins, own_plugins
from axolotl.errors import ConfigError, DataError, EnvironmentProblem, ModelError, Problem, UserError
from axolotl.plan.check import component_problems

_ERRORS: dict[str, type[UserError]] = {
    "data": DataError,
    "model": ModelError,
    "environment": EnvironmentProblem,
    "path": EnvironmentProblem,
}


P = ParamSpec("P")
R = TypeVar("R")


def told_with_places(verb: Callable[Concatenate[Config, P], R]) -> Callable[Concatenate[Config, P], R]:
    """Decorator for verbs: mistakes that were found away from the config, and so name only its keys, get their places."""

    @functools.wraps(verb)
    def wrapped(cfg: Config, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return verb(cfg, *args, **kwargs)
        except UserError as error:
            error.problems = tuple(placed(cfg, problem) for problem in error.problems)
            raise

    return wrapped


def placed(cfg: Config, problem: Problem) -> Problem:
    """A problem with the places of its keys, where it has none."""
    found = cfg.problem("", "", *problem.keys)
    if problem.places or not found.places:
        return problem
    return replace(problem, places=found.places, excerpt=found.excerpt)


def ready(cfg: Config, hardware: Hardware) -> Config:
    """The config with automatic values filled in; its warnings are shown."""
    refuse(cfg.warnings)
    quiet_libraries()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    import_plugins(cfg)
    if own_plugins(cfg):
        refuse(component_problems(cfg, complete=True))
    resolved, changes = resolve(cfg, hardware)
    for change in changes:
        console.detail(f"{change.key}: {change.value} ({change.reason})")
    return resolved


def refuse_untrained_adapter(cfg: Config, untrained: bool) -> None:
    """Raises ConfigError where `--untrained` and an adapter by name are both asked for."""
    if untrained and cfg.adapter.lora_model_dir:
        raise ConfigError(
            cfg.problem(
                "`--untrained` asks for the base model, `lora_model_dir` for an adapter.",
                "Leave one of them out.",
                "lora_model_dir",
                kind="conflict",
            )
        )


def named_on_purpose(cfg: Config) -> bool:
    """Whether the base model is named on the command line, and so meant as it is where nothing was trained."""
    return cfg.origin("base_model").kind == "override"


def quiet_libraries() -> None:
    """What the libraries deprecate among themselves is no news to a user."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|accelerate")


def refuse(problems: Sequence[Problem]) -> None:
    """Shows warnings; raises for the rest, all at once."""
    for problem in problems:
        if not problem.fatal:
            console.show_problem(problem)
    fatal = [p for p in problems if p.fatal]
    if fatal:
        kinds = {p.kind for p in fatal}
        raise (_ERRORS.get(kinds.pop(), ConfigError) if len(kinds) == 1 else ConfigError)(fatal)


def check_output(cfg: Config) -> list[Problem]:
    """Whether output_dir can be written, without writing anything."""
    return check_folder(cfg, "output_dir", cfg.output.output_dir)


def check_folder(cfg: Config, key: str, name: str | None) -> list[Problem]:
    """Whether the folder that a key names can be written, without writing anything; none for a key that is not set."""
    if not name:
        return []
    folder = Path(name).expanduser()
    reason = ""
    for there in (folder, *folder.absolute().parents):
        if there.exists():
            if not there.is_dir():
                reason = f"`{there}` is a file"
            elif not os.access(there, os.W_OK | os.X_OK) or not _takes_folders(there, folder):
                reason = f"`{there}` is not writable"
            break
    if not reason:
        return []
    message = f"`{key}: {name}` cannot be written: {reason}."
    return [cfg.problem(message, "Choose another folder.", key, kind="path")]


def _takes_folders(there: Path, folder: Path) -> bool:
    """True where a folder can be made in `there`; access rights do not tell for /proc and read-only mounts."""
    if there == folder and os.statvfs(there).f_flag & os.ST_RDONLY == 0:
        return True
    probe = there / f".axolotl-probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True
