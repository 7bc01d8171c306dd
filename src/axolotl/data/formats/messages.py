"""One message of a conversation: its keys as the user names them, its reasoning, its tool calls, what of it is trained."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from axolotl.data.formats.columns import decoded, kind
from axolotl.data.formats.watch import Watch
from axolotl.data.types import DetailSpan, Message, RowProblem
from axolotl.errors import ConfigError

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry

DEFAULT_ROLES = {
    "user": ["user", "human"],
    "assistant": ["assistant", "gpt"],
    "system": ["system"],
    "tool": ["tool"],
}
THINKING = "reasoning_content"
_THOUGHTS = (
    ("<think>", "</think>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
_SOLUTION = ("<|begin_of_solution|>", "<|end_of_solution|>")


def role_names(entry: DatasetEntry) -> dict[str, str]:
    """The template's role for each name of a role in the data; a name that is not here stands for itself.

    Raises ConfigError where `roles` gives one name to two roles.
    """
    found: dict[str, str] = {}
    for role, names in (entry.roles or DEFAULT_ROLES).items():
        for name in names:
            if found.setdefault(name, role) != role:
                raise ConfigError(
                    f"`roles` gives `{name}` to both `{found[name]}` and `{role}`.",
                    "Leave it in one of the lists.",
                )
    return found


def trained_roles(entry: DatasetEntry) -> frozenset[str]:
    """The roles that are trained, in the template's names."""
    names = role_names(entry)
    wanted = ["assistant"] if entry.roles_to_train is None else entry.roles_to_train
    return frozenset(names.get(role, role) for role in wanted)


