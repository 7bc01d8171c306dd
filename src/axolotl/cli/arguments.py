"""What every verb of the command shares: its config files, overrides, and flags that are also keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from axolotl.errors import ConfigError, Problem

if TYPE_CHECKING:
    from axolotl.config import Config

PASS_ON = {"ignore_unknown_options": True, "max_content_width": 100, "help_option_names": ["--help", "-h"]}
CONFIG_SUFFIXES = (".yml", ".yaml")


def split_arguments(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """(config files, overrides) of what stands after a verb: `a.yml b.yml --lora-r 8 --no-sample-packing`.

    Config files come first, or anywhere where no flag can claim them. A word that ends in .yml belongs to the flag
    before it only if a config file has been seen already.
    """
    sources: list[str] = []
    overrides: list[str] = []
    open_flag = False
    for word in args:
        if word.startswith("--"):
            overrides.append(word)
            open_flag = "=" not in word and not word.startswith("--no-")
        elif word[:1] == "-" and word[1:2].isalpha() and not open_flag:
            # Told with the overrides: flags have two dashes.
            overrides.append(word)
            open_flag = "=" not in word
        elif open_flag and (sources or not word.endswith(CONFIG_SUFFIXES)):
            overrides.append(word)
            open_flag = False
        else:
            sources.append(word)
            open_flag = False
    return sources, overrides


def sources_and_overrides(args: Sequence[str], verb: str) -> tuple[list[str], list[Any]]:
    """The config files of a verb and its overrides, read. Raises ConfigError where no file is named."""
    sources, flags = split_arguments(args)
    if not sources:
        raise ConfigError(
            Problem(
                f"`axolotl {verb}` needs a config file.",
                f"For example: axolotl {verb} config.yml. `axolotl fetch examples` brings some.",
                "missing",
            )
        )
    from axolotl.cli.overrides import parse_overrides

    return sources, parse_overrides(flags)


def load(args: Sequence[str], verb: str) -> Config:
    """The config that a verb was given. Raises ConfigError with every mistake in it."""
    sources, overrides = sources_and_overrides(args, verb)
    from axolotl.plan.check import load_config

    try:
        return load_config(sources, overrides, verb=verb)
    except ConfigError as error:
        told = ConfigError([_own_option(problem) for problem in error.problems])
        told.config, told.doubted = error.config, error.doubted
        raise told from None


def _own_option(problem: Problem) -> Problem:
    """A flag that no key answers to, told with the option of this very verb that it was probably meant to be."""
    flag = problem.places[0].file if problem.places else ""
    ctx = click.get_current_context(silent=True)
    if problem.kind != "unknown_key" or not flag.startswith("--") or ctx is None:
        return problem
    from axolotl.config.keys import did_you_mean, nearest

    options = {
        name.removeprefix("--").replace("-", "_"): name
        for parameter in ctx.command.params
        for name in parameter.opts
        if name.startswith("--")
    }
    near = nearest(flag.removeprefix("--"), options)
    return replace(problem, remedy=did_you_mean([options[key] for key in near])) if near else problem


def with_key(args: tuple[str, ...], flag: str, value: str | None) -> tuple[str, ...]:
    """A flag of the verb that is also a config key takes the way of every override."""
    return args if value is None else (*args, f"{flag}={value}")


def takes_config(function: Callable[..., None]) -> Callable[..., None]:
    """The arguments of every verb that reads a config: files, then any `--key value`."""
    return click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="CONFIG... [--KEY VALUE]...")(
        function
    )
