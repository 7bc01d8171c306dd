"""Chat templates: which one is meant, rendering it, and rendering it with the origin of every character.

A bundled template is a `.jinja` file in the folder beside this file. `ChatTemplate.render` gives plain text, for
inference and for anyone who asks; `ChatTemplate.trace` renders a `Conversation` once and tells which characters came
from which message (see `traced.py`), which turn the template was at when it wrote its own words, and which of those
words it wrote because of tool calls. The loss mask is computed from that in `mask.py`.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from axolotl.data.pen import Pen, TurnDict, instrument
from axolotl.data.traced import Traced, concat, find_tag, join, trace
from axolotl.data.types import Conversation, Message, RowProblem
from axolotl.errors import DataError, Problem

if TYPE_CHECKING:
    from axolotl.config.data import DataSection

FOLDER = Path(__file__).with_suffix("")
FALLBACK = "tokenizer_default_fallback_"


def template_names() -> list[str]:
    """The bundled templates, sorted."""
    return sorted(f.stem for f in FOLDER.glob("*.jinja"))


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, which some tokenizers' templates carry: the body, nothing else."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if type(value) is Traced and text[1:-1] == value:
        last = len(value.runs) - 1
        return Traced(
            text,
            tuple(
                (a + 1 if i else 0, b + 1 if i < last else len(text), tag)
                for i, (a, b, tag) in enumerate(value.runs)
            ),
        )
    tag = find_tag(value)
    return text if tag is None else Traced.whole(text, tag)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox that transformers gives chat templates, with text operations that keep origins."""

    concat = staticmethod(concat)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if attribute == "join" and isinstance(obj, str):
            return functools.partial(join, obj)
        return super().getattr(obj, attribute)


def _join_filter(value: Iterable[Any], separator: str = "", attribute: str | None = None) -> Any:
    if attribute is not None:
        value = [v[attribute] for v in value]
    return join(separator, value)


