"""What is wrong with the lines of a data file, collected so that a file's mistakes are told at once."""

from __future__ import annotations

import json
from typing import Any

from axolotl.data.formats.columns import kind
from axolotl.data.json_keys import second_place
from axolotl.errors import DataError, Place, Problem

MOST = 20
"""So many bad lines of one file are told."""


class Damage:
    """The bad lines of one file. False as long as there are none."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.problems: list[Problem] = []

    def __bool__(self) -> bool:
        return bool(self.problems)

    @property
    def full(self) -> bool:
        return len(self.problems) >= MOST

    def add(
        self,
        line: int | None,
        what: str,
        text: str,
        remedy: str = "Correct or remove the line.",
        column: int | None = None,
    ) -> None:
        """A bad line; `text` is the line itself, of which the part around `column` (from 1) is shown."""
        shown = excerpt(text.rstrip("\r\n"), column) if text else ""
        self.problems.append(
            Problem(f"{what}.", remedy, "data", places=(Place(self.label, line, column),), excerpt=shown)
        )

    def add_json(self, raw: bytes, line: int, offset: int, error: Exception) -> None:
        """A line that is no JSON, not even text, or nested too deep. `offset`: bytes before it in the file."""
        if isinstance(error, UnicodeDecodeError):
            self.add_encoding(raw, line, offset, error)
        elif isinstance(error, json.JSONDecodeError):
            # What is missing at the end of a line is looked for behind its line break, in a line of its own.
            column = min(error.pos, len(error.doc.rstrip())) + 1
            cut_off = not raw.endswith(b"\n") and (
                error.pos >= len(error.doc.rstrip()) or error.msg.startswith(("Unterminated", "Expecting"))
            )
            if cut_off:
                self.add(
                    line,
                    "the last line is cut off",
                    error.doc,
                    "The file is incomplete: get it again.",
                    column,
                )
            else:
                self.add(line, f"not valid JSON: {error.msg}", error.doc, column=column)
        else:
            self.add(line, f"not readable: {error}", "")

    def add_encoding(self, raw: bytes, line: int, offset: int, error: UnicodeDecodeError) -> None:
        """A line that is not UTF-8."""
        at = offset + error.start
        shown = raw[max(0, error.start - 30) : error.start + 30].decode("utf-8", "backslashreplace")
        self.problems.append(
            Problem(
                f"not UTF-8 text: byte 0x{raw[error.start]:02x} at offset {at} of the file.",
                f"Convert the file, for example: iconv -f WINDOWS-1252 -t UTF-8 {self.label}",
                "data",
                places=(Place(self.label, line, len(raw[: error.start].decode("utf-8", "replace")) + 1),),
                excerpt=shown.strip("\r\n"),
            )
        )

    def add_not_object(self, row: Any, line: int | None, number: int | None = None) -> None:
        """A row that is something else than an object."""
        which = f"row {number}" if number is not None else "the row"
        self.add(line, f"{which} is {kind(row)}, an object with named fields is expected", "")

    def add_duplicates(self, keys: list[str], line: int | None, text: str) -> None:
        """A row with keys that stand twice in one object. `text`: the row itself, which begins in that line."""
        named = ", ".join(f"`{key}`" for key in dict.fromkeys(keys))
        place = second_place(text, keys[0])
        column = None
        if place is not None and line is not None:
            begun = text.rfind("\n", 0, place) + 1
            line += text.count("\n", 0, place)
            column = place - begun + 1
            text = text[begun:].split("\n", 1)[0]
        self.add(
            line,
            f"{named} stands twice in one object",
            text if column else "",
            "Remove one of them: which of the values is meant cannot be known.",
            column,
        )

    def raise_any(self) -> None:
        """Raises DataError with all that was found, if anything was."""
        if self.problems:
            problems = self.problems
            if self.full:
                last = Problem(
                    f"only the first {MOST} bad lines of `{self.label}` are shown.", kind="warning"
                )
                problems = [*problems, last]
            raise DataError(problems)


def decode_line(raw: bytes, line: int, offset: int, damage: Damage) -> str | None:
    """The text of a line; None, with an entry in `damage`, where it is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        damage.add_encoding(raw, line, offset, error)
        return None


def excerpt(text: str, column: int | None) -> str:
    """The part of a line around a column (from 1), with a caret below it."""
    if column is None:
        return text if len(text) <= 80 else text[:77] + "..."
    start, end = max(0, column - 41), column + 39
    head, tail = "..." if start else "", "..." if end < len(text) else ""
    caret = " " * (len(head) + column - 1 - start) + "^"
    return f"{head}{text[start:end]}{tail}\n{caret}"


def damaged(label: str, error: Exception, after: int = 0) -> DataError:
    """The error of a file that cannot be read to its end. `after`: rows that could be read."""
    if isinstance(error, PermissionError):
        return DataError(
            Problem(
                f"`{label}` may not be read: permission denied.", "Give yourself read permission.", "path"
            )
        )
    if isinstance(error, FileNotFoundError):
        return DataError(Problem(f"`{label}` is not there any more.", kind="path"))
    said = " ".join(str(error).split()) or type(error).__name__
    said += f" (after row {after:,})" if after else ""
    return DataError(
        Problem(
            f"`{label}` is damaged or cut off: {said}",
            "Get the file again, and compare its size with the original.",
            "data",
            places=(Place(label),),
        )
    )
