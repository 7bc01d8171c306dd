"""JSON in which no object has a key twice: Python's own decoder keeps the last value and says nothing of the others."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any


class Decoder:
    """Decodes JSON. `twice` names the keys that stood twice in an object of the last value."""

    def __init__(self) -> None:
        self.twice: list[str] = []
        self._json = json.JSONDecoder(object_pairs_hook=self._object)

    def decode(self, text: str) -> Any:
        """The value that a text holds. Raises ValueError, and RecursionError for deep nesting."""
        self.twice.clear()
        return self._json.decode(text)

    def raw_decode(self, text: str, at: int) -> tuple[Any, int]:
        """The value that begins at `at`, and where it ends. Raises like `decode`."""
        self.twice.clear()
        return self._json.raw_decode(text, at)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            self.twice += [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        return made


def second_place(text: str, key: str) -> int | None:
    """Where `key` stands for the second time, counted from 0; None where it is a key more than twice, so that nobody
    knows which of them are of one object."""
    spelt = re.escape(json.dumps(key, ensure_ascii=False))
    places = [match.start() for match in re.finditer(rf"{spelt}\s*:", text)]
    return places[1] if len(places) == 2 else None
