"""Prompts for generation, made by the code that made the training rows: same template, same format, same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from axolotl.config.data import DatasetEntry
from axolotl.console import note
from axolotl.data.formats import Format, resolve_format
from axolotl.data.render import Renderer, build_renderer
from axolotl.data.types import Completion, Conversation, Marked, Message, Piece, Pieces, RowProblem
from axolotl.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from axolotl.config.data import DataSection

# Columns that hold a question, in the order in which they are tried.
_QUESTION = (
    "instruction",
    "question",
    "prompt",
    "INSTRUCTION",
    "query",
    "input",
    "article",
    "context",
    "text",
)
_ANSWER = "…"


class Prompter:
    """Turns a question, a conversation or a dataset row into the ids that the model continues.

    `kind` says how: "chat" (a chat template), "instruction" (the format of the training data), or "text" (as it is).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSection) -> None:
        self.tokenizer, self.data = tokenizer, data
        self.entry = _entry_for(tokenizer, data)
        self.renderer: Renderer = build_renderer(tokenizer, data, self.entry)
        self.format: Format | None = None
        if self.entry.type is not None:
            try:
                self.format = resolve_format(self.entry, [], data)
            except ConfigError as error:
                raise UserError(error.problems) from None
        self.question_field: str | None = None
        self.kind = self._find_kind()

    def _find_kind(self) -> str:
        if self.format is None:
            return "text"
        if isinstance(self.entry.type, str) and self.entry.type.startswith("chat_template"):
            return "chat"
        fields = [f.split("|")[0] for f in (*self.format.required_fields, *self.format.optional_fields)]
        candidates = [f for f in _QUESTION if f in fields] + [f for f in fields if f not in _QUESTION]
        for field in candidates:
            value = self._convert({field: "Aq1"}, fields)
            if isinstance(value, Conversation):
                self.question_field = field
                return "chat"
            if isinstance(value, Completion):
                return "text"
            if isinstance(value, Pieces) and any("Aq1" in p.text for p in _before_answer(value).pieces):
                self.question_field = field
                return "instruction"
            if isinstance(value, Marked) and value.spans and "Aq1" in value.text[: value.spans[0][0]]:
                self.question_field = field
                return "instruction"
        if {"messages", "conversations"} & set(fields):
            return "chat"
        note(
            f"Prompts cannot be laid out as `type: {self.format.name}` does; the text is given to the model as it is."
        )
        return "text"

    def _convert(self, row: dict[str, Any], fields: Sequence[str]) -> Any:
        """The format's value for a row whose missing columns are filled; None where it cannot read such a row."""
        assert self.format is not None
        required = [f.split("|")[0] for f in self.format.required_fields]
        try:
            return self.format.convert({**dict.fromkeys(required, _ANSWER), **row})
        except (RowProblem, KeyError, TypeError, ValueError, AttributeError):
            return None

    def stop_tokens(self) -> list[str]:
        """Texts at which an answer ends, besides the model's own ends."""
        return list(dict.fromkeys([*self.renderer.stop_tokens(), *(self.data.eot_tokens or ())]))

    def ask(self, text: str, system: str | None = None) -> list[int]:
        """Ids for one question."""
        if self.kind == "chat":
            opening = [{"role": "system", "content": system}] if system else []
            return self.chat([*opening, {"role": "user", "content": text}])
        if self.kind == "instruction":
            assert self.format is not None
            row: dict[str, Any] = {str(self.question_field): text}
            if system:
                row |= {"system": system, "system_prompt": system}
            return self._before(self._convert(row, self.format.required_fields))
        return self.renderer.encoder.prefix + self.renderer.encoder.ids([text])[0]

    def chat(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None = None) -> list[int]:
        """Ids for the next answer in a conversation. Without a chat template only the last question counts."""
        if self.kind != "chat":
            questions = [m for m in messages if m["role"] == "user"]
            system = next((m["content"] for m in messages if m["role"] == "system"), None)
            return self.ask(str(questions[-1]["content"]) if questions else "", system)
        turns = [
            Message(m["role"], m.get("content"), {k: v for k, v in m.items() if k not in ("role", "content")})
            for m in messages
        ]
        return self._chat_ids(Conversation(turns, tools))

    def takes_system(self) -> bool:
        """Whether a system message has a place in these prompts."""
        if self.kind != "instruction":
            return self.kind == "chat"
        marked = self.tokenizer.decode(self.ask("Aq1", "Sy1"))
        return "Sy1" in str(marked)

    def row(self, row: dict[str, Any], system: str | None = None) -> list[int]:
        """Ids for a row of a file: `messages`, a row as the training data has it (its answer is left out), or `prompt`.

        `system` stands before the question of a row that has no system message of its own. Raises DataError for a row that none of these fits.
        """
        field = self.entry.field_messages or "messages"
        if self.kind == "chat" and self.format is not None and isinstance(row.get(field), (list, str)):
            try:
                value = self.format.convert(row)
            except RowProblem as problem:
                raise DataError(f"{problem}.", problem.remedy) from None
            if isinstance(value, Conversation):
                asked = _without_answer(value)
                if system and all(m.role != "system" for m in asked.messages):
                    opened = [Message("system", system, {}), *asked.messages]
                    asked = Conversation(opened, asked.tools, asked.variables)
                return self._chat_ids(asked)
        if isinstance(row.get("messages"), list):
            messages = _list_without_answer(row["messages"])
            if system and all(m.get("role") != "system" for m in messages):
                messages = [{"role": "system", "content": system}, *messages]
            return self.chat(messages)
        if self.kind == "instruction" and row.get(str(self.question_field)) is not None:
            assert self.format is not None
            opening = {"system": system, "system_prompt": system} if system else {}
            return self._before(self._convert({**opening, **row}, self.format.required_fields))
        for key in dict.fromkeys((self.question_field, "prompt", *_QUESTION)):
            if key and isinstance(row.get(key), str):
                if not row[key].strip():
                    raise DataError(f"The question in `{key}` is empty.", "Write one, or remove the row.")
                return self.ask(row[key], row["system"] if isinstance(row.get("system"), str) else system)
        raise DataError(
            f"A row with {', '.join(f'`{k}`' for k in row) or 'no columns'} holds no question.",
            "Give each row `prompt`, `messages`, or the columns of the training data.",
        )

    def _chat_ids(self, conversation: Conversation) -> list[int]:
        asked = Conversation(
            conversation.messages,
            conversation.tools,
            {**conversation.variables, "add_generation_prompt": True},
        )
        return self._rendered(asked)

    def _before(self, value: Any) -> list[int]:
        if isinstance(value, Pieces):
            return self._rendered(_before_answer(value))
        if isinstance(value, Marked):
            text = value.text[: value.spans[0][0]]
            return self.renderer.encoder.prefix + self.renderer.encoder.ids([text])[0]
        raise DataError("This row cannot be laid out as the training data is.", "Check its columns.")

    def _rendered(self, value: Conversation | Pieces) -> list[int]:
        result = self.renderer.render_batch([value])[0]
        if isinstance(result, RowProblem):
            raise DataError(f"The prompt cannot be rendered: {result}.", result.remedy)
        return result[0].input_ids


def _entry_for(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> DatasetEntry:
    """The dataset whose layout prompts take: the first chat dataset, else the first, else the template or plain text."""
    for entry in data.datasets:
        if isinstance(entry.type, str) and entry.type.startswith("chat_template"):
            return entry
    typed = [e for e in data.datasets if e.type is not None]
    if typed:
        return typed[0]
    if data.chat_template or data.chat_template_jinja or tokenizer.chat_template:
        return DatasetEntry(type="chat_template")
    return DatasetEntry()


def _before_answer(value: Pieces) -> Pieces:
    """All pieces before the answer, which is the last one."""
    return Pieces([Piece(p.text, p.train, p.bos, p.eos) for p in value.pieces[:-1]])


def _without_answer(conversation: Conversation) -> Conversation:
    messages = list(conversation.messages)
    while messages and messages[-1].role == "assistant":
        messages.pop()
    return Conversation(messages, conversation.tools, conversation.variables)


def _list_without_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = list(messages)
    while kept and kept[-1].get("role") == "assistant":
        kept.pop()
    return kept
