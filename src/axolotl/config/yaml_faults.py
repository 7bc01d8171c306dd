"""What is wrong with text that is not YAML, where, and how to mend it."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from axolotl.errors import Place

_COLUMNS = "Lines of the same level have to begin in the same column."
_COLON = "A key needs `: ` (a colon and a space) before its value."


class Fault(NamedTuple):
    """A syntax error in words."""

    message: str
    remedy: str
    places: tuple[Place, ...]
    """Where to look first; then where the parser gave up, if that is another line."""


# Words of the parser; what we say (nothing: the parser's words do); the remedy; whether the fault is where it began.
_KNOWN: tuple[tuple[str, str, str, bool], ...] = (
    (
        "mapping values are not allowed",
        "",
        "Check the indentation, and quote a value that contains `: `.",
        False,
    ),
    ("could not find expected ':'", "a key has no `: ` behind it", _COLON, True),
    ("simple key", "", _COLON, False),
    (
        "expected ',' or",
        "a bracket is opened here and not closed",
        "Close it, and put commas between its items.",
        True,
    ),
    ("expected <block end>", "", _COLUMNS, False),
    ("expected '-' indicator", "", _COLUMNS, False),
    ("expected key", "", f"{_COLUMNS} Each needs a key before its colon.", False),
    ("quoted scalar", "a quote is opened here and not closed", "Close the quote.", True),
    ("scalar", "", "Close the quote.", False),
    ("alias", "", "Define the anchor (`&name`) above the line that uses it (`*name`).", False),
)
_NO_SPACE = re.compile(r"\s*(?:- )?[A-Za-z_][\w-]*:[^\s/:]")


def explain(error: Any, name: str, lines: list[str]) -> Fault:
    """A parser's error about a text in words, with the place where the user has to look."""
    began, found = getattr(error, "context_mark", None), getattr(error, "problem_mark", None)
    what = str(getattr(error, "problem", None) or error).splitlines()[0]
    context = f"{getattr(error, 'context', None) or ''} {what}"
    words, remedy, at_start = next(
        ((w, r, s) for known, w, r, s in _KNOWN if known in context), ("", "", False)
    )
    mark = (began or found) if at_start else (found or began)
    line, column = (mark.line, mark.column) if mark else (None, 0)
    here = _line(lines, found)
    if found and "\t" in here[: len(here) - len(here.lstrip())]:
        words, remedy, line, column = "", "Indent with spaces, not with tabs.", found.line, found.column
    else:
        glued = _glued(lines, found)
        if glued is not None:
            words, remedy = "there is no space behind a key's colon", "Put a space behind the colon."
            line, column = glued, lines[glued].index(":")
    places = [Place(name) if line is None else Place(name, line + 1, column + 1)]
    if found and found.line != line and found.line < len(lines):
        places.append(Place(name, found.line + 1, found.column + 1))
    return Fault(f"This is not valid YAML: {words or what}.", remedy, tuple(places))


def _line(lines: list[str], mark: Any) -> str:
    return lines[mark.line] if mark and mark.line < len(lines) else ""


def _glued(lines: list[str], mark: Any) -> int | None:
    """The first of the lines up to the fault, without a gap, that say `key:value` instead of `key: value`."""
    found, index = None, mark.line if mark else -1
    # The parser stumbles over the line below.
    if 0 < index < len(lines) and not _NO_SPACE.match(lines[index]):
        index -= 1
    while 0 <= index < len(lines) and _NO_SPACE.match(lines[index]):
        found, index = index, index - 1
    return found
