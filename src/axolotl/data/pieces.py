"""Cutting a long text where its tokens cannot change, so that memory for encoding does not grow with the text.

A tokenizer needs about a hundred bytes of memory for each byte of a text that it takes at once. Byte-level BPE first splits
a text into words, from left to right, and merges bytes within words only: cut between two words, the parts have the
tokens of the whole.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from tokenizers import Tokenizer

PIECE = 1 << 18
"""Characters of a piece, about."""
LONG = 2 * PIECE
"""Characters beyond which a text is cut."""
_SEPARATORS = " \n\t.,;:!?。、，！？；："
_LETTERS = ("b", "я", "字")


class Cutter:
    """Cuts texts for one tokenizer. Where it cannot be known that a cut changes nothing, texts stay whole."""

    def __init__(self, backend: Tokenizer, piece: int = PIECE) -> None:
        self.backend, self.piece = backend, piece

    @functools.cached_property
    def _between_words(self) -> re.Pattern[str] | None:
        """Places where a word surely ends: after a letter, before one of the separators at which this tokenizer splits."""
        spec = json.loads(self.backend.to_str())
        normalizer = spec.get("normalizer")
        if (normalizer and normalizer["type"] != "NFC") or not _splits_locally(spec.get("pre_tokenizer")):
            return None
        added = "".join(t["content"] for t in spec["added_tokens"])
        if any(t["lstrip"] or t["rstrip"] or t["normalized"] for t in spec["added_tokens"]):
            return None
        good = [s for s in _SEPARATORS if s not in added and all(self._ends_word(a, s) for a in _LETTERS)]
        return re.compile(f"(?<=[^\\W\\d_])(?=[{re.escape(''.join(good))}])") if good else None

    def _ends_word(self, letter: str, separator: str) -> bool:
        assert self.backend.pre_tokenizer is not None
        for after in (letter, "\n", " ", separator, "1"):
            text = f"{letter}{letter}{separator}{after}{letter}"
            words = self.backend.pre_tokenizer.pre_tokenize_str(text)
            if 2 not in {begin for _, (begin, _) in words}:
                return False
        return True

    def cut(self, text: str) -> list[str]:
        """The pieces of a text, which together are the text."""
        if len(text) <= 2 * self.piece or self._between_words is None:
            return [text]
        pieces, at = [], 0
        while len(text) - at > 2 * self.piece:
            place = self._between_words.search(text, at + self.piece)
            if place is None:
                break
            pieces.append(text[at : place.start()])
            at = place.start()
        return [*pieces, text[at:]]


def _splits_locally(step: dict[str, Any] | None) -> bool:
    """True where the splitting into words goes on after a word as it would at the beginning of a text."""
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            return bool(steps) and all(map(_splits_locally, steps))
        case {"type": "Split", "pattern": {"Regex": pattern}}:
            return "(?<" not in pattern and "^" not in re.sub(r"\[\^|\\.", "", pattern)
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return True
        case {"type": "Digits"}:
            return True
    return False
