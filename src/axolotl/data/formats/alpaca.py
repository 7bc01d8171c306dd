"""The instruction family: a prompt laid out in one of four styles, and an answer that is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from axolotl.data.formats.columns import kind, optional_text, text
from axolotl.data.formats.registry import Convert, Row, formats
from axolotl.data.types import Piece, Pieces, RowProblem
from axolotl.errors import ConfigError

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry

Read = Callable[[Row], tuple[str, str, str, str]]
"""A row's (system, instruction, input, answer)."""


class Style(NamedTuple):
    """How the parts of a prompt are put together."""

    system: str
    turn: str
    turn_without_input: str


STYLES = {
    "instruct": Style(
        "{system}\n\n",
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "chat": Style(
        "SYSTEM: {system}\n", "USER: {instruction}\n{input}\nASSISTANT:", "USER: {instruction}\nASSISTANT:"
    ),
    "chatml": Style(
        "<|im_start|>system\n{system}<|im_end|>\n",
        "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "phi": Style(
        "<|system|>\n{system}<|end|>\n",
        "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
        "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
    ),
}


class System(NamedTuple):
    """The system text of rows with an input, and of rows without."""

    with_input: str
    without_input: str


NO_SYSTEM = System("", "")
ALPACA = System(
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
)
CONCISE = System(
    "Below is an instruction from a USER that describes a task, paired with an input that provides further context. "
    "The ASSISTANT writes a response that concisely and appropriately completes the request.\n\n",
    "Below is an instruction from a USER that describes a task. "
    "The ASSISTANT writes a response that appropriately and concisely completes the request.\n\n",
)


def style_named(name: str | None, default: str = "instruct") -> Style:
    """One of the four styles. Raises ConfigError for another name."""
    name = name or default
    if name not in STYLES:
        raise ConfigError(f"`{name}` is not a known prompt style.", f"Known: {', '.join(STYLES)}.")
    return STYLES[name]


def columns(instruction: str, answer: str, extra: str | None = None, system: str | None = None) -> Read:
    """Reads the columns of these names; those of `extra` input and `system` text may be missing."""

    def read(row: Row) -> tuple[str, str, str, str]:
        return (
            optional_text(row, system) if system else "",
            text(row, instruction),
            optional_text(row, extra) if extra else "",
            text(row, answer),
        )

    return read


def instruction_format(data: DataSection, read: Read, style: Style, system: System = NO_SYSTEM) -> Convert:
    """A converter for rows that `read` understands. A row's own system text takes the place of the fixed one."""
    on_inputs = bool(data.train_on_inputs)
    head_with, head_without = (style.system.format(system=s) if s else "" for s in system)

    def convert(row: Row) -> Pieces:
        own_system, instruction, extra, answer = read(row)
        if extra:
            head, turn = head_with, style.turn
        else:
            head, turn = head_without, style.turn_without_input
        if own_system:
            head = style.system.format(system=own_system)
        prompt = head + turn.format(instruction=instruction, input=extra)
        return Pieces([Piece(prompt, on_inputs, bos=True), Piece(answer, True, eos=1)])

    return convert


@formats.register("alpaca", styles=True, requires=["instruction", "output"], optional=["input"])
def alpaca(entry: DatasetEntry, data: DataSection, style: str | None = None) -> Convert:
    return instruction_format(data, columns("instruction", "output", "input"), style_named(style), ALPACA)


@formats.register("gpteacher", styles=True, requires=["instruction", "response"], optional=["input"])
def gpteacher(entry: DatasetEntry, data: DataSection, style: str | None = None) -> Convert:
    return instruction_format(data, columns("instruction", "response", "input"), style_named(style), ALPACA)


@formats.register("oasst", styles=True, requires=["INSTRUCTION", "RESPONSE"])
def oasst(entry: DatasetEntry, data: DataSection, style: str | None = None) -> Convert:
    return instruction_format(data, columns("INSTRUCTION", "RESPONSE"), style_named(style), ALPACA)


@formats.register("jeopardy", styles=True, requires=["question", "category", "answer"])
def jeopardy(entry: DatasetEntry, data: DataSection, style: str | None = None) -> Convert:
    def read(row: Row) -> tuple[str, str, str, str]:
        return "", text(row, "question"), text(row, "category"), "what is " + text(row, "answer")

    return instruction_format(data, read, style_named(style), ALPACA)


@formats.register(
    "alpaca_instruct", "alpaca_instruct.load", requires=["instruction", "output"], optional=["input"]
)
def alpaca_instruct(entry: DatasetEntry, data: DataSection) -> Convert:
    return instruction_format(data, columns("instruction", "output", "input"), STYLES["instruct"], ALPACA)


@formats.register("alpaca_instruct.load_no_prompt", requires=["instruction", "output"], optional=["input"])
def alpaca_instruct_no_prompt(entry: DatasetEntry, data: DataSection) -> Convert:
    return instruction_format(data, columns("instruction", "output", "input"), STYLES["instruct"])


@formats.register("alpaca_chat", "alpaca_chat.load", requires=["instruction", "output"], optional=["input"])
def alpaca_chat(entry: DatasetEntry, data: DataSection) -> Convert:
    style = style_named(entry.conversation, "chat")
    return instruction_format(data, columns("instruction", "output", "input"), style, ALPACA)


@formats.register("alpaca_chat.load_concise", requires=["instruction", "output"], optional=["input"])
def alpaca_chat_concise(entry: DatasetEntry, data: DataSection) -> Convert:
    return instruction_format(data, columns("instruction", "output", "input"), STYLES["chat"], CONCISE)


@formats.register("alpaca_chat.load_qa", requires=["question", "answer"])
def alpaca_chat_qa(entry: DatasetEntry, data: DataSection) -> Convert:
    return instruction_format(data, columns("question", "answer"), STYLES["chat"], CONCISE)


@formats.register("alpaca_chat.load_camel_ai", requires=["message_1", "message_2"])
def alpaca_chat_camel_ai(entry: DatasetEntry, data: DataSection) -> Convert:
    return instruction_format(data, columns("message_1", "message_2"), STYLES["chat"], CONCISE)


@formats.register("alpaca_chat.load_no_prompt", requires=["instruction", "output"], optional=["input"])
def alpaca_chat_no_prompt(entry: DatasetEntry, data: DataSection) -> Convert:
    return instruction_format(data, columns("instruction", "output", "input"), STYLES["chat"])


@formats.register(
    "alpaca_w_system",
    "alpaca_w_system.load",
    "alpaca_w_system.load_chat",
    requires=["instruction", "output", "system"],
    optional=["input"],
)
def alpaca_with_system(entry: DatasetEntry, data: DataSection) -> Convert:
    return instruction_format(data, columns("instruction", "output", "input", "system"), STYLES["chat"])


@formats.register(
    "alpaca_w_system.load_instruct", requires=["instruction", "output", "system"], optional=["input"]
)
def alpaca_with_system_instruct(entry: DatasetEntry, data: DataSection) -> Convert:
    return instruction_format(data, columns("instruction", "output", "input", "system"), STYLES["instruct"])


@formats.register("alpaca_w_system.load_open_orca", requires=["question", "response", "system_prompt"])
def open_orca(entry: DatasetEntry, data: DataSection) -> Convert:
    style = Style(
        "### System:\n{system}\n",
        "### Human:\n{instruction}\n### Additional Context:\n{input}\n### Assistant:\n",
        "### Human:\n{instruction}\n### Assistant:\n",
    )
    return instruction_format(data, columns("question", "response", system="system_prompt"), style)


@formats.register("alpaca_w_system.load_open_orca_chatml", requires=["question", "response", "system_prompt"])
def open_orca_chatml(entry: DatasetEntry, data: DataSection) -> Convert:
    return instruction_format(data, columns("question", "response", system="system_prompt"), STYLES["chatml"])


@formats.register("orcamini", "orcamini.load", requires=["question", "response", "system_prompt"])
def orcamini(entry: DatasetEntry, data: DataSection) -> Convert:
    def read(row: Row) -> tuple[str, str, str, str]:
        # The header stands there even where the system text is empty, so it is part of the turn.
        return "", text(row, "question"), optional_text(row, "system_prompt"), text(row, "response")

    turn = "### System:\n{input}\n\n### User:\n{instruction}\n\n### Response:\n"
    return instruction_format(data, read, Style("", turn, turn))


@formats.register("summarizetldr", styles=True, requires=["article", "summary"])
def summarize_tldr(entry: DatasetEntry, data: DataSection, style: str | None = None) -> Convert:
    style_named(style)
    turn = "USER: Summarize the following article as a TL;DR.\n{instruction}\nASSISTANT:"
    return instruction_format(data, columns("article", "summary"), Style("", turn, turn))


def _choices(row: Row) -> tuple[str, str, str, str]:
    choices = row.get("choices")
    if not isinstance(choices, list) or not choices:
        raise RowProblem("no choices", f"`choices` holds {kind(choices)}, a list is expected")
    lines = "\n".join(f'- "{choice}"' for choice in choices)
    answer = "solution" if row.get("solution") is not None else "explanation"
    return "", text(row, "question"), lines, text(row, answer)


@formats.register("explainchoice", styles=True, requires=["question", "choices", "solution|explanation"])
def explain_choice(entry: DatasetEntry, data: DataSection, style: str | None = None) -> Convert:
    system = "Choose the answer that best answers the question. Explain your reasoning.\n"
    return instruction_format(data, _choices, style_named(style), System(system, system))


@formats.register("concisechoice", styles=True, requires=["question", "choices", "solution|explanation"])
def concise_choice(entry: DatasetEntry, data: DataSection, style: str | None = None) -> Convert:
    style_named(style)
    system = "Choose the answer that best answers the question. Be concise in your response.\n\n"
    layout = Style("{system}", STYLES["chat"].turn, STYLES["chat"].turn_without_input)
    return instruction_format(data, _choices, layout, System(system, system))


CONTEXT = System(*["Use the following contextual information to concisely answer the question.\n"] * 2)
UNANSWERABLE = (
    "The context provided does not contain any information about your inquiry. "
    "Therefore, I'm unable to answer your question based on the given context."
)


@formats.register("context_qa", "context_qa.load", requires=["article", "question", "answer"])
def context_qa(entry: DatasetEntry, data: DataSection) -> Convert:
    def read(row: Row) -> tuple[str, str, str, str]:
        return "", f"{text(row, 'article')}\n===\n{text(row, 'question')}", "", text(row, "answer")

    return instruction_format(data, read, STYLES["chat"], CONTEXT)


@formats.register("context_qa.load_404", requires=["article", "unanswerable_question"])
def context_qa_unanswerable(entry: DatasetEntry, data: DataSection) -> Convert:
    def read(row: Row) -> tuple[str, str, str, str]:
        return "", f"{text(row, 'article')}\n===\n{text(row, 'unanswerable_question')}", "", UNANSWERABLE

    return instruction_format(data, read, STYLES["chat"], CONTEXT)


@formats.register("context_qa.load_v2", requires=["context", "question", "answer"])
def context_qa_v2(entry: DatasetEntry, data: DataSection) -> Convert:
    def read(row: Row) -> tuple[str, str, str, str]:
        prompt = f"Context: {text(row, 'context')}\nQuestion: {text(row, 'question')}\n"
        return "", prompt, "", f"Answer: {text(row, 'answer')}"

    return instruction_format(data, read, Style("", "{instruction}", "{instruction}"))


@formats.register("creative_acr.load_answer", requires=["instruction", "revision"])
def creative_answer(entry: DatasetEntry, data: DataSection) -> Convert:
    system = (
        "Answer the following question in a comprehensive, in-depth, and creative way. "
        "Additionally your response should be relevant, accurate, and free of any ambiguity."
    )
    layout = Style("{system}\n", STYLES["chat"].turn, STYLES["chat"].turn_without_input)
    return instruction_format(data, columns("instruction", "revision"), layout, System(system, system))