class MessageReader:
    """Reads messages of one dataset. Everything that the options decide is worked out once, here."""

    def __init__(self, entry: DatasetEntry, data: DataSection) -> None:
        mappings = dict(entry.message_property_mappings or {})
        self.role_key = mappings.pop("role", "role")
        self.content_key = mappings.pop("content", "content")
        self.thinking_key = entry.template_thinking_key or THINKING
        thinking = entry.field_thinking or THINKING
        if thinking != self.thinking_key:
            mappings.setdefault(self.thinking_key, thinking)
        self.mappings = [(target, source) for target, source in mappings.items() if target != source]
        self.training_key = entry.message_field_training
        self.detail_key = entry.message_field_training_detail
        named = (
            self.training_key,
            self.detail_key,
            *(s for t, s in (entry.message_property_mappings or {}).items() if t not in ("role", "content")),
        )
        self.watch = Watch({key for key in named if key})
        self.known = {self.role_key, self.content_key, "role", "content"}
        self.known |= {source for _, source in self.mappings}
        self.known |= {key for key in (self.training_key, self.detail_key) if key}
        self.roles = role_names(entry)
        self.trained = trained_roles(entry)
        self.on_inputs = bool(data.train_on_inputs)
        self.split_thinking = bool(entry.split_thinking)

    def read(self, raw: Any, number: int) -> Message:
        """The message that `raw` is; `number` counts from 1. Raises RowProblem where it cannot be read."""
        if type(raw) is not dict:
            raise RowProblem("message is not an object", f"message {number} is {kind(raw)}")
        if self.watch.unseen:
            self.watch.look(raw)
        role = raw.get(self.role_key)
        if type(role) is not str:
            told = self._lacks(raw, number, self.role_key, role)
            raise RowProblem("message without role", told, self._other_keys(raw))
        role = self.roles.get(role, role)
        content = raw.get(self.content_key)
        fields: dict[str, Any] = {}
        if len(raw) > 2 or content is None or self.mappings:
            self._collect(raw, fields, number)
        if (
            type(content) is str
            and not fields
            and not self.split_thinking
            and not self.training_key
            and not self.detail_key
        ):
            return Message(role, content, fields)
        return self._full(raw, number, role, content, fields)

    def _collect(self, raw: dict[str, Any], fields: dict[str, Any], number: int) -> None:
        known = self.known
        for key, value in raw.items():
            if value is not None and key not in known:
                fields[key] = value if type(value) is str else _clean(value)
        for target, source in self.mappings:
            value = raw.get(source)
            if value is not None:
                fields[target] = value if type(value) is str else _clean(value)
        if "tool_calls" in fields:
            fields["tool_calls"] = _tool_calls(fields["tool_calls"], number)

    def _full(
        self, raw: dict[str, Any], number: int, role: str, content: Any, fields: dict[str, Any]
    ) -> Message:
        train: bool | None = None
        if self.training_key:
            train = _flag(raw.get(self.training_key), f"`{self.training_key}` of message {number}")
        detail: list[DetailSpan] | None = None
        explicit = False
        if content is None:
            if not any(fields.get(key) for key in ("tool_calls", "function_call", self.thinking_key)):
                told = self._lacks(raw, number, self.content_key, None)
                raise RowProblem("message without content", told, self._other_keys(raw))
        elif type(content) is list:
            content, detail, explicit = _joined(content, f"`{self.content_key}` of message {number}")
        elif type(content) is not str:
            raise RowProblem(
                "content is not text", f"`{self.content_key}` of message {number} is {kind(content)}"
            )
        given = raw.get(self.detail_key) if self.detail_key else None
        ranged = given is not None
        if ranged:
            detail, explicit = _spans(given, content or "", f"`{self.detail_key}` of message {number}"), True
            if not detail:  # no range at all: nothing of the turn, unless it is marked as trained
                train, detail, ranged = bool(train), None, False
        field_details: dict[str, list[DetailSpan]] | None = None
        thinking = fields.get(self.thinking_key)
        if type(thinking) is list:
            text, spans, flagged = _joined(thinking, f"`{self.thinking_key}` of message {number}")
            fields[self.thinking_key] = text
            explicit |= flagged
            if spans is not None:
                field_details = {self.thinking_key: spans}
        elif thinking is None and self.split_thinking and role == "assistant" and type(content) is str:
            parts = _without_thoughts(content)
            if parts is not None:
                (a, b), (c, d) = parts
                fields[self.thinking_key] = content[a:b]
                if detail is not None:
                    field_details = {self.thinking_key: _within(detail, a, b)}
                    detail = _within(detail, c, d)
                content = content[c:d]
        elif type(thinking) is str and thinking and ranged:
            # what ranges do not name is not trained: the reasoning of such a turn has none
            field_details = {self.thinking_key: [DetailSpan(0, len(thinking) - 1, False)]}
        if train is None and not explicit and (detail is not None or field_details):
            # Parts that only say what is left out do not turn a turn on that the roles leave off.
            train = self.on_inputs or role in self.trained
        return Message(role, content, fields, train, detail, field_details)

    def _lacks(self, raw: dict[str, Any], number: int, key: str, value: Any) -> str:
        if key in raw:
            return f"`{key}` of message {number} is {kind(value)}"
        return f"message {number} has no `{key}`, it has: {', '.join(map(str, raw)) or 'nothing'}"

    def _other_keys(self, raw: dict[str, Any]) -> str:
        """The mapping to write for a message whose keys have other names, as far as they are usual ones."""
        role = next((k for k in ("role", "from", "speaker") if k in raw), None)
        content = next((k for k in ("content", "value", "text") if k in raw), None)
        if not role or not content or (role, content) == (self.role_key, self.content_key):
            return ""
        return f"Set `message_property_mappings: {{role: {role}, content: {content}}}`."


def _clean(value: Any) -> Any:
    if type(value) is dict:
        return {k: _clean(v) for k, v in value.items() if v is not None}
    if type(value) is list:
        return [_clean(v) for v in value]
    return value


