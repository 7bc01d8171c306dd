"""The template engine: one rendering, with the origin of each character, for every way in which templates are written."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest

from axolotl.data.templates import (
    ChatTemplate,
    load_template,
    read_jinja,
    render_chat_template,
    template_names,
)
from axolotl.data.types import Conversation, Message, RowProblem
from axolotl.errors import DataError

LOOP = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}"
INDEXED = "{% for i in range(messages | length) %}[{{ messages[i]['role'] }}]{{ messages[i]['content'] }}</s>\n{% endfor %}"
TILDE = "{% for m in messages %}{{ '[' ~ m.role ~ ']' ~ m.content ~ '</s>\n' }}{% endfor %}"
PLUS = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</s>' + '\n' }}{% endfor %}"
BLOCK = "{% for m in messages %}{% set body %}[{{ m.role }}]{{ m.content }}{% endset %}{{ body }}</s>\n{% endfor %}"
MACRO = "{% macro say(c) %}{% if c is string %}{{ c }}{% endif %}{% endmacro %}{% for m in messages %}[{{ m.role }}]{{ say(m.content) }}</s>\n{% endfor %}"
REBOUND = "{% if messages[0].role == 'none' %}{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{% for m in turns %}[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}"
NAMESPACE = "{% set ns = namespace(last='') %}{% for m in messages %}{% set ns.last = m.content %}[{{ m.role }}]{{ ns.last }}</s>\n{% endfor %}"
JOINED = "{% for m in messages %}{{ ['[', m.role, ']', m.content, '</s>\n'] | join }}{% endfor %}"
GENERATION = "{% for m in messages %}[{{ m.role }}]{% generation %}{{ m.content }}</s>{% endgeneration %}{{ '\n' }}{% endfor %}"
STYLES = [LOOP, INDEXED, TILDE, PLUS, BLOCK, MACRO, REBOUND, NAMESPACE, JOINED, GENERATION]
TURNS = [("user", "what is a user?"), ("assistant", "user"), ("user", "a</s>b"), ("assistant", "")]


@pytest.mark.parametrize("source", STYLES)
def test_each_style_of_template_is_traced_to_the_character(source: str) -> None:
    template = ChatTemplate("t", source)
    trace = template.trace(Conversation([Message(r, c) for r, c in TURNS]), {})
    assert trace.text == template.render([{"role": r, "content": c} for r, c in TURNS])
    assert [trace.text[a:b] for a, b, _ in trace.runs] == [c for _, c in TURNS]
    assert [s.turn for *_, s in trace.runs] == [0, 1, 2, 3]
    expected, at = [], 0
    for role, content in TURNS:
        expected.append(at + len(role) + 2)
        at += len(role) + 2 + len(content) + 5
    assert [a for a, _, _ in trace.runs] == expected


def test_what_a_template_writes_is_ascribed_to_the_turn_it_stands_at() -> None:
    trace = ChatTemplate("t", "<s>" + LOOP + "end").trace(
        Conversation([Message(r, c) for r, c in TURNS[:2]]), {}
    )
    assert [(trace.text[a:b], t) for a, b, t, _ in trace.own] == [
        ("<s>", -1),
        ("[user]what is a user?</s>\n", 0),
        ("[assistant]user</s>\n", 1),
        ("end", -1),
    ]


def test_words_written_because_of_tool_calls_are_known() -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}<call>{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}</call>{% endif %}</s>{% endfor %}"
    call = {"type": "function", "function": {"name": "go", "arguments": {}}}
    trace = ChatTemplate("t", source).trace(
        Conversation([Message("assistant", "x", {"tool_calls": [call]})]), {}
    )
    assert [(trace.text[a:b], tools) for a, b, _, tools in trace.own] == [
        ("[assistant]x", False),
        ("<call>go</call>", True),
        ("</s>", False),
    ]


def test_a_refusal_and_a_failure_of_a_template_are_problems_of_the_row() -> None:
    for source, words in (
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages[7]['content'] }}", "has no element 7"),
        ("{{ messages[0].content + 1 }}", "fails on"),
    ):
        with pytest.raises(RowProblem) as caught:
            ChatTemplate("t", source).trace(Conversation([Message("user", "q")]), {})
        assert words.lower() in str(caught.value).lower()


def test_a_template_cannot_reach_python() -> None:
    with pytest.raises((RowProblem, jinja2.TemplateError)):
        ChatTemplate("t", "{{ messages.__class__.__mro__ }}").render([])


def test_wrong_names_and_files_are_told() -> None:
    with pytest.raises(DataError, match="Did you mean `chatml`"):
        load_template("chatlm")
    with pytest.raises(DataError, match="carries no chat template"):
        load_template("tokenizer_default")
    with pytest.raises(DataError, match="does not exist"):
        read_jinja("no/such/file.jinja")
    with pytest.raises(DataError, match="not valid Jinja"):
        ChatTemplate("t", "{% for %}")


def test_fallback_and_files(tmp_path: Path) -> None:
    assert load_template("tokenizer_default_fallback_chatml").text == load_template("chatml").text
    assert load_template("tokenizer_default_fallback_chatml", tokenizer_template="own").text == "own"
    file = tmp_path / "own.jinja"
    file.write_text("from a file")
    assert load_template("jinja", jinja=str(file)).text == "from a file"
    assert load_template("jinja", jinja="{{ messages }}").text == "{{ messages }}"


def test_the_public_function_renders_bundled_templates() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert render_chat_template("chatml", messages, add_generation_prompt=True).endswith(
        "<|im_start|>assistant\n"
    )
    assert "chatml" in template_names()
