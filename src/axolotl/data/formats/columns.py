"""Reading one column of a row, with an exact complaint where it cannot be used."""

from __future__ import annotations

import math
from typing import Any

from axolotl.data.json_keys import Decoder
from axolotl.data.types import RowProblem

_MISSING = object()


def text(row: dict[str, Any], field: str) -> str:
    """The text in a column that has to be there. Raises RowProblem for a missing, null or non-text one."""
    value = row.get(field, _MISSING)
    if isinstance(value, str):
        return value
    if value is _MISSING:
        raise RowProblem(
            "field missing", f"the row has no `{field}`, it has: {', '.join(map(str, row)) or 'nothing'}"
        )
    if value is None:
        raise RowProblem("field is null", f"`{field}` is null")
    return as_text(value, field)


def optional_text(row: dict[str, Any], field: str) -> str:
    """The text in a column that may be missing or null, which both read as ''."""
    value = row.get(field)
    if isinstance(value, str):
        return value
    return "" if value is None else as_text(value, field)


def as_text(value: Any, field: str) -> str:
    """A number as it is written; RowProblem for anything else that is not text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise RowProblem(
                "field is not a number",
                f"`{field}` holds `{value}`",
                "Write null, or an empty text, for what is missing.",
            )
        return str(value)
    raise RowProblem("field is not text", f"`{field}` holds {kind(value)}")


def kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        str: "text",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), f"a value of type {type(value).__name__}")


def decoded(value: str, what: str) -> Any:
    """The JSON in a text. Raises RowProblem where it is not JSON, and where a key stands twice in an object."""
    decoder = Decoder()
    try:
        found = decoder.decode(value)
    except (ValueError, RecursionError) as error:
        start = value if len(value) <= 40 else value[:37] + "..."
        raise RowProblem(
            "not valid JSON", f"{what} is the text `{start}`, which is not JSON: {error}"
        ) from None
    if decoder.twice:
        raise RowProblem("a key stands twice", f"{what} has `{decoder.twice[0]}` twice in one object")
    return found
