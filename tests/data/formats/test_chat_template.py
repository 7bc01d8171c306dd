"""Rows of conversations: names of keys and roles, tools, reasoning, and what of a message is trained."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl.config.data import DataSection, DatasetEntry
from axolotl.data.formats import resolve_format
from axolotl.data.types import Conversation, DetailSpan, Message, RowProblem
from axolotl.errors import ConfigError


def convert(row: dict[str, Any], data: dict[str, Any] | None = None, **entry: Any) -> Conversation:
    chosen = resolve_format(
        DatasetEntry.model_validate({"type": "chat_template", **entry}),
        list(row),
        DataSection.model_validate(data or {}),
    )
    before = copy.deepcopy(row)
    value = chosen.convert(row)
    assert row == before, "the row was changed"
    assert isinstance(value, Conversation)
    return value


def one(message: dict[str, Any], data: dict[str, Any] | None = None, **entry: Any) -> Message:
    return convert({"messages": [message]}, data, **entry).messages[0]


def problem(row: dict[str, Any], **entry: Any) -> RowProblem:
    with pytest.raises(RowProblem) as caught:
        convert(row, **entry)
    return caught.value


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


ROW = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}


def test_plain() -> None:
    assert convert(ROW) == Conversation([user("Q"), assistant("A")])


def test_other_names_for_columns_keys_and_roles() -> None:
    row = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    mapping = {"role": "from", "content": "value"}
    wanted = Conversation([user("Q"), assistant("A")])
    assert convert(row, field_messages="conversations", message_property_mappings=mapping) == wanted


def test_custom_roles_replace_the_default_ones() -> None:
    row = {"messages": [{"role": r, "content": "x"} for r in ("boss", "asker", "helper", "human", "critic")]}
    roles = {"system": ["boss"], "user": ["asker"], "assistant": ["helper"]}
    assert [m.role for m in convert(row, roles=roles).messages] == [
        "system",
        "user",
        "assistant",
        "human",
        "critic",
    ]


def test_messages_as_json_text_and_as_a_table_of_lists() -> None:
    assert convert({"messages": json.dumps(ROW["messages"])}) == convert(ROW)
    assert convert({"messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}}) == convert(ROW)


def test_system_column() -> None:
    assert convert({**ROW, "system": "S"}).messages[0] == Message("system", "S")
    assert convert({**ROW, "persona": "S"}, field_system="persona").messages[0] == Message("system", "S")
    assert len(convert({**ROW, "system": None}).messages) == 2
    assert len(convert({**ROW, "system": ""}).messages) == 2
    own = {"messages": [{"role": "system", "content": "own"}, *ROW["messages"]], "system": "S"}
    assert [m.content for m in convert(own).messages] == ["own", "Q", "A"]


def test_drop_system_message() -> None:
    own = {"messages": [{"role": "system", "content": "own"}, *ROW["messages"]]}
    assert convert(own, drop_system_message=True) == convert(ROW)
    assert convert({**ROW, "system": "S"}, drop_system_message=True) == convert(ROW)
    assert problem({"messages": own["messages"][:1]}, drop_system_message=True).reason == "no messages"


def test_other_keys_are_kept_and_nulls_left_out() -> None:
    message = {
        "role": "assistant",
        "content": "A",
        "name": "Bo",
        "extra": {"a": None, "b": [{"c": None, "d": None}, None]},
        "x": None,
    }
    assert one(message).fields == {"name": "Bo", "extra": {"b": [{}, None]}}


def test_mapped_keys() -> None:
    message = {"from": "gpt", "value": "A", "thoughts": "T", "role": "ignored", "id": 7}
    mapping = {"role": "from", "content": "value", "reasoning_content": "thoughts"}
    read = one(message, message_property_mappings=mapping)
    assert read == Message("assistant", "A", {"id": 7, "reasoning_content": "T"})


def test_tool_calls() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"city": "Oslo"}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call, {"name": "g", "arguments": ""}]}
    read = one(asked)
    assert read.content is None
    assert read.fields["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}},
        {"name": "g", "arguments": {}},
    ]
    assert one({**asked, "tool_calls": json.dumps(asked["tool_calls"])}) == read
    del asked["content"]
    assert one(asked) == read
    broken = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": "{city"}}],
    }
    caught = problem({"messages": [broken]})
    assert caught.reason == "not valid JSON"
    assert "the arguments of `f` in `tool_calls` of message 1" in caught.detail


def test_tools() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert convert({**ROW, "tools": [tool]}).tools == [tool]
    assert convert({**ROW, "tools": json.dumps([tool])}).tools == [tool]
    assert convert({**ROW, "tools": [json.dumps(tool)]}).tools == [tool]
    assert convert({**ROW, "tools": json.dumps(tool)}).tools == [tool]
    assert convert({**ROW, "functions": [tool]}, field_tools="functions").tools == [tool]
    as_text = {"type": "function", "function": {"name": "f", "parameters": json.dumps(schema)}}
    assert convert({**ROW, "tools": [as_text]}).tools == [tool]
    flat = {"name": "f", "parameters": json.dumps(schema)}
    assert convert({**ROW, "tools": [flat]}).tools == [{"name": "f", "parameters": schema}]
    filled = {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {**schema, "properties": {"city": {"type": "string", "enum": None}, "other": None}},
        },
    }
    assert convert({**ROW, "tools": [filled]}).tools == [tool]
    for nothing in (None, [], "", "[]", "null"):
        assert convert({**ROW, "tools": nothing}).tools is None
    assert problem({**ROW, "tools": "[{"}).reason == "not valid JSON"
    twice = problem({**ROW, "tools": '[{"name": "a", "name": "b"}]'})
    assert twice.reason == "a key stands twice" and "`name`" in twice.detail
    assert problem({**ROW, "tools": [3]}).reason == "tool is not an object"


@pytest.mark.parametrize(
    ("content", "thinking", "answer"),
    [
        ("<think>two and two</think>\n\nFour", "two and two", "Four"),
        ("  <think>\n a\nb \n</think>Four ", "a\nb", "Four "),
        ("<think>\n\n</think>\n\nHello", "", "Hello"),
        ("<reasoning>r</reasoning> x", "r", "x"),
        (
            "<|begin_of_thought|>t<|end_of_thought|>\n\n<|begin_of_solution|>\ns\n<|end_of_solution|>",
            "t",
            "s",
        ),
        ("<think>only</think>", "only", ""),
    ],
)
def test_split_thinking(content: str, thinking: str, answer: str) -> None:
    raw = {"role": "assistant", "content": content}
    assert one(raw, split_thinking=True) == Message("assistant", answer, {"reasoning_content": thinking})
    read = one(raw, split_thinking=True, template_thinking_key="thinking")
    assert read.fields == {"thinking": thinking}
    assert one(raw) == assistant(content)


@pytest.mark.parametrize(
    "content", ["plain", "<think>never closed", "so <think>late</think> it is", "</think>x"]
)
def test_split_thinking_leaves_other_texts_alone(content: str) -> None:
    assert one({"role": "assistant", "content": content}, split_thinking=True) == assistant(content)


def test_split_thinking_is_about_assistants_without_reasoning_of_their_own() -> None:
    text = "<think>a</think>b"
    assert one({"role": "user", "content": text}, split_thinking=True) == user(text)
    both = {"role": "assistant", "content": text, "reasoning_content": "own"}
    assert one(both, split_thinking=True) == Message("assistant", text, {"reasoning_content": "own"})


def test_field_thinking() -> None:
    raw = {"role": "assistant", "content": "A", "thoughts": "T"}
    assert one(raw, field_thinking="thoughts").fields == {"reasoning_content": "T"}
    assert one(raw, field_thinking="thoughts", template_thinking_key="thinking").fields == {"thinking": "T"}
    given_as_usual = {"role": "assistant", "content": "A", "reasoning_content": "T"}
    assert one(given_as_usual, template_thinking_key="thinking").fields == {"thinking": "T"}


def test_message_training() -> None:
    for given_flag, wanted in (
        (True, True),
        (False, False),
        (None, None),
        (1, True),
        (0, False),
        (0.5, True),
    ):
        raw = {"role": "user", "content": "x", "train": given_flag}
        read = one(raw, message_field_training="train")
        assert read == Message("user", "x", {}, train=wanted)
    assert one({"role": "user", "content": "x"}, message_field_training="train").train is None
    bad = {"messages": [{"role": "user", "content": "x", "train": "no"}]}
    assert problem(bad, message_field_training="train").reason == "training flag is not a boolean"


def detail(*spans: tuple[int, int, bool]) -> list[dict[str, Any]]:
    return [{"begin_offset": a, "end_offset": b, "train": t} for a, b, t in spans]


def test_training_detail() -> None:
    raw = {"role": "assistant", "content": "abcdef", "d": detail((3, 5, True), (0, 2, False))}
    read = one(raw, message_field_training_detail="d")
    assert read.detail == [DetailSpan(0, 2, False), DetailSpan(3, 5, True)]
    assert read.train is None
    assert read.fields == {}
    assert one({**raw, "d": None}, message_field_training_detail="d") == assistant("abcdef")
    assert one({**raw, "d": json.dumps(raw["d"])}, message_field_training_detail="d") == read


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        (detail((0, 6, True)), "training detail is out of range"),
        (detail((-1, 2, True)), "training detail is out of range"),
        (detail((3, 2, True)), "training detail is out of range"),
        (detail((0, 3, True), (3, 5, False)), "training detail contradicts itself"),
        ([{"begin_offset": 0, "end_offset": 1}], "training detail is incomplete"),
        ([3], "training detail is not an object"),
        ({"begin_offset": 0}, "training detail is not a list"),
    ],
)
def test_training_detail_problems(spans: Any, reason: str) -> None:
    row = {"messages": [{"role": "assistant", "content": "abcdef", "d": spans}]}
    assert problem(row, message_field_training_detail="d").reason == reason


def test_content_parts() -> None:
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "content": ""}, {"value": "cd"}, "e"]
    assert one({"role": "assistant", "content": parts}) == assistant("abcde")
    parts = [
        {"type": "text", "text": "ab", "train": False},
        {"text": "cd", "weight": 1},
        {"text": "e", "train": None},
    ]
    read = one({"role": "assistant", "content": parts})
    assert read.content == "abcde"
    assert read.detail == [DetailSpan(0, 1, False), DetailSpan(2, 3, True), DetailSpan(4, 4, True)]
    assert read.train is None


def test_parts_without_a_word_follow_the_turn() -> None:
    parts = [{"text": "ab", "train": False}, {"text": "cd"}]
    assert one({"role": "user", "content": parts}).train is False
    assert one({"role": "gpt", "content": parts}).train is True
    assert one({"role": "user", "content": parts}, {"train_on_inputs": True}).train is True
    assert one({"role": "user", "content": parts}, roles_to_train=["human"]).train is True
    row = {"role": "gpt", "content": parts, "train": False}
    assert one(row, message_field_training="train").train is False


def test_reasoning_parts() -> None:
    raw = {
        "role": "assistant",
        "content": "A",
        "reasoning_content": [{"text": "x", "train": False}, {"text": "yz", "train": True}],
    }
    read = one(raw)
    assert read.fields == {"reasoning_content": "xyz"}
    assert read.field_details == {"reasoning_content": [DetailSpan(0, 0, False), DetailSpan(1, 2, True)]}
    assert read.detail is None


def test_split_thinking_keeps_the_marks_of_parts() -> None:
    parts = [{"text": "<think> a", "train": False}, {"text": "b</think> c"}, {"text": "d", "train": False}]
    read = one({"role": "assistant", "content": parts}, split_thinking=True)
    assert (read.content, read.fields) == ("cd", {"reasoning_content": "ab"})
    assert read.field_details == {"reasoning_content": [DetailSpan(0, 0, False), DetailSpan(1, 1, True)]}
    assert read.detail == [DetailSpan(0, 0, True), DetailSpan(1, 1, False)]


@pytest.mark.parametrize(
    ("messages", "reason", "detail_part"),
    [
        (None, "not a list of messages", "`messages` holds null"),
        ([], "no messages", "`messages` is empty"),
        ("[{", "not valid JSON", "`messages`"),
        ({"role": ["user"], "content": []}, "not a list of messages", "an object"),
        (["hi"], "message is not an object", "message 1 is text"),
        ([{"content": "x"}], "message without role", "message 1 has no `role`, it has: content"),
        ([{"role": None, "content": "x"}], "message without role", "`role` of message 1 is null"),
        ([{"role": 3, "content": "x"}], "message without role", "`role` of message 1 is a number"),
        (
            [{"role": "user", "content": "x"}, {"role": "gpt", "content": None}],
            "message without content",
            "`content` of message 2 is null",
        ),
        ([{"role": "user", "value": "x"}], "message without content", "no `content`, it has: role, value"),
        (
            [{"role": "user", "content": {"a": 1}}],
            "content is not text",
            "`content` of message 1 is an object",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "message part is not text",
            "part 1 in `content` of message 1",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "message part is not text", "has no text"),
    ],
)
def test_problems_name_the_message(messages: Any, reason: str, detail_part: str) -> None:
    caught = problem({"messages": messages})
    assert caught.reason == reason
    assert detail_part in caught.detail


def test_other_names_of_keys_are_suggested() -> None:
    caught = problem({"messages": [{"from": "human", "value": "x"}]})
    assert caught.remedy == "Set `message_property_mappings: {role: from, content: value}`."
    assert problem({"messages": [{"role": "user", "content": None}]}).remedy == ""


def test_a_name_cannot_stand_for_two_roles() -> None:
    with pytest.raises(ConfigError, match="`roles` gives `x` to both `user` and `assistant`"):
        convert(ROW, roles={"user": ["x"], "assistant": ["y", "x"]})


def test_missing_column_in_a_row() -> None:
    caught = problem({"dialog": []})
    assert caught.reason == "field missing"
    assert "`messages`, it has: dialog" in caught.detail


def test_messages_is_the_same_format() -> None:
    entry = DatasetEntry.model_validate({"type": "messages.chat"})
    assert resolve_format(entry, ["messages"], DataSection()).convert(ROW) == convert(ROW)


TEXT = st.text(max_size=20)
KEYS = st.sampled_from(["name", "id", "weight", "reasoning_content", "note"])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["user", "human", "gpt", "assistant", "system", "tool", "critic"]),
            TEXT,
            st.dictionaries(KEYS, st.none() | TEXT, max_size=3),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_nothing_of_a_conversation_is_lost(turns: list[tuple[str, str, dict[str, Any]]]) -> None:
    alias = {"human": "user", "gpt": "assistant"}
    row = {"messages": [{"role": r, "content": c, **extra} for r, c, extra in turns]}
    read = convert(row).messages
    assert [(m.role, m.content) for m in read] == [(alias.get(r, r), c) for r, c, _ in turns]
    assert [m.fields for m in read] == [
        {k: v for k, v in extra.items() if v is not None} for *_, extra in turns
    ]
    assert convert({"messages": json.dumps(row["messages"])}).messages == read


@given(st.lists(st.tuples(TEXT, st.sampled_from([None, True, False])), min_size=1, max_size=6))
def test_spans_of_parts_tile_the_text(parts: list[tuple[str, bool | None]]) -> None:
    read = one({"role": "assistant", "content": [{"type": "text", "text": t, "train": f} for t, f in parts]})
    assert read.content == "".join(t for t, _ in parts)
    if all(flag is None for _, flag in parts):
        assert read.detail is None
        return
    assert read.detail is not None
    marks = [span.train for span in read.detail for _ in range(span.begin, span.end + 1)]
    assert marks == [flag is not False for text, flag in parts for _ in text]
    assert [s.begin for s in read.detail[1:]] == [s.end + 1 for s in read.detail[:-1]]


@given(TEXT, TEXT, st.sampled_from(["<think>", "<reasoning>"]))
def test_split_thinking_takes_the_text_apart(thinking: str, answer: str, tag: str) -> None:
    closing = tag.replace("<", "</")
    if tag in thinking + answer or closing in thinking:
        return
    read = one({"role": "assistant", "content": f"{tag}{thinking}{closing}{answer}"}, split_thinking=True)
    assert read.fields == {"reasoning_content": thinking.strip()}
    assert read.content == answer.lstrip()