def _flag(value: Any, what: str) -> bool | None:
    """A word on training: a boolean, or a weight that counts as true above 0. None where there is none."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return value > 0
    raise RowProblem("training flag is not a boolean", f"{what} is {kind(value)}")


def _tool_calls(calls: Any, number: int) -> Any:
    """Tool calls with their arguments as values, where they came as JSON text."""
    what = f"`tool_calls` of message {number}"
    if isinstance(calls, str):
        calls = decoded(calls, what)
    if not isinstance(calls, list):
        raise RowProblem("tool calls are not a list", f"{what} is {kind(calls)}")
    return [_tool_call(call, what) for call in calls]


def _tool_call(call: Any, what: str) -> Any:
    if not isinstance(call, dict):
        raise RowProblem("tool call is not an object", f"{what} holds {kind(call)}")
    function = call.get("function")
    if isinstance(function, dict):
        return {**call, "function": _with_arguments(function, what)}
    return _with_arguments(call, what)


def _with_arguments(function: dict[str, Any], what: str) -> dict[str, Any]:
    given = function.get("arguments")
    if not isinstance(given, str):
        return function
    where = f"the arguments of `{function.get('name')}` in {what}"
    return {**function, "arguments": decoded(given, where) if given.strip() else {}}


def _joined(parts: list[Any], what: str) -> tuple[str, list[DetailSpan] | None, bool]:
    """Text of content parts, the spans that their `train` or `weight` make, and whether one of them says true."""
    texts: list[str] = []
    spans: list[DetailSpan] = []
    flagged = explicit = False
    at = 0
    for number, part in enumerate(parts, 1):
        flag: bool | None = None
        if isinstance(part, str):
            text: Any = part
        elif isinstance(part, dict):
            sort = part.get("type") or "text"
            if sort != "text":
                raise RowProblem("message part is not text", f"part {number} in {what} has type `{sort}`")
            text = next((part[k] for k in ("text", "content", "value") if part.get(k) is not None), None)
            given = part.get("train")
            flag = _flag(
                part.get("weight") if given is None else given, f"`train` of part {number} in {what}"
            )
        else:
            raise RowProblem("message part is not text", f"part {number} in {what} is {kind(part)}")
        if not isinstance(text, str):
            raise RowProblem("message part is not text", f"part {number} in {what} has no text")
        flagged |= flag is not None
        explicit |= flag is True
        if text:
            spans.append(DetailSpan(at, at + len(text) - 1, flag is not False))
            texts.append(text)
            at += len(text)
    return "".join(texts), spans if flagged else None, explicit


def _spans(given: Any, content: str, what: str) -> list[DetailSpan]:
    """Character ranges as a row lists them, checked against the text that they are about."""
    if isinstance(given, str):
        given = decoded(given, what)
    if not isinstance(given, list):
        raise RowProblem("training detail is not a list", f"{what} is {kind(given)}")
    spans = []
    for each in given:
        if not isinstance(each, dict):
            raise RowProblem("training detail is not an object", f"{what} holds {kind(each)}")
        begin, end = each.get("begin_offset"), each.get("end_offset")
        train = _flag(each.get("train"), f"`train` in {what}")
        if type(begin) is not int or type(end) is not int or train is None:
            raise RowProblem(
                "training detail is incomplete",
                f"{what} needs begin_offset, end_offset and train in each entry",
            )
        if not 0 <= begin <= end < len(content):
            raise RowProblem(
                "training detail is out of range",
                f"{what} has {begin} to {end} (both included), and the text has {len(content)} characters",
            )
        spans.append(DetailSpan(begin, end, train))
    spans.sort(key=lambda s: s.begin)
    for one, other in itertools.pairwise(spans):
        if other.begin <= one.end and other.train != one.train:
            raise RowProblem(
                "training detail contradicts itself",
                f"{what} trains and masks characters {other.begin} to {one.end}",
            )
    return spans


def _without_thoughts(content: str) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Where the reasoning that opens a text stands, and where the answer after it; None where no reasoning opens it."""
    first = len(content) - len(content.lstrip())
    for opening, closing in _THOUGHTS:
        if not content.startswith(opening, first):
            continue
        begin = first + len(opening)
        end = content.find(closing, begin)
        if end < 0:
            return None
        answer = _stripped(content, end + len(closing), len(content), right=False)
        if content.startswith(_SOLUTION[0], answer[0]):
            inner = answer[0] + len(_SOLUTION[0])
            close = content.find(_SOLUTION[1], inner)
            if close >= 0 and not content[close + len(_SOLUTION[1]) :].strip():
                answer = _stripped(content, inner, close)
        return _stripped(content, begin, end), answer
    return None


def _stripped(text: str, start: int, end: int, right: bool = True) -> tuple[int, int]:
    """The range without the white space at its ends."""
    part = text[start:end]
    start += len(part) - len(part.lstrip())
    if right:
        end = max(start, end - (len(part) - len(part.rstrip())))
    return min(start, end), end


def _within(spans: list[DetailSpan], start: int, end: int) -> list[DetailSpan]:
    """The spans as far as they lie in text[start:end], counted from its beginning."""
    return [
        DetailSpan(max(s.begin, start) - start, min(s.end, end - 1) - start, s.train)
        for s in spans
        if s.begin < end and s.end >= start and end > start
    ]
