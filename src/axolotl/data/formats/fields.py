"""Do the columns of a dataset fit its type? If not, which type would."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from axolotl.data.formats.registry import Format, formats
from axolotl.errors import Place, Problem

if TYPE_CHECKING:
    from axolotl.config.data import DatasetEntry

_CONVERSATIONS = """\
The column `conversations` reads with:
    type: chat_template
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value"""

_MAPPING = """\
Such columns read with a mapping:
    type:
      field_instruction: {question}
      field_output: {answer}
      format: "{{instruction}}"
      no_input_format: "{{instruction}}\""""

_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("input", "output"),
    ("instruction", "answer"),
    ("instruction", "completion"),
)
_TEXT = ("content", "body", "document", "article", "story", "code")


def missing_fields(required: Iterable[str], columns: Iterable[str]) -> list[str]:
    """The required columns that are not there; `a|b` is there when one of the two is."""
    have = set(columns)
    return [field for field in required if not have.intersection(field.split("|"))]


def check_fields(
    format: Format, columns: list[str] | tuple[str, ...], entry: DatasetEntry, place: Place | None = None
) -> Problem | None:
    """The mistake of a dataset whose columns do not fit its format; None where they do."""
    missing = missing_fields(format.required_fields, columns)
    if not missing:
        return None
    if (
        (entry.ds_type or "").lower() in ("csv", "tsv")
        and columns
        and columns[0].lstrip().startswith(("{", "["))
    ):
        return Problem(
            f"`ds_type: {entry.ds_type}` reads `{entry.path}` as a table, and its first line is JSON.",
            "Write `ds_type: json`, or remove `ds_type`.",
            "data",
            places=(place,) if place else (),
            code="AX1102",
        )
    wanted = ", ".join(f"`{f.replace('|', '` or `')}`" for f in missing)
    where = f"`{entry.path}`" if entry.path else "the dataset"
    found = ", ".join(f"`{c}`" for c in columns) or "no columns"
    return Problem(
        f"the type `{format.name}` needs {wanted}, which the rows of {where} do not have. Found: {found}.",
        _renamed(format, missing, columns, entry)
        or suggestion(columns, entry)
        or "Name the columns with a mapping under `type:`, or change the data.",
        "data",
        places=(place,) if place else (),
        code="AX1102",
    )


def _renamed(format: Format, missing: list[str], columns: Iterable[str], entry: DatasetEntry) -> str:
    """The option that names a missing column, with a column that is there: one spelt alike, else the format's usual one."""
    have = list(columns)
    usual = formats.describe(format.name).facts.get("requires", []) if format.name in formats else []
    for option in type(entry).model_fields:
        named = getattr(entry, option)
        if not option.startswith("field") or named not in missing:
            continue
        near = difflib.get_close_matches(named, have, n=1) or [column for column in usual if column in have]
        if near:
            return f"Write `{option}: {near[0]}`."
    return ""


def suggestion(columns: Iterable[str], entry: DatasetEntry | None = None) -> str:
    """The type that would fit these columns, as YAML to write; '' where none is known to."""
    have = list(columns)
    if "conversations" in have:
        return _CONVERSATIONS
    best, most = "", 0
    for name in formats.names():
        facts = formats.describe(name).facts
        required = facts.get("requires", [])
        if name != formats.describe(name).name or "unavailable" in facts or name in _TOO_SPECIAL:
            continue
        # Of equals the one with the shorter name: `alpaca` rather than one of its variants.
        if (
            required
            and not missing_fields(required, have)
            and (len(required), -len(name)) > (most, -len(best))
        ):
            best, most = name, len(required)
    if best:
        return f"These columns fit: `type: {best}`."
    for column in ("dialogue", "dialog", "conversation", "chat", "turns"):
        if column in have:
            return f"If `{column}` holds a list of messages: `type: chat_template` with `field_messages: {column}`."
    for question, answer in _PAIRS:
        if question in have and answer in have:
            return _MAPPING.format(question=question, answer=answer)
    for column in _TEXT:
        if column in have:
            return f"If `{column}` is plain text to train on: `type: completion` with `field: {column}`."
    return ""


_TOO_SPECIAL = {
    "jeopardy",
    "context_qa",
    "context_qa.load_v2",
    "creative_acr.load_answer",
    "alpaca_chat.load_qa",
}
