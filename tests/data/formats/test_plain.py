"""Completion, input_output, mapping, tokenised rows, and the older conversation layouts."""

from __future__ import annotations

from typing import Any

import pytest

from axolotl.config.data import DataSection, DatasetEntry
from axolotl.data.formats import resolve_format
from axolotl.data.types import Completion, FormatValue, Marked, Piece, Pieces, RowProblem, Tokenized
from axolotl.errors import ConfigError


def convert(kind: Any, row: dict[str, Any], data: dict[str, Any] | None = None, **entry: Any) -> FormatValue:
    section = DataSection.model_validate(data or {})
    chosen = resolve_format(DatasetEntry.model_validate({"type": kind, **entry}), list(row), section)
    return chosen.convert(row)


def problem(kind: Any, row: dict[str, Any], **entry: Any) -> RowProblem:
    with pytest.raises(RowProblem) as caught:
        convert(kind, row, **entry)
    return caught.value


def test_completion() -> None:
    assert convert("completion", {"text": "a\n"}) == Completion("a\n")
    assert convert("completion", {"text": "no", "body": "yes"}, field="body") == Completion("yes")
    assert problem("completion", {"text": None}).reason == "field is null"


def test_input_output_adds_nothing() -> None:
    row = {"segments": [{"label": False, "text": "<s>a"}, {"label": True, "text": "b</s>"}]}
    assert convert("input_output", row) == Pieces([Piece("<s>a", False), Piece("b</s>", True)])
    assert convert("input_output", row, {"train_on_inputs": True}) == Pieces(
        [Piece("<s>a", True), Piece("b</s>", True)]
    )


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        ([], "no segments"),
        (None, "no segments"),
        (["a"], "segment is not an object"),
        ([{"label": True}], "segment without text"),
        ([{"text": "a"}], "segment without label"),
        ([{"text": "a", "label": "yes"}], "segment without label"),
        ("[{", "not valid JSON"),
    ],
)
def test_input_output_problems(segments: Any, reason: str) -> None:
    assert problem("input_output", {"segments": segments}).reason == reason


def test_mapping_defaults() -> None:
    row = {"instruction": "I", "input": "N", "output": "O", "system": "S"}
    assert convert({"field_output": "output"}, row) == Pieces(
        [Piece("SI N ", False, bos=True), Piece("O", True, eos=1)]
    )
    assert convert({"field_output": "output"}, {"instruction": "I", "output": "O"}) == Pieces(
        [Piece("I ", False, bos=True), Piece("O", True, eos=1)]
    )


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"q": "Q", "a": "A", "s": "own"}, "[own]Q"),
        ({"q": "Q", "a": "A", "s": ""}, "Q"),
        ({"q": "Q", "a": "A", "s": None}, "[default]Q"),
        ({"q": "Q", "a": "A"}, "[default]Q"),
    ],
)
def test_mapping_system(row: dict[str, Any], prompt: str) -> None:
    kind = {
        "field_instruction": "q",
        "field_output": "a",
        "field_system": "s",
        "system_prompt": "default",
        "system_format": "[{system}]",
        "no_input_format": "{instruction}",
    }
    value = convert(kind, row)
    assert isinstance(value, Pieces)
    assert value.pieces[0].text == prompt


def test_mapping_without_an_answer_is_an_empty_answer() -> None:
    value = convert({"field_instruction": "q"}, {"q": "Q"})
    assert isinstance(value, Pieces)
    assert value.pieces[1] == Piece("", True, eos=1)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"format": "{instruction} {inptu}"}, "placeholder `{inptu}`"),
        ({"system_format": "{instruction}"}, "placeholder `{instruction}`"),
        ({"no_input_format": '{"json": {instruction}}'}, "placeholder"),
        ({"format": "{instruction"}, "cannot be read"),
        ({"format": "{}"}, "placeholder `{}`"),
    ],
)
def test_mapping_layout_mistakes(mapping: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("{", r"\{").replace("}", r"\}")):
        convert(mapping, {"instruction": "a", "output": "b"})


def test_mapping_doubled_braces_are_braces() -> None:
    value = convert({"no_input_format": '{{"q": {instruction}}}'}, {"instruction": "{1}", "output": "b"})
    assert isinstance(value, Pieces)
    assert value.pieces[0].text == '{"q": {1}}'


def test_tokenised_rows_pass_whatever_the_type() -> None:
    row = {"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [-100, 2]}
    for kind in (None, "alpaca", "no such type", {"field_output": "x"}):
        assert convert(kind, row) == Tokenized([1, 2], [-100, 2])


def test_padding_of_tokenised_rows_is_left_out() -> None:
    row = {"input_ids": [1, 2, 0, 0], "attention_mask": [1, 1, 0, 0], "labels": [-100, 2, -100, -100]}
    assert convert(None, row) == Tokenized([1, 2], [-100, 2])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": [1], "labels": [1, 2]}, "lengths differ"),
        ({"input_ids": [1], "labels": [1], "attention_mask": [1, 1]}, "lengths differ"),
        ({"input_ids": "1", "labels": [1]}, "not a list of token ids"),
        ({"input_ids": [1.0], "labels": [1]}, "not a list of token ids"),
        ({"input_ids": [True], "labels": [1]}, "not a list of token ids"),
        ({"input_ids": [-1], "labels": [1]}, "not a token id"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}, "padding is trained"),
    ],
)
def test_tokenised_problems(row: dict[str, Any], reason: str) -> None:
    assert problem(None, row).reason == reason


def test_metharme_ends_in_three_eos() -> None:
    assert convert("metharme", {"prompt": "P", "generation": "G"}) == Pieces(
        [Piece("P", False, bos=True), Piece("G", True, eos=3)]
    )


def test_pygmalion() -> None:
    turns = [
        ("system", "A bard.\n<START>"),
        ("human", " Hi "),
        ("bot", "Hail!"),
        ("human", "Bye"),
        ("bot", "Farewell."),
    ]
    row = {"conversations": [{"role": r, "value": v} for r, v in turns]}
    assert convert("pygmalion", row) == Pieces(
        [
            Piece("<|system|>Persona: A bard.", False, bos=True),
            Piece("<|user|> Hi", False),
            Piece("<|model|>", False),
            Piece(" Hail!", True, eos=1),
            Piece("<|user|> Bye", False),
            Piece("<|model|>", False),
            Piece(" Farewell.", True, eos=1),
        ]
    )
    assert problem("pygmalion", {"conversations": [{"role": "gpt", "value": "x"}]}).reason == "unknown role"


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": r, "value": v} for r, v in turns]}


def test_llama2_chat_trains_the_answers() -> None:
    row = chat(
        ("system", "Be kind."), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"), ("human", "e")
    )
    value = convert("llama2_chat", row)
    assert isinstance(value, Marked)
    assert value.text == ("[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST] d </s>")
    assert [value.text[a:b] for a, b in value.spans] == ["b </s>", "d </s>"]


def test_llama2_chat_needs_a_system_text() -> None:
    row = chat(("human", "a"), ("gpt", "b"))
    value = convert("llama2_chat", row, {"default_system_message": "Be brief."})
    assert isinstance(value, Marked)
    assert value.text.startswith("[INST] <<SYS>>\nBe brief.\n")
    assert problem("llama2_chat", row).reason == "no system message"
    assert (
        problem("llama2_chat", chat(("system", "s"), ("gpt", "b"), ("human", "a"))).reason
        == "turns do not alternate"
    )
