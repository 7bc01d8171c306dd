"""Keys of messages that a config names: which of them never came up in the rows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from axolotl.errors import Place, Problem

if TYPE_CHECKING:
    from axolotl.config.data import DatasetEntry

_MOST_KEYS = 50


@dataclass(slots=True)
class Watch:
    """The keys of messages that options name and that no message has had so far, and keys that messages have."""

    unseen: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)

    def look(self, message: dict[str, Any]) -> None:
        """Takes notice of the keys of one message."""
        self.unseen.difference_update(message)
        if len(self.keys) < _MOST_KEYS:
            self.keys.update(map(str, message))

    def merge(self, other: Watch) -> Watch:
        """What is known after the messages of both."""
        return Watch(self.unseen & other.unseen, self.keys | other.keys)

    def copy(self) -> Watch:
        return Watch(set(self.unseen), set(self.keys))


def unseen_problems(entry: DatasetEntry, watch: Watch, name: str, key: str, place: Any) -> list[Problem]:
    """What is told of the keys that no message had. `key`: the dataset's key; `place(key)`: where a key stands.

    A mark of training that is named like a key of the messages, but for its spelling, is an error: rows marked as not
    trained would be trained.
    """
    found = []
    options: Iterable[tuple[str, str | None, bool]] = [
        ("message_field_training", entry.message_field_training, True),
        ("message_field_training_detail", entry.message_field_training_detail, True),
        *(
            ("message_property_mappings", source, False)
            for target, source in (entry.message_property_mappings or {}).items()
            if target not in ("role", "content")
        ),
    ]
    there = ", ".join(f"`{k}`" for k in sorted(watch.keys)) or "none"
    for option, named, marks in options:
        if named is None or named not in watch.unseen:
            continue
        near = difflib.get_close_matches(named, sorted(watch.keys), n=1)
        where: Place = place(f"{key}.{option}")
        effect = ", so nothing is marked by it" if marks else ""
        found.append(
            Problem(
                f"no message of `{name}` has `{named}`, which `{option}` names{effect}.",
                (f"Did you mean `{near[0]}`? " if near else "") + f"Keys of its messages: {there}.",
                kind="data" if marks and near else "warning",
                keys=(f"{key}.{option}",),
                places=(where,),
            )
        )
    return found
