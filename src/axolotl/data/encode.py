"""Text to token ids, with control tokens recognised only where they are meant.

Inside the text of a message, something that looks like a control token (`<|im_end|>` quoted by a user, say) is plain
text. A tokenizer cannot know that from the string, so such strings are encoded in pieces: real control tokens by their
id, everything between them by a second copy of the tokenizer that does not recognise control tokens.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from axolotl.errors import ModelError

_MARKUP = re.compile(r"think|tool|reason|thought|answer|scratch", re.IGNORECASE)


@dataclass(slots=True)
class Encoded:
    """Token ids with the characters (start, end) that each covers."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Encoder:
    """Encodes text with the model's tokenizer. `extra_controls`: added tokens that the template uses to steer.

    Raises ModelError for a tokenizer without a fast (Rust) backend.
    """

    def __init__(self, tokenizer: Any, extra_controls: Iterable[str] = ()) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(
                f"the tokenizer `{getattr(tokenizer, 'name_or_path', type(tokenizer).__name__)}` has no fast backend.",
                "Use a model whose tokenizer comes with a tokenizer.json.",
            )
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        added = backend.get_added_tokens_decoder()
        extra = set(extra_controls)
        self._added = {t.content: (i, t) for i, t in added.items()}
        self.controls = {t.content: i for i, t in added.items() if t.special or t.content in extra}
        self._extra = {t for t in extra if t in self._added}
        names = sorted(self.controls, key=len, reverse=True)
        self.control_pattern = re.compile("|".join(map(re.escape, names))) if names else None
        self.prefix, self.suffix = self._frame()
        self.eos_id: int | None = tokenizer.eos_token_id
        self.bos_id: int | None = tokenizer.bos_token_id

    def _frame(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer puts before and after every text (BOS, seldom EOS)."""
        bare = self.backend.encode("a", add_special_tokens=False).ids
        framed = self.backend.encode("a", add_special_tokens=True).ids
        for at in range(len(framed) - len(bare) + 1):
            if framed[at : at + len(bare)] == bare:
                return framed[:at], framed[at + len(bare) :]
        return [], []

    @functools.cached_property
    def _blind(self) -> Tokenizer:
        """A copy that takes control tokens for text, and knows the other added tokens as before."""
        spec = json.loads(self.backend.to_str())
        for token in spec["added_tokens"]:
            token["special"] = token["content"] in self.controls
        spec["truncation"] = spec["padding"] = None
        copy = Tokenizer.from_str(json.dumps(spec))
        copy.encode_special_tokens = True
        return copy

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, parsed as the tokenizer does, nothing put before or after."""
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids and character offsets of each text, control tokens recognised everywhere."""
        return [
            Encoded(e.ids, e.offsets)
            for e in self.backend.encode_batch(list(texts), add_special_tokens=False)
        ]

    def looks_like_control(self, text: str) -> bool:
        return self.control_pattern is not None and self.control_pattern.search(text) is not None

    def encode_guarded(self, text: str, quoted: Sequence[tuple[int, int]]) -> Encoded:
        """Ids and offsets of a text in which control tokens that touch a `quoted` range of characters are plain text."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []

        def plain(start: int, end: int) -> None:
            if end > start:
                encoded = self._blind.encode(text[start:end], add_special_tokens=False)
                ids.extend(encoded.ids)
                offsets.extend((a + start, b + start) for a, b in encoded.offsets)

        at = 0
        for match in self.control_pattern.finditer(text) if self.control_pattern else ():
            start, end = match.span()
            if any(a < end and b > start for a, b in quoted):
                continue
            control, flags = self._added[match.group()]
            if flags.lstrip:
                start = max(at, len(text[:start].rstrip()))
            if flags.rstrip:
                end += len(text[end:]) - len(text[end:].lstrip())
            if start < at:
                continue
            plain(at, start)
            ids.append(control)
            offsets.append((start, end))
            at = end
        plain(at, len(text))
        return Encoded(ids, offsets)


def steering_tokens(tokenizer: Any, literal: str) -> set[str]:
    """Added tokens, flagged special or not, that stand in a template's own words and steer turns.

    Markup that message texts carry on purpose, such as `<think>` and `<tool_call>`, is not among them.
    """
    backend = tokenizer.backend_tokenizer
    added = [t.content for t in backend.get_added_tokens_decoder().values()]
    return {t for t in added if t.strip() and t in literal and not _MARKUP.search(t)}
