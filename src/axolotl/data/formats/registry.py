"""The registry of dataset formats, and what one format is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from axolotl.data.formats.watch import Watch
from axolotl.data.types import Completion, Conversation, FormatValue, Marked, Message, Pieces, Tokenized
from axolotl.errors import ConfigError
from axolotl.registry import Registry

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry

Row = dict[str, Any]
Convert = Callable[[Row], FormatValue]
"""Turns a row into a typed value; raises RowProblem for a row that cannot be used. Never changes the row."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format, ready for the rows of one dataset.

    `required_fields` are the columns that a row must have; `a|b` means that one of the two is enough.
    """

    name: str
    convert: Convert
    required_fields: tuple[str, ...] = ()
    optional_fields: tuple[str, ...] = ()
    watch: Watch = field(default_factory=Watch, compare=False)
    """Which keys of messages that the entry names have not come up."""


Builder = Callable[..., Convert | Format]
"""`builder(entry, data) -> convert`, or a `Format` where the columns depend on the entry.

Facts given to the decorator: `requires` and `optional` (lists of columns), `styles=True` where `name:style` is allowed
(the builder then takes `style=`), `unavailable="why"` for a known format that cannot be used yet.
"""

formats: Registry[Builder] = Registry("dataset type", "axolotl.data.formats", "formats")
VALUES = (Conversation, Pieces, Marked, Completion, Tokenized)

F = TypeVar("F", bound=Callable[..., Any])


def register_format(
    name: str, *aliases: str, requires: Sequence[str] = (), optional: Sequence[str] = ()
) -> Callable[[F], F]:
    """Decorator for a user's own format; `type: <name>` selects it.

    It goes on a function of one row that returns a typed value, or simply `{"messages": [...]}` (read as `chat_template`
    reads it), `{"text": "..."}`, `{"segments": [...]}` or `{"input_ids": [...], "labels": [...]}`; or on a builder
    `(entry, data) -> function of one row`, where the options of the dataset matter.
    """
    enter = Registry.register(formats, name, *aliases, requires=list(requires), optional=list(optional))

    def decorate(function: F) -> F:
        enter(as_builder(function, name))
        return function

    return decorate


def as_builder(function: Callable[..., Any], name: str) -> Builder:
    """A builder from either kind of user function. Raises ConfigError where it takes anything else."""
    count = _positional(function)
    if count not in (1, 2):
        raise ConfigError(
            f"the dataset type `{name}` is a function of {count} arguments.",
            "It takes one row and returns a value, or (entry, data) and returns such a function.",
        )

    @functools.wraps(function)
    def build(entry: DatasetEntry, data: DataSection) -> Convert | Format:
        built = function(entry, data) if count == 2 else function
        if isinstance(built, Format):
            return built
        if not callable(built):
            raise ConfigError(
                f"the dataset type `{name}` gave {type(built).__name__!r} instead of a function of one row.",
                "A builder (entry, data) returns the function that turns one row into a value.",
            )
        return _completed(built, name, entry, data)

    return build


def _completed(convert: Callable[[Row], Any], name: str, entry: DatasetEntry, data: DataSection) -> Convert:
    """A user's function whose plain mappings are read as rows of the built-in format that fits them."""
    read: dict[str, Convert] = {}

    def plain(kind: str) -> Convert:
        if kind not in read:
            # The user's function has already answered what the entry's field names are about.
            bare = type(entry)(roles=entry.roles, split_thinking=entry.split_thinking)
            built = formats.get(kind)(bare, data)
            read[kind] = built.convert if isinstance(built, Format) else built
        return read[kind]

    def run(row: Row) -> FormatValue:
        value = convert(row)
        if isinstance(value, VALUES):
            return value
        if isinstance(value, list) and value and isinstance(value[0], Message):
            return Conversation(value)
        if isinstance(value, dict):
            for key, kind in _PLAIN.items():
                if key in value:
                    return plain(kind)(value)
        raise ConfigError(
            f"the dataset type `{name}` returned {type(value).__name__} for a row.",
            f"It returns a value of axolotl.data.types, or a mapping with one of: {', '.join(_PLAIN)}.",
        )

    return run


_PLAIN = {
    "messages": "chat_template",
    "segments": "input_output",
    "input_ids": "tokenized",
    "text": "completion",
}


def _positional(function: Callable[..., Any]) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(
        p.kind in kinds and p.default is inspect.Parameter.empty
        for p in inspect.signature(function).parameters.values()
    )
