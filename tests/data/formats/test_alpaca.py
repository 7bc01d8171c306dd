"""The instruction family: the text of every type and style, and rows that cannot be used."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl.config.data import DataSection, DatasetEntry
from axolotl.data.formats import resolve_format
from axolotl.data.formats.alpaca import STYLES
from axolotl.data.types import Piece, Pieces, RowProblem
from axolotl.errors import ConfigError


def convert(kind: Any, row: dict[str, Any], train_on_inputs: bool = False, **entry: Any) -> Pieces:
    data = DataSection.model_validate({"train_on_inputs": train_on_inputs})
    value = resolve_format(DatasetEntry.model_validate({"type": kind, **entry}), list(row), data).convert(row)
    assert isinstance(value, Pieces)
    return value


def prompt_and_answer(kind: str, row: dict[str, Any], **entry: Any) -> tuple[str, str]:
    prompt, answer = convert(kind, row, **entry).pieces
    assert (prompt.train, prompt.bos, prompt.eos) == (False, True, 0)
    assert (answer.train, answer.bos, answer.eos) == (True, False, 1)
    return prompt.text, answer.text


WITH = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
WITHOUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
CONCISE = (
    "Below is an instruction from a USER that describes a task. "
    "The ASSISTANT writes a response that appropriately and concisely completes the request."
)
ASK = {"instruction": "Do.", "input": "it", "output": "Done."}
PLAIN = {"instruction": "Do.", "output": "Done."}


@pytest.mark.parametrize(
    ("kind", "row", "prompt"),
    [
        ("alpaca", ASK, f"{WITH}\n\n### Instruction:\nDo.\n\n### Input:\nit\n\n### Response:\n"),
        ("alpaca", PLAIN, f"{WITHOUT}\n\n### Instruction:\nDo.\n\n### Response:\n"),
        ("alpaca:instruct", PLAIN, f"{WITHOUT}\n\n### Instruction:\nDo.\n\n### Response:\n"),
        ("alpaca:chat", ASK, f"SYSTEM: {WITH}\nUSER: Do.\nit\nASSISTANT:"),
        ("alpaca:chat", PLAIN, f"SYSTEM: {WITHOUT}\nUSER: Do.\nASSISTANT:"),
        (
            "alpaca:chatml",
            ASK,
            f"<|im_start|>system\n{WITH}<|im_end|>\n<|im_start|>user\nDo.\nit<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "alpaca:chatml",
            PLAIN,
            f"<|im_start|>system\n{WITHOUT}<|im_end|>\n<|im_start|>user\nDo.<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("alpaca:phi", ASK, f"<|system|>\n{WITH}<|end|>\n<|user|>\nDo.<|end|>it<|assistant|>"),
        ("alpaca:phi", PLAIN, f"<|system|>\n{WITHOUT}<|end|>\n<|user|>\nDo.<|end|>\n<|assistant|>\n"),
        ("alpaca_instruct.load_no_prompt", PLAIN, "### Instruction:\nDo.\n\n### Response:\n"),
        ("alpaca_chat", PLAIN, f"SYSTEM: {WITHOUT}\nUSER: Do.\nASSISTANT:"),
        ("alpaca_chat.load", ASK, f"SYSTEM: {WITH}\nUSER: Do.\nit\nASSISTANT:"),
        ("alpaca_chat.load_concise", PLAIN, f"SYSTEM: {CONCISE}\n\n\nUSER: Do.\nASSISTANT:"),
        ("alpaca_chat.load_no_prompt", ASK, "USER: Do.\nit\nASSISTANT:"),
        ("alpaca_w_system", {**ASK, "system": "Sys."}, "SYSTEM: Sys.\nUSER: Do.\nit\nASSISTANT:"),
        ("alpaca_w_system", {**PLAIN, "system": ""}, "USER: Do.\nASSISTANT:"),
        ("alpaca_w_system", {**PLAIN, "system": None}, "USER: Do.\nASSISTANT:"),
        (
            "alpaca_w_system.load_instruct",
            {**PLAIN, "system": "Sys."},
            "Sys.\n\n### Instruction:\nDo.\n\n### Response:\n",
        ),
    ],
)
def test_prompts(kind: str, row: dict[str, Any], prompt: str) -> None:
    assert prompt_and_answer(kind, row) == (prompt, "Done.")


ORCA = {"system_prompt": "Sys.", "question": "Q?", "response": "A."}


@pytest.mark.parametrize(
    ("kind", "row", "prompt", "answer"),
    [
        (
            "gpteacher",
            {"instruction": "Do.", "input": "", "response": "A."},
            f"{WITHOUT}\n\n### Instruction:\nDo.\n\n### Response:\n",
            "A.",
        ),
        (
            "oasst",
            {"INSTRUCTION": "Do.", "RESPONSE": "A."},
            f"{WITHOUT}\n\n### Instruction:\nDo.\n\n### Response:\n",
            "A.",
        ),
        (
            "oasst:chat",
            {"INSTRUCTION": "Do.", "RESPONSE": "A."},
            f"SYSTEM: {WITHOUT}\nUSER: Do.\nASSISTANT:",
            "A.",
        ),
        (
            "jeopardy",
            {"question": "Q", "category": "C", "answer": "a comet"},
            f"{WITH}\n\n### Instruction:\nQ\n\n### Input:\nC\n\n### Response:\n",
            "what is a comet",
        ),
        (
            "summarizetldr",
            {"article": "Long.", "summary": "Short."},
            "USER: Summarize the following article as a TL;DR.\nLong.\nASSISTANT:",
            "Short.",
        ),
        (
            "explainchoice",
            {"question": "Q?", "choices": ["a", "b"], "explanation": "Because."},
            "Choose the answer that best answers the question. Explain your reasoning.\n\n\n"
            '### Instruction:\nQ?\n\n### Input:\n- "a"\n- "b"\n\n### Response:\n',
            "Because.",
        ),
        (
            "concisechoice",
            {"question": "Q?", "choices": ["a", "b"], "solution": "a", "explanation": "Because."},
            "Choose the answer that best answers the question. Be concise in your response.\n\n"
            'USER: Q?\n- "a"\n- "b"\nASSISTANT:',
            "a",
        ),
        (
            "alpaca_chat.load_qa",
            {"question": "Q?", "answer": "A."},
            f"SYSTEM: {CONCISE}\n\n\nUSER: Q?\nASSISTANT:",
            "A.",
        ),
        (
            "alpaca_chat.load_camel_ai",
            {"message_1": "Q?", "message_2": "A."},
            f"SYSTEM: {CONCISE}\n\n\nUSER: Q?\nASSISTANT:",
            "A.",
        ),
        ("alpaca_w_system.load_open_orca", ORCA, "### System:\nSys.\n### Human:\nQ?\n### Assistant:\n", "A."),
        (
            "alpaca_w_system.load_open_orca_chatml",
            ORCA,
            "<|im_start|>system\nSys.<|im_end|>\n<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n",
            "A.",
        ),
        ("orcamini", ORCA, "### System:\nSys.\n\n### User:\nQ?\n\n### Response:\n", "A."),
        (
            "orcamini",
            {**ORCA, "system_prompt": ""},
            "### System:\n\n\n### User:\nQ?\n\n### Response:\n",
            "A.",
        ),
        (
            "context_qa",
            {"article": "Art.", "question": "Q?", "answer": "A."},
            "SYSTEM: Use the following contextual information to concisely answer the question.\n\n"
            "USER: Art.\n===\nQ?\nASSISTANT:",
            "A.",
        ),
        (
            "context_qa.load_404",
            {"article": "Art.", "unanswerable_question": "Q?"},
            "SYSTEM: Use the following contextual information to concisely answer the question.\n\n"
            "USER: Art.\n===\nQ?\nASSISTANT:",
            "The context provided does not contain any information about your inquiry. Therefore, I'm unable to answer "
            "your question based on the given context.",
        ),
        (
            "context_qa.load_v2",
            {"context": "Ctx.", "question": "Q?", "answer": "A."},
            "Context: Ctx.\nQuestion: Q?\n",
            "Answer: A.",
        ),
        (
            "creative_acr.load_answer",
            {"instruction": "Q?", "revision": "A."},
            "Answer the following question in a comprehensive, in-depth, and creative way. Additionally your response "
            "should be relevant, accurate, and free of any ambiguity.\nUSER: Q?\nASSISTANT:",
            "A.",
        ),
    ],
)
def test_other_columns(kind: str, row: dict[str, Any], prompt: str, answer: str) -> None:
    assert prompt_and_answer(kind, row) == (prompt, answer)


def test_alpaca_chat_takes_its_style_from_conversation() -> None:
    prompt, _ = prompt_and_answer("alpaca_chat", PLAIN, conversation="chatml")
    assert prompt.startswith("<|im_start|>system\n")
    with pytest.raises(ConfigError, match="`vicuna` is not a known prompt style"):
        convert("alpaca_chat", PLAIN, conversation="vicuna")


def test_braces_in_the_data_are_text() -> None:
    prompt, answer = prompt_and_answer(
        "alpaca", {"instruction": "{input} {0} {", "input": "}{x}", "output": "{y}"}
    )
    assert "### Instruction:\n{input} {0} {\n\n### Input:\n}{x}\n\n" in prompt
    assert answer == "{y}"


def test_train_on_inputs_trains_the_prompt() -> None:
    assert [p.train for p in convert("alpaca", ASK, train_on_inputs=True).pieces] == [True, True]


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"instruction": "x"}, "field missing", "`output`"),
        ({"instruction": None, "output": "x"}, "field is null", "`instruction` is null"),
        ({"instruction": "x", "output": ["y"]}, "field is not text", "`output` holds a list"),
        ({"instruction": "x", "input": {}, "output": "y"}, "field is not text", "`input` holds an object"),
        ({"instruction": "x", "output": True}, "field is not text", "`output` holds a boolean"),
        (
            {"instruction": "x", "input": float("nan"), "output": "y"},
            "field is not a number",
            "`input` holds `nan`",
        ),
    ],
)
def test_unusable_rows(row: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(RowProblem) as caught:
        convert("alpaca", row)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_numbers_are_text_and_null_input_is_no_input() -> None:
    prompt, answer = prompt_and_answer("alpaca", {"instruction": "6*7", "input": None, "output": 42})
    assert "### Input" not in prompt
    assert answer == "42"


def test_choices_have_to_be_a_list() -> None:
    with pytest.raises(RowProblem, match="`choices` holds text"):
        convert("explainchoice", {"question": "Q", "choices": "a b", "solution": "a"})


@given(st.text(), st.text(), st.text(), st.sampled_from(sorted(STYLES)))
def test_the_text_of_a_row_stands_as_it_is(instruction: str, extra: str, answer: str, style: str) -> None:
    row = {"instruction": instruction, "input": extra, "output": answer}
    prompt, given_answer = convert(f"alpaca:{style}", row).pieces
    assert given_answer == Piece(answer, True, eos=1)
    turn = STYLES[style].turn if extra else STYLES[style].turn_without_input
    before, _, rest = turn.partition("{instruction}")
    between, _, after = rest.partition("{input}")
    assert prompt.text.endswith(before + instruction + between + (extra + after if extra else ""))
