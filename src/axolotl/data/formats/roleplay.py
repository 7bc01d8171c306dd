"""Older conversation layouts with fixed text of their own: metharme, pygmalion, llama2_chat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axolotl.data.formats.columns import decoded, kind, text
from axolotl.data.formats.registry import Convert, Row, formats
from axolotl.data.types import Marked, Piece, Pieces, RowProblem

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry


@formats.register("metharme", "metharme.load", requires=["prompt", "generation"])
def metharme(entry: DatasetEntry, data: DataSection) -> Convert:
    on_inputs = bool(data.train_on_inputs)

    def convert(row: Row) -> Pieces:
        return Pieces(
            [Piece(text(row, "prompt"), on_inputs, bos=True), Piece(text(row, "generation"), True, eos=3)]
        )

    return convert


def _turns(row: Row, role: str, known: dict[str, str]) -> list[tuple[str, str]]:
    """(role, text) of each turn in `conversations`, roles by their names in `known`."""
    turns: Any = row.get("conversations")
    if isinstance(turns, str):
        turns = decoded(turns, "`conversations`")
    if not isinstance(turns, list) or not turns:
        raise RowProblem("no messages", f"`conversations` holds {kind(turns)}, a list of turns is expected")
    found = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowProblem("message is not an object", f"turn {number} is {kind(turn)}")
        speaker, said = turn.get(role), turn.get("value")
        if not isinstance(speaker, str) or speaker not in known:
            raise RowProblem(
                "unknown role", f"turn {number} has `{role}`: {speaker!r}", f"Known: {', '.join(known)}."
            )
        if not isinstance(said, str):
            raise RowProblem("message without content", f"the `value` of turn {number} is {kind(said)}")
        found.append((known[speaker], said.strip()))
    return found


@formats.register("pygmalion", "pygmalion.load", requires=["conversations"])
def pygmalion(entry: DatasetEntry, data: DataSection) -> Convert:
    on_inputs = bool(data.train_on_inputs)
    roles = {"system": "system", "human": "human", "bot": "bot"}

    def convert(row: Row) -> Pieces:
        pieces: list[Piece] = []
        for role, said in _turns(row, "role", roles):
            first = not pieces
            if role == "system":
                said = said.removesuffix("<START>").rstrip()
                pieces.append(Piece(f"<|system|>Persona: {said}", on_inputs, bos=first))
            elif role == "human":
                pieces.append(Piece(f"<|user|> {said}", on_inputs, bos=first))
            else:
                pieces.append(Piece("<|model|>", on_inputs, bos=first))
                pieces.append(Piece(f" {said}", True, eos=1))
        return Pieces(pieces)

    return convert


@formats.register("llama2_chat", "llama2_chat.load", requires=["conversations"])
def llama2_chat(entry: DatasetEntry, data: DataSection) -> Convert:
    """Llama 2's own layout, whose `</s><s>` between turns are text that its tokenizer reads as EOS and BOS."""
    roles = {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
    }
    default_system = data.default_system_message

    def convert(row: Row) -> Marked:
        turns = _turns(row, "from", roles)
        if turns[0][0] == "system":
            system, turns = turns[0][1], turns[1:]
        elif default_system is not None:
            system = default_system
        else:
            raise RowProblem(
                "no system message",
                "`llama2_chat` writes a system text into the first turn, and this row has none",
                "Set `default_system_message`, or use `type: chat_template` with the model's own template, which does "
                "without one.",
            )
        if turns and turns[-1][0] == "user":
            turns = turns[:-1]
        if not turns or [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2):
            raise RowProblem(
                "turns do not alternate", "user and assistant have to take turns, the user first"
            )
        layout, spans = "", []
        for i in range(0, len(turns), 2):
            head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if i == 0 else "<s>"
            layout += (
                f"[INST] {head}{turns[i][1]} [/INST] " if i == 0 else f"{head}[INST] {turns[i][1]} [/INST] "
            )
            start = len(layout)
            layout += f"{turns[i + 1][1]} </s>"
            spans.append((start, len(layout)))
        return Marked(layout, spans)

    return convert