def _keeps_origin(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a filter whose result is a new text: what comes of a traced text is traced as a whole."""

    @functools.wraps(filter_)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = filter_(*args, **kwargs)
        if type(result) is str and (tag := find_tag(args)) is not None:
            return Traced.whole(result, tag)
        return result

    return wrapped


_TEXT_FILTERS = (
    "upper",
    "lower",
    "title",
    "capitalize",
    "indent",
    "replace",
    "format",
    "center",
    "wordwrap",
    "truncate",
    "striptags",
)


@functools.cache
def environment() -> jinja2.Environment:
    """The one Jinja environment for chat templates."""
    env = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    env.filters["tojson"] = _to_json
    env.filters["join"] = _join_filter
    for name in _TEXT_FILTERS:
        env.filters[name] = _keeps_origin(env.filters[name])
    env.globals["raise_exception"] = _refuse
    env.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return env


@dataclass(frozen=True, slots=True)
class Source:
    """What a tag stands for: a part of one turn, and whether `train_detail` says it is trained (None: it says nothing)."""

    turn: int
    kind: str  # "content", "reasoning", "tool_calls" or "other"
    trained: bool | None = None


@dataclass(slots=True)
class Trace:
    """A rendered conversation.

    `runs`: (start, end, Source) of all characters that came from messages, in order. `own`: (start, end, turn, tools)
    of what was written while the template stood at a turn (-1: at none); `tools` tells that it was written because of
    tool calls.
    """

    text: str
    runs: list[tuple[int, int, Source]]
    own: list[tuple[int, int, int, bool]]


_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")


_NULL_TEST = re.compile(r"(?<!\w)content['\"]?\]?\s*(is\s+(not\s+)?|[!=]=\s*)none\b", re.IGNORECASE)


class ChatTemplate:
    """One chat template. `name` is how the user called it, `text` its Jinja source. Raises DataError if it is not Jinja."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self.tests_null = _NULL_TEST.search(text) is not None
        """Whether it asks if a content is null. Others would write `None`, or fail, where a turn only makes calls."""
        env = environment()
        try:
            self._plain = env.from_string(text)
            tree = env.parse(text)
            self.words = frozenset(c.value for c in tree.find_all(nodes.Const) if isinstance(c.value, str))
            """The texts that the template compares with or writes, names of roles among them."""
            instrument(tree, env)
            code = env.compile(tree, name, None)
            self._traced = jinja2.Template.from_code(env, code, dict(env.globals))  # type: ignore[arg-type]
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template `{name}` is not valid Jinja: {error.message} (line {error.lineno} of the template).",
                "Correct the template, or name a bundled one with `chat_template`.",
            ) from None

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: list[Any] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation. Raises jinja2.TemplateError where the template refuses it."""
        text = self._plain.render(
            messages=[
                {**m, "content": ""} if m.get("content", "") is None and not self.tests_null else dict(m)
                for m in messages
            ],
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
        return str(text)

    def trace(self, conversation: Conversation, variables: dict[str, Any]) -> Trace:
        """The text of a conversation with the origin of each character. Raises RowProblem where the template refuses it."""
        sources: list[Source] = []
        messages = [
            _traced_message(i, m, sources, self.tests_null) for i, m in enumerate(conversation.messages)
        ]
        pen = Pen()
        given = {
            "messages": messages,
            "tools": conversation.tools,
            "add_generation_prompt": False,
            **variables,
            **conversation.variables,
            **pen.calls(),
        }
        parts: list[str] = []
        runs: list[tuple[int, int, Source]] = []
        own: list[tuple[int, int, int, bool]] = []
        at = 0
        try:
            for part in self._traced.root_render_func(self._traced.new_context(given)):
                if type(part) is Traced:
                    runs.extend((a + at, b + at, sources[tag]) for a, b, tag in part.runs)
                end = at + len(part)
                tools = pen.tools > 0
                if own and own[-1][2] == pen.turn and own[-1][3] == tools:
                    own[-1] = (own[-1][0], end, pen.turn, tools)
                else:
                    own.append((at, end, pen.turn, tools))
                parts.append(part)
                at = end
        except jinja2.TemplateError as error:
            raise RowProblem(
                "the chat template refuses the conversation", f"`{self.name}` says: {_in_words(error)}"
            ) from None
        except Exception as error:  # a template is a program of its own, and may fail in any way
            raise RowProblem(
                "the chat template fails on the conversation",
                f"`{self.name}`: {type(error).__name__}: {_in_words(error)}",
                "A message may lack a field that the template reads.",
            ) from None
        return Trace("".join(parts), runs, own)


def _in_words(error: Exception) -> str:
    """What an error says, with the names of our classes replaced by what they stand for."""
    text = str(getattr(error, "message", None) or error)
    for ours, word in ((TurnDict, "a message"), (Traced, "a text")):
        text = text.replace(f"'{ours.__module__}.{ours.__qualname__} object'", word)
        text = text.replace(f"'{ours.__qualname__}' object", word).replace(f"'{ours.__qualname__}'", word)
    return text


def _traced_message(turn: int, message: Message, sources: list[Source], null: bool) -> TurnDict:
    def tag(kind: str, trained: bool | None = None) -> int:
        sources.append(Source(turn, kind, trained))
        return len(sources) - 1

    def detailed(text: str, spans: Iterable[Any], kind: str) -> Traced:
        """A text whose characters are trained only inside the ranges that say so."""
        yes, no = tag(kind, True), tag(kind, False)
        marks = bytearray(len(text))
        for span in spans:
            a, b = max(0, span.begin), min(len(text), span.end + 1)
            if b > a:
                marks[a:b] = (b"\1" if span.train else b"\0") * (b - a)
        edges = [0] + [i for i in range(1, len(text)) if marks[i] != marks[i - 1]] + [len(text)]
        return Traced(
            text,
            tuple((a, b, yes if a < len(text) and marks[a] else no) for a, b in itertools.pairwise(edges)),
        )

    made = TurnDict(role=message.role)
    made.axolotl_turn = turn
    content = message.content
    if isinstance(content, str):
        made["content"] = (
            detailed(content, message.detail, "content")
            if message.detail is not None
            else Traced.whole(content, tag("content"))
        )
    elif content is not None:
        made["content"] = _traced_parts(content, tag("content"))
    else:
        made["content"] = None if null else Traced.whole("", tag("content"))
    for key, value in message.fields.items():
        if value is None:
            continue
        if key == "tool_calls":
            made[key] = trace(value, tag("tool_calls"))
        elif isinstance(value, str) and message.field_details and key in message.field_details:
            made[key] = detailed(value, message.field_details[key], "reasoning")
        elif key in _REASONING_KEYS:
            made[key] = trace(value, tag("reasoning"))
        else:
            made[key] = value
    return made


def _traced_parts(parts: Any, tag: int) -> Any:
    """Content given as a list of parts: only their texts are traced."""
    if not isinstance(parts, list):
        return trace(parts, tag)
    return [
        {k: Traced.whole(v, tag) if k == "text" and isinstance(v, str) else v for k, v in p.items()}
        if isinstance(p, dict)
        else p
        for p in parts
    ]


def load_template(
    name: str,
    *,
    jinja: str | None = None,
    tokenizer_template: str | None = None,
) -> ChatTemplate:
    """The template that a config means.

    `name`: a bundled name, `jinja` (the source or its file in `jinja`), `tokenizer_default`, or
    `tokenizer_default_fallback_<bundled name>`.
    Raises DataError for an unknown name, a missing file, or a tokenizer without a template.
    """
    return _load(name, jinja, tokenizer_template)


@functools.lru_cache(maxsize=64)
def _load(name: str, jinja: str | None, tokenizer_template: str | None) -> ChatTemplate:
    if name == "jinja":
        if not jinja:
            raise DataError(
                "`chat_template: jinja` needs the template itself.",
                "Give it in `chat_template_jinja`: the Jinja text, or a file.",
            )
        return ChatTemplate("jinja", read_jinja(jinja))
    if name == "tokenizer_default" or name.startswith(FALLBACK):
        if tokenizer_template:
            return ChatTemplate(name, tokenizer_template)
        if name == "tokenizer_default":
            raise DataError(
                "the tokenizer of this model carries no chat template.",
                f"Name one with `chat_template`, for instance `chatml`. Bundled: {', '.join(template_names())}.",
            )
        name = name.removeprefix(FALLBACK)
    file = FOLDER / f"{name}.jinja"
    if not name.replace("_", "").isalnum() or not file.is_file():
        near = difflib.get_close_matches(name, template_names(), n=1)
        hint = f"Did you mean `{near[0]}`? " if near else ""
        raise DataError(
            f"`{name}` is not a known chat_template.", f"{hint}Bundled: {', '.join(template_names())}."
        )
    text = file.read_text(encoding="utf-8")
    return ChatTemplate(name, text)


def _no_file(value: str, key: str) -> Problem:
    return Problem(
        f"The template file `{value}` of `chat_template_jinja` does not exist.",
        "Correct the path, or write the Jinja text inline.",
        "data",
        (key,),
    )


def check(data: DataSection) -> list[Problem]:
    """Template files that the config names and that are not there."""
    asked = {"chat_template_jinja": data.chat_template_jinja}
    for kind in ("datasets", "test_datasets"):
        for index, entry in enumerate(getattr(data, kind)):
            asked[f"{kind}[{index}].chat_template_jinja"] = entry.chat_template_jinja
    problems = []
    for key, value in asked.items():
        try:
            read_jinja(value or "\n")
        except DataError:
            problems.append(_no_file(str(value), key))
    return problems


def read_jinja(value: str) -> str:
    """A `chat_template_jinja` value: the text of the file it names, or else itself. Raises DataError for a missing file."""
    if "{" in value or "\n" in value:
        return value
    path = Path(value).expanduser()
    if not path.is_file():
        raise DataError(_no_file(value, "chat_template_jinja"))
    return path.read_text(encoding="utf-8")


def render_chat_template(
    name: str,
    messages: Sequence[dict[str, Any]],
    *,
    tools: list[Any] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """Renders a conversation with a bundled chat template, as training and inference do.

    `messages` and `tools` are in the OpenAI schema; further variables (bos_token, eos_token, enable_thinking, …) are
    handed to the template. Raises DataError for an unknown name and where the template refuses or fails.
    """
    template = load_template(name)
    try:
        return template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )
    except Exception as error:  # a template is a program of its own, and may fail in any way
        raise DataError(
            f"the chat template `{name}` does not render the conversation: {_in_words(error)}.",
            "Correct the messages: a role may be out of turn, or a field that the template reads may be missing.",
        ) from error
