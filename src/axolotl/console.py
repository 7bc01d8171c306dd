"""What the program says: results on stdout, everything else on stderr, once, from rank 0."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from axolotl.errors import Problem, UserError

if TYPE_CHECKING:
    from rich.console import Console


_silent = False


def is_main_process() -> bool:
    """True on rank 0, and where no launcher set a rank."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) in ("", "0")


@functools.cache
def stderr() -> Console:
    """The one Rich console, on stderr. Rich is imported on first use: `--help` does without it."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def out(text: str = "", end: str = "\n") -> None:
    """A result, on stdout and nothing but it."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def _say(text: str, style: str) -> None:
    if is_main_process() and not _silent:
        stderr().print(text, style=style, markup=False)


def note(text: str) -> None:
    """Something worth knowing."""
    _say(text, "")


def detail(text: str) -> None:
    """Something for whoever asked to hear everything (`AXOLOTL_VERBOSE=1`)."""
    if os.environ.get("AXOLOTL_VERBOSE"):
        _say(text, "dim")


@contextlib.contextmanager
def silenced(on: bool = True) -> Iterator[None]:
    """Says nothing but errors inside: for work whose course is nobody's news, or has been told by another process."""
    global _silent
    before, _silent = _silent, _silent or on
    try:
        yield
    finally:
        _silent = before


def success(text: str) -> None:
    """A goal reached."""
    _say(text, "green")


def warn(text: str) -> None:
    """Something that the user may not have meant."""
    _say(f"warning: {text}", "yellow")


@functools.cache
def warn_once(text: str) -> None:
    """`warn`, the first time that this text comes."""
    warn(text)


def show_problem(problem: Problem) -> None:
    """One mistake: kind and place, message, the offending line, remedy."""
    if problem.kind == "warning" and (_silent or not is_main_process()):
        return
    word = "warning" if problem.kind == "warning" else "error"
    where = f"{', '.join(map(str, problem.places))}: " if problem.places else ""
    style = "yellow" if problem.kind == "warning" else "red"
    code = f" [{problem.shown_code}]" if problem.shown_code else ""
    stderr().print(f"{where}{word}: {problem.message}{code}", style=style, markup=False)
    if problem.excerpt:
        stderr().print(problem.excerpt, markup=False, style="dim")
    if problem.remedy:
        stderr().print(f"  {problem.remedy}", markup=False)


def show_error(error: UserError) -> None:
    """All mistakes of a UserError, on stderr, without a traceback."""
    for problem in error.problems:
        show_problem(problem)
    fatal = sum(p.fatal for p in error.problems)
    if fatal > 1:
        stderr().print(f"{fatal} problems.", style="red")
