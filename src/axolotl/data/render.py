"""From typed values to `input_ids` and `labels`: the only place that decides what is trained."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from axolotl.data.chat import ChatRenderer
from axolotl.data.encode import Encoder
from axolotl.data.formats.registry import formats
from axolotl.data.mask import labels_of
from axolotl.data.types import (
    IGNORE_INDEX,
    Completion,
    Conversation,
    FormatValue,
    Marked,
    Pieces,
    Rendered,
    RowProblem,
    Tokenized,
)
from axolotl.errors import DataError, Problem

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry

_WITHOUT_EOS = ("input_output", "_synthetic")
"""Formats whose rows hold all that is trained."""


def build_renderer(tokenizer: Any, data: DataSection, entry: DatasetEntry) -> Renderer:
    """The renderer of one dataset. Raises DataError for a template that cannot be found or read."""
    return Renderer(tokenizer, data, entry)


class Renderer:
    """Renders the values of one dataset. Holds nothing that a row changes."""

    def __init__(self, tokenizer: Any, data: DataSection, entry: DatasetEntry) -> None:
        self.tokenizer, self.data, self.entry = tokenizer, data, entry
        self.sequence_len = int(data.sequence_len)
        self.train_on_inputs = bool(data.train_on_inputs)
        self._encoder: Encoder | None = None
        self._chat: ChatRenderer | None = None

    @property
    def encoder(self) -> Encoder:
        if self._encoder is None:
            self._encoder = Encoder(self.tokenizer)
        return self._encoder

    @functools.cached_property
    def vocabulary(self) -> int:
        """One more than the greatest id of the tokenizer."""
        return 1 + max(self.encoder.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def chat(self) -> ChatRenderer:
        """Made when the first conversation comes: instruction formats need no template."""
        if self._chat is None:
            self._chat = ChatRenderer(self.tokenizer, self.data, self.entry)
        return self._chat

    def fingerprint_parts(self) -> dict[str, str]:
        """What, besides the options, decides the result: the text of the template where one may be used."""
        if not self._may_use_template():
            return {}
        try:
            return {"chat_template": self.chat.template.text}
        except DataError:
            if self._is_chat():
                raise
            return {}  # the user's own format may well do without

    def _is_chat(self) -> bool:
        """True where the rows are conversations whatever they hold."""
        kind = self.entry.type
        return isinstance(kind, str) and kind.split(".")[0].split(":")[0] in ("chat_template", "messages")

    def _may_use_template(self) -> bool:
        kind = self.entry.type
        return self._is_chat() or (isinstance(kind, str) and not _is_built_in(kind))

    def problems(self) -> list[Problem]:
        """Mistakes and warnings that are known before any row is read."""
        if self._is_chat():
            return self.chat.problems()
        kind = self.entry.type
        if self.tokenizer.eos_token is None and kind is not None and kind not in _WITHOUT_EOS:
            message = "the tokenizer has no EOS token: nothing marks where a text ends, and generation would not stop there."
            return [
                Problem(
                    message, "Name one under `special_tokens: eos_token:`.", "warning", ("special_tokens",)
                )
            ]
        return []

    def stop_tokens(self) -> list[str]:
        """The texts that end a turn of the assistant, for generation to stop at."""
        if self._is_chat():
            return self.chat.stop_tokens()
        return [self.tokenizer.eos_token] if self.tokenizer.eos_token else []

    def take_notes(self) -> dict[str, int]:
        """What templates left out since the last call: a sentence and the number of turns."""
        if self._chat is None or not self._chat.notes:
            return {}
        notes = dict(self._chat.notes)
        self._chat.notes.clear()
        return notes

    def render_batch(self, values: Sequence[FormatValue]) -> list[list[Rendered] | RowProblem]:
        """Renders many values at once: for each, its training rows (several for a long text), or why it cannot be used."""
        results: list[list[Rendered] | RowProblem | None] = [None] * len(values)
        chats: list[int] = []
        texts: list[str] = []
        for i, value in enumerate(values):
            if isinstance(value, Conversation):
                chats.append(i)
            elif isinstance(value, Tokenized):
                results[i] = _pass_through(value, self.vocabulary)
            elif isinstance(value, Pieces):
                texts.extend(p.text for p in value.pieces)
            elif isinstance(value, Completion):
                texts.append(value.text)
        ids = iter(self.encoder.ids(texts) if texts else ())
        for i, value in enumerate(values):
            if isinstance(value, Pieces):
                results[i] = [self._pieces(value, [next(ids) for _ in value.pieces])]
            elif isinstance(value, Completion):
                results[i] = self._completion(next(ids))
            elif isinstance(value, Marked):
                results[i] = [self._marked(value)]
        if chats:
            for i, result in zip(chats, self.chat.render([values[i] for i in chats]), strict=True):  # type: ignore[misc]
                results[i] = result
        return results  # type: ignore[return-value]

    def _pieces(self, value: Pieces, encoded: list[list[int]]) -> Rendered:
        input_ids: list[int] = []
        labels: list[int] = []
        eos = self.encoder.eos_id
        for piece, ids in zip(value.pieces, encoded, strict=True):
            if not ids:
                continue
            if piece.bos:
                ids = self.encoder.prefix + ids
            if piece.eos and eos is not None:
                ids = ids + [eos] * (piece.eos - (ids[-1] == eos))
            input_ids += ids
            labels += ids if piece.train else [IGNORE_INDEX] * len(ids)
        return Rendered(input_ids, labels)

    def _completion(self, ids: list[int]) -> list[Rendered]:
        if not ids:
            return [Rendered([], [])]
        eos = self.encoder.eos_id
        ids = self.encoder.prefix + ids
        if eos is not None and ids[-1] != eos:
            ids = [*ids, eos]
        step = self.sequence_len
        return [Rendered(ids[a : a + step], ids[a : a + step]) for a in range(0, len(ids), step)]

    def _marked(self, value: Marked) -> Rendered:
        encoded = self.encoder.encode([value.text])[0]
        labels = labels_of(encoded, value.spans, ())
        prefix, eos = self.encoder.prefix, self.encoder.eos_id
        ids = prefix + encoded.ids
        labels = (prefix if self.train_on_inputs else [IGNORE_INDEX] * len(prefix)) + labels
        if self.train_on_inputs:
            labels = list(ids)
        if ids and eos is not None and ids[-1] != eos:
            ids, labels = [*ids, eos], [*labels, eos]
        return Rendered(ids, labels)


def _is_built_in(kind: str) -> bool:
    """True for the formats of this package, of which only the chat formats give conversations."""
    name = kind.partition(":")[0]
    names = (name, name.rpartition(".")[0])
    return any(n in formats and formats.describe(n).module.startswith(formats.folder) for n in names)


def _pass_through(value: Tokenized, vocabulary: int) -> list[Rendered] | RowProblem:
    if len(value.input_ids) != len(value.labels):
        return RowProblem(
            "input_ids and labels differ in length", f"{len(value.input_ids)} and {len(value.labels)} entries"
        )
    if not value.input_ids:
        return [Rendered([], [])]
    for field, found, least in (("input_ids", value.input_ids, 0), ("labels", value.labels, IGNORE_INDEX)):
        for each in (min(found), max(found)):
            if least <= each < vocabulary and (each >= 0 or each == IGNORE_INDEX):
                continue
            also = f", {IGNORE_INDEX} for what is not trained" if field == "labels" else ""
            return RowProblem(
                "token id outside the vocabulary",
                f"`{field}` holds {each}; this tokenizer has the ids 0 to {vocabulary - 1:,}{also}",
                "Tokenise the rows with the tokenizer of this `base_model`.",
            )
    if any(IGNORE_INDEX < label < 0 for label in value.labels):
        wrong = next(label for label in value.labels if IGNORE_INDEX < label < 0)
        return RowProblem(
            "token id outside the vocabulary",
            f"`labels` holds {wrong}; besides token ids it may hold only {IGNORE_INDEX}",
            f"Write {IGNORE_INDEX} for what is not trained.",
        )
    return [Rendered(value.input_ids, value.labels)]
