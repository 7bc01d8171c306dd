"""A prompt is token for token what stood before the answer in training."""

from __future__ import annotations

from typing import Any

import pytest

from axolotl.config.data import DataSection
from axolotl.config.model import ModelSection
from axolotl.data.formats import resolve_format
from axolotl.data.render import build_renderer
from axolotl.errors import DataError
from axolotl.inference.prompting import Prompter
from axolotl.model.tokenizer import load_tokenizer
from scripted import CHATML, LLAMA

CHAT = {
    "messages": [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": "What is <|eot_id|>?"},
        {"role": "assistant", "content": "A stop token."},
        {"role": "user", "content": "And 2+2?"},
        {"role": "assistant", "content": "4."},
    ]
}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}]
}
ALPACA = {"instruction": "Add the numbers.", "input": "1, 2 and 3", "output": "6"}
MAPPING = {
    "field_instruction": "q",
    "field_output": "a",
    "format": "[Q] {instruction} [A] ",
    "no_input_format": "[Q] {instruction} [A] ",
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama3": (LLAMA, {"type": "chat_template"}, {}, CHAT),
    "chatml": (CHATML, {"type": "chat_template"}, {}, CHAT),
    "another template": (CHATML, {"type": "chat_template", "chat_template": "llama3"}, {}, CHAT),
    "global template": (LLAMA, {"type": "chat_template"}, {"chat_template": "chatml"}, CHAT),
    "sharegpt": (
        CHATML,
        {
            "type": "chat_template",
            "field_messages": "conversations",
            "message_property_mappings": {"role": "from", "content": "value"},
        },
        {},
        SHAREGPT,
    ),
    "alpaca": (LLAMA, {"type": "alpaca"}, {}, ALPACA),
    "alpaca without input": (LLAMA, {"type": "alpaca"}, {}, ALPACA | {"input": ""}),
    "alpaca chat": (LLAMA, {"type": "alpaca:chat"}, {}, ALPACA),
    "alpaca chatml": (CHATML, {"type": "alpaca:chatml"}, {}, ALPACA),
    "mapping": (LLAMA, {"type": MAPPING}, {}, {"q": "Who?", "a": "Me."}),
    "gpteacher": (
        LLAMA,
        {"type": "gpteacher"},
        {},
        {"instruction": "Say hi.", "input": "", "response": "hi"},
    ),
    "trained on inputs": (LLAMA, {"type": "alpaca"}, {"train_on_inputs": True}, ALPACA),
}


def prompter(base: str, entry: dict[str, Any], data: dict[str, Any]) -> Prompter:
    tokenizer = load_tokenizer(ModelSection.model_validate({"base_model": base}))
    return Prompter(tokenizer, DataSection.model_validate({"datasets": [{"path": "x", **entry}], **data}))


@pytest.mark.parametrize("case", CASES)
def test_a_row_asks_what_training_saw_before_its_answer(case: str) -> None:
    base, entry, data, row = CASES[case]
    ours = prompter(base, entry, data)
    plain = DataSection.model_validate(
        {"datasets": [{"path": "x", **entry}], **data, "train_on_inputs": False}
    )
    format_ = resolve_format(plain.datasets[0], list(row), plain)
    rendered = build_renderer(ours.tokenizer, plain, plain.datasets[0]).render_batch([format_.convert(row)])[
        0
    ][0]
    last = max(i for i, label in enumerate(rendered.labels) if label != -100)
    while last and rendered.labels[last - 1] != -100:
        last -= 1
    assert ours.row(row) == rendered.input_ids[:last]


def test_a_question_is_the_row_without_its_other_parts() -> None:
    ours = prompter(LLAMA, {"type": "alpaca"}, {})
    assert ours.kind == "instruction"
    assert ours.ask("Say hi.") == ours.row({"instruction": "Say hi.", "input": "", "output": "x"})
    assert ours.ask("Say hi.") == ours.row({"prompt": "Say hi."})
    text = ours.tokenizer.decode(ours.ask("Say hi."))
    assert text.startswith("<|begin_of_text|>Below is")
    assert text.endswith("### Response:\n")
    assert ours.stop_tokens() == ["<|end_of_text|>"]


def test_a_conversation_opens_the_next_answer() -> None:
    ours = prompter(LLAMA, {"type": "chat_template"}, {})
    ids = ours.chat([{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}])
    assert ours.tokenizer.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert ids == ours.ask("hi", "S")
    assert ours.stop_tokens() == ["<|eot_id|>"]


def test_words_of_a_user_that_look_like_control_stay_words() -> None:
    ours = prompter(LLAMA, {"type": "chat_template"}, {})
    assert ours.ask("<|eot_id|>").count(4084) == 1


def test_plain_text_is_continued_as_it_is() -> None:
    for entry in ({"type": "completion"}, {}):
        tokenizer = load_tokenizer(ModelSection.model_validate({"base_model": LLAMA}))
        tokenizer.chat_template = None
        datasets = [{"path": "x", **entry}] if entry else []
        ours = Prompter(tokenizer, DataSection.model_validate({"datasets": datasets}))
        assert ours.kind == "text"
        assert ours.ask("Once upon") == tokenizer("Once upon")["input_ids"]
        assert ours.row({"text": "Once upon"}) == ours.ask("Once upon")


def test_without_datasets_the_tokenizers_template_counts() -> None:
    tokenizer = load_tokenizer(ModelSection.model_validate({"base_model": CHATML}))
    assert Prompter(tokenizer, DataSection()).kind == "chat"


def test_a_chat_dataset_decides_for_a_mixture() -> None:
    tokenizer = load_tokenizer(ModelSection.model_validate({"base_model": CHATML}))
    data = DataSection.model_validate(
        {"datasets": [{"path": "a", "type": "alpaca"}, {"path": "b", "type": "chat_template"}]}
    )
    assert Prompter(tokenizer, data).kind == "chat"


def test_messages_given_to_an_instruction_model_ask_the_last_question() -> None:
    ours = prompter(LLAMA, {"type": "alpaca"}, {})
    assert ours.chat(CHAT["messages"][:4]) == ours.ask("And 2+2?")


def test_rows_without_a_question_are_told() -> None:
    with pytest.raises(DataError, match="A row with `colour` holds no question"):
        prompter(LLAMA, {"type": "alpaca"}, {}).row({"colour": "blue"})
    with pytest.raises(DataError):
        prompter(LLAMA, {"type": "chat_template"}, {}).row({"messages": []})
