"""Showing prepared rows: each token with whether it is trained, masked or special, in colour and without it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq

from axolotl import console
from axolotl.data.prepared import Prepared
from axolotl.data.types import IGNORE_INDEX

Kind = Literal["trained", "masked", "special"]

_COLOURS = {"trained": "\x1b[32m", "masked": "\x1b[2m", "special": "\x1b[33m"}  # green, dim, yellow
_TRAINED_SPECIAL = "\x1b[1;32m"
_RESET = "\x1b[0m"


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a prepared row, as a person reads it."""

    text: str
    id: int
    label: int
    special: bool
    part: bytes = b""
    """The bytes of a token that is only part of a character; its text then writes them out."""

    @property
    def trained(self) -> bool:
        return self.label != IGNORE_INDEX


@dataclass(frozen=True)
class ShownRow:
    """A prepared row with the place that it came from."""

    number: int
    """Its row in the prepared folder."""
    file: str
    line: int
    tokens: list[Token]

    @property
    def trained(self) -> int:
        return sum(t.trained for t in self.tokens)


def read_tokens(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int]) -> list[Token]:
    """The tokens of a row with their texts; tokens that are only part of a character show their bytes."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = tokenizer.convert_ids_to_tokens(list(input_ids))
    letters = _byte_letters()
    found = []
    for token_id, label, name in zip(input_ids, labels, map(str, names), strict=True):
        text = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        part = b""
        if "\ufffd" in text:
            if all(c in letters for c in name):
                part = bytes(letters[c] for c in name)
            text = "".join(f"\\x{b:02x}" for b in part) or name
        elif name.startswith("▁") and not text.startswith(" "):
            text = " " + text  # decoders of this kind strip the space in front of a first token
        found.append(Token(text, token_id, label, token_id in special, part))
    return found


def readable(tokens: Sequence[Token]) -> Iterator[tuple[Token, str]]:
    """Each token with the text to show where tokens stand side by side: a character whose bytes are spread over several
    tokens of one kind stands at the last of them."""
    at = 0
    while at < len(tokens):
        end = at
        while end < len(tokens) and tokens[end].part and tokens[end].trained == tokens[at].trained:
            end += 1
        whole = b"".join(t.part for t in tokens[at:end]).decode(errors="replace")
        if end > at and "\ufffd" not in whole:
            yield from ((t, "") for t in tokens[at : end - 1])
            yield tokens[end - 1], whole
            at = end
        else:
            yield tokens[at], tokens[at].text
            at += 1


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes: printable Latin-1 as it is, the others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def visible(text: str) -> str:
    """The text with control characters, which a terminal would obey, written out."""
    return "".join(c if (c >= " " and c != "\x7f") or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def choose_rows(count: int, wanted: int) -> list[int]:
    """At most `wanted` rows of `count`, evenly spread from the first on."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(int)).tolist() if count else []


def shown_rows(prepared: Prepared, tokenizer: Any, numbers: Sequence[int]) -> Iterator[ShownRow]:
    """Rows of the train folder with their places in the user's files."""
    index = prepared.row_index()
    lines = index["ledger"][list(numbers)]
    columns = pq.read_table(prepared.ledger, columns=["file", "row"]).take(lines)
    dataset = prepared.saved("train")
    for number, file, line in zip(numbers, columns["file"], columns["row"], strict=True):
        row = dataset[int(number)]
        tokens = read_tokens(tokenizer, row["input_ids"], row["labels"])
        yield ShownRow(int(number), str(file.as_py()), line.as_py(), tokens)


def as_pairs(tokens: Sequence[Token], colour: bool) -> str:
    """`token(label, id)` for each token; a star marks special tokens."""
    parts = []
    for t in tokens:
        text = visible(t.text).replace("\n", "⏎") or "∅"
        star = "*" if t.special else ""
        shown = f"{text}{star}({t.label}, {t.id})"
        parts.append(f"{_code(t)}{shown}{_RESET}" if colour else shown)
        parts.append("\n" if "\n" in t.text else " ")
    return "".join(parts).rstrip()


def as_text(tokens: Sequence[Token], colour: bool) -> str:
    """The row as it reads. Without colour, ⟦ ⟧ stand around what is trained and ‹ › around special tokens."""
    parts = []
    for trained, stretch in groupby(readable(tokens), lambda pair: pair[0].trained):
        inside = []
        for token, shown in stretch:
            text = visible(shown)
            if colour:
                inside.append(f"{_code(token)}{text}{_RESET}")
            else:
                inside.append(f"‹{text}›" if token.special else text)
        joined = "".join(inside)
        parts.append(f"⟦{joined}⟧" if trained and not colour else joined)
    return "".join(parts)


def _code(token: Token) -> str:
    if token.special:
        return _TRAINED_SPECIAL if token.trained else _COLOURS["special"]
    return _COLOURS["trained" if token.trained else "masked"]


def wants_colour() -> bool:
    """Colour on a terminal, unless NO_COLOR says otherwise; FORCE_COLOR asks for it anywhere."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()


def preview(
    prepared: Prepared, tokenizer: Any, *, ids: bool = True, rows: int = 5, colour: bool | None = None
) -> None:
    """Prints some rows to stdout: as `token(label, id)` with `ids`, else as text with the mask marked."""
    colour = wants_colour() if colour is None else colour
    count = len(prepared.row_index()["length"])
    if colour:
        trained, masked, special = (f"{_COLOURS[k]}{k}{_RESET}" for k in ("trained", "masked", "special"))
        console.out(f"{trained}  {masked}  {special} (bold where trained)")
    elif ids:
        console.out("token(label, id); label -100: masked; *: special token")
    else:
        console.out("⟦trained⟧ masked ‹special›")
    for row in shown_rows(prepared, tokenizer, choose_rows(count, rows)):
        console.out()
        console.out(
            f"--- row {row.number} ({row.file}:{row.line}): {len(row.tokens):,} tokens, {row.trained:,} trained"
        )
        console.out(as_pairs(row.tokens, colour) if ids else as_text(row.tokens, colour))
