"""Text to token ids, with control tokens recognised only where they are meant.

Inside the text of a message, something that looks like a control token (`<|im_end|>` quoted by a user, say) is plain
text. A tokenizer cannot know that from the string, so such strings are encoded in pieces: real control tokens by their
id, everything between them by a second copy of the tokenizer that does not recognise control tokens.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from axolotl.data.pieces import LONG, Cutter
from axolotl.errors import ModelError

_NOWHERE = np.empty(0, np.int64)
_MARKUP = re.compile(r"think|tool|reason|thought|answer|scratch", re.IGNORECASE)


@dataclass(slots=True)
class Encoded:
    """Token ids; token i covers the characters starts[i] .. ends[i]-1 (integer arrays, never decreasing)."""

    ids: list[int]
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, ids: list[int], offsets: Sequence[tuple[int, int]]) -> Encoded:
        pairs = np.array(offsets, np.int64).reshape(-1, 2)
        return cls(ids, pairs[:, 0], pairs[:, 1])


class ByteWidths:
    """Character offsets of byte-level BPE tokens from the number of bytes of each token.

    Asking the tokenizer for offsets costs more than encoding does. In a byte-level vocabulary every token stands for
    bytes of the text, so a running sum tells where it is. `None` is returned for a text to which that does not apply.
    """

    def __init__(self, backend: Tokenizer) -> None:
        spec = json.loads(backend.to_str())
        added = {t["content"]: t for t in spec["added_tokens"]}
        normalizer = spec.get("normalizer")
        self.normal_form: Literal["NFC"] | None = (
            "NFC" if normalizer and normalizer["type"] == "NFC" else None
        )
        self.applies = (
            (spec.get("decoder") or {}).get("type") == "ByteLevel"
            and (normalizer is None or self.normal_form is not None)
            and not any(t["lstrip"] or t["rstrip"] or t["normalized"] for t in added.values())
        )
        if not self.applies:
            return
        letters = set(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = backend.get_vocab()
        # a token that is no sequence of bytes makes every sum wrong, and so is noticed
        self.widths = np.full(max(vocabulary.values(), default=0) + 1, 1 << 40, np.int64)
        for token, i in vocabulary.items():
            if token in added:
                self.widths[i] = len(token.encode())
            elif letters.issuperset(token):
                self.widths[i] = len(token)

    def locate(self, text: str, ids: list[int]) -> Encoded | None:
        """The tokens of `text` with their places, or None where they do not add up to the text."""
        if not self.applies or (self.normal_form and not unicodedata.is_normalized(self.normal_form, text)):
            return None
        ends = np.cumsum(self.widths[np.array(ids, np.int64)]) if ids else np.empty(0, np.int64)
        length = int(ends[-1]) if ids else 0
        if text.isascii():
            if length != len(text):
                return None
            return Encoded(ids, np.concatenate(([0], ends[:-1])) if ids else ends, ends)
        coded = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
        if length != len(coded):
            return None
        character = np.cumsum((coded & 0xC0) != 0x80) - 1  # of each byte
        return Encoded(ids, character[np.concatenate(([0], ends[:-1]))], character[ends - 1] + 1)


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
        self.prefix = self._frame()
        self.eos_id: int | None = tokenizer.eos_token_id
        self.bos_id: int | None = tokenizer.bos_token_id

    def _frame(self) -> list[int]:
        """The ids that the tokenizer puts before every text (BOS, where it has one)."""
        bare = self.backend.encode("a", add_special_tokens=False).ids
        framed = self.backend.encode("a", add_special_tokens=True).ids
        starts = range(len(framed) - len(bare) + 1)
        return next((framed[:at] for at in starts if framed[at : at + len(bare)] == bare), [])

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

    @functools.cached_property
    def _bytes(self) -> ByteWidths:
        return ByteWidths(self.backend)

    @functools.cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self.backend)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, parsed as the tokenizer does, nothing put before or after."""
        if max(map(len, texts), default=0) > LONG:
            return [self._ids_of_pieces(t) if len(t) > LONG else self.ids([t])[0] for t in texts]
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _ids_of_pieces(self, text: str) -> list[int]:
        pieces = map(self._bare_ids, self._cutter.cut(text))
        return list(itertools.chain.from_iterable(map(self._shared, pieces)))

    def _bare_ids(self, text: str) -> list[int]:
        found: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return found

    def _shared(self, ids: Iterable[int]) -> Iterable[int]:
        """The same numbers, of which each takes memory once: the tokenizer makes a new one for each token."""
        return map(self._numbers.__getitem__, ids)

    @functools.cached_property
    def _numbers(self) -> list[int]:
        return list(range(1 + max(self.backend.get_vocab().values(), default=0)))

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids and character offsets of each text, control tokens recognised everywhere."""
        texts = list(texts)
        if max(map(len, texts), default=0) > LONG:
            return [
                self._joined(self._cutter.cut(t), self._encode_short)
                if len(t) > LONG
                else self.encode([t])[0]
                for t in texts
            ]
        return self._encode_short(texts)

    def _joined(
        self, pieces: list[str], encode: Callable[[list[str]], list[Encoded]], place: int = 0
    ) -> Encoded:
        """The tokens of a text from those of its pieces; the first begins at the character `place`."""
        ids: list[int] = []
        starts, ends = [_NOWHERE], [_NOWHERE]
        for piece in pieces:
            (found,) = encode([piece])
            ids.extend(self._shared(found.ids))
            starts.append(found.starts + place)
            ends.append(found.ends + place)
            place += len(piece)
        return Encoded(ids, np.concatenate(starts), np.concatenate(ends))

    def _encode_short(self, texts: list[str]) -> list[Encoded]:
        if not self._bytes.applies:
            return [
                Encoded.of(e.ids, e.offsets)
                for e in self.backend.encode_batch(texts, add_special_tokens=False)
            ]
        found = [self._bytes.locate(t, ids) for t, ids in zip(texts, self.ids(texts), strict=True)]
        missing = [t for t, f in zip(texts, found, strict=True) if f is None]
        slow = iter(self.backend.encode_batch(missing, add_special_tokens=False) if missing else ())
        return [f if f is not None else Encoded.of((e := next(slow)).ids, e.offsets) for f in found]

    def encode_guarded(self, text: str, quoted: Sequence[tuple[int, int]]) -> Encoded:
        """Ids and offsets of a text in which control tokens that touch a `quoted` range of characters are plain text."""
        ids: list[int] = []
        starts: list[np.ndarray] = []
        ends: list[np.ndarray] = []

        def add(found: Encoded) -> None:
            ids.extend(found.ids)
            starts.append(found.starts)
            ends.append(found.ends)

        def blind(texts: list[str]) -> list[Encoded]:
            return [
                Encoded.of(e.ids, e.offsets)
                for e in self._blind.encode_batch(texts, add_special_tokens=False)
            ]

        def plain(start: int, end: int) -> None:
            if end > start:
                add(self._joined(self._cutter.cut(text[start:end]), blind, start))

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
            add(Encoded.of([control], [(start, end)]))
            at = end
        plain(at, len(text))
        return Encoded(ids, np.concatenate(starts or [_NOWHERE]), np.concatenate(ends or [_NOWHERE]))


def steering_tokens(tokenizer: Any, literal: str) -> set[str]:
    """Added tokens, flagged special or not, that stand in a template's own words and steer turns.

    Markup that message texts carry on purpose, such as `<think>` and `<tool_call>`, is not among them.
    """
    backend = tokenizer.backend_tokenizer
    added = [t.content for t in backend.get_added_tokens_decoder().values()]
    return {t for t in added if t.strip() and t in literal and not _MARKUP.search(t)}
