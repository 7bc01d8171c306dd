"""The preview says for every token whether it is trained, masked or special, with and without colour."""

from __future__ import annotations

import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl.data.prepare import prepare
from axolotl.data.preview import (
    Token,
    as_pairs,
    as_text,
    choose_rows,
    preview,
    read_tokens,
    readable,
    visible,
    wants_colour,
)
from preparing import alpaca, llama3, section, write_rows

TOKENIZER = llama3()


def tokens_of(text: str, trained_from: int = 0) -> list[Token]:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return read_tokens(TOKENIZER, ids, [t if i >= trained_from else -100 for i, t in enumerate(ids)])


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_nothing_of_a_text_is_lost(text: str) -> None:
    assert "".join(shown for _, shown in readable(tokens_of(text))) == TOKENIZER.decode(
        [t.id for t in tokens_of(text)], clean_up_tokenization_spaces=False
    )


def test_a_character_cut_by_the_mask_shows_its_bytes() -> None:
    tokens = tokens_of("ß", trained_from=1)
    assert [shown for _, shown in readable(tokens)] == ["\\xc3", "\\x9f"]
    assert as_text(tokens, colour=False) == "\\xc3⟦\\x9f⟧"


def test_pairs_hold_label_and_id() -> None:
    ids = TOKENIZER("Hi\n<|eot_id|>", add_special_tokens=False)["input_ids"]
    labels = [-100, *ids[1:]]
    shown = as_pairs(read_tokens(TOKENIZER, ids, labels), colour=False)
    found = re.findall(r"(\S+?)(\*?)\((-?\d+), (\d+)\)", shown)
    assert [(int(label), int(i)) for *_, label, i in found] == list(zip(labels, ids, strict=True))
    assert found[-1][:2] == ("<|eot_id|>", "*")
    assert "⏎" in shown


def test_text_marks_trained_and_special_without_colour() -> None:
    ids = TOKENIZER("ask<|eot_id|>answer<|eot_id|>", add_special_tokens=False)["input_ids"]
    eot = TOKENIZER.convert_tokens_to_ids("<|eot_id|>")
    cut = ids.index(eot) + 1
    tokens = read_tokens(TOKENIZER, ids, [-100] * cut + ids[cut:])
    assert as_text(tokens, colour=False) == "ask‹<|eot_id|>›⟦answer‹<|eot_id|>›⟧"
    coloured = as_text(tokens, colour=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == "ask<|eot_id|>answer<|eot_id|>"
    codes = {word: code for code, word in re.findall(r"(\x1b\[[0-9;]*m)([^\x1b]+)\x1b\[0m", coloured)}
    assert len(set(codes.values())) >= 3


def test_escape_sequences_in_the_data_do_nothing() -> None:
    assert visible("\x1b[2J\ttab\nline\x7f") == "\\x1b[2J\ttab\nline\\x7f"
    assert "\x1b" not in as_text(tokens_of("a\x1b[31mb"), colour=False)


@pytest.mark.parametrize(
    ("count", "wanted", "rows"), [(0, 5, []), (1, 5, [0]), (3, 5, [0, 1, 2]), (101, 3, [0, 50, 100])]
)
def test_rows_are_spread(count: int, wanted: int, rows: list[int]) -> None:
    assert choose_rows(count, wanted) == rows


def test_it_prints_rows_with_their_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"instruction": "Hi", "output": ""}, *alpaca(9)])
    prepared = prepare(section(path, folder=tmp_path / "p"), TOKENIZER)
    preview(prepared, TOKENIZER, rows=2)
    shown = capsys.readouterr().out
    assert f"row 0 ({path}:2)" in shown
    assert f"row 8 ({path}:10)" in shown
    assert "<|end_of_text|>*(4081, 4081)" in shown
    assert "\x1b" not in shown
    preview(prepared, TOKENIZER, ids=False, rows=1)
    shown = capsys.readouterr().out
    assert re.search(r"### Response:\n⟦0 1 2‹<\|end_of_text\|>›⟧", shown)


def test_colour_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert not wants_colour()
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert wants_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour()


def test_tokens_of_sentencepiece_vocabularies_keep_their_space() -> None:
    class Stub:
        all_special_ids: tuple[int, ...] = ()
        added_tokens_decoder: MappingProxyType[int, Any] = MappingProxyType({})

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return ["▁word", "s"]

        def decode(self, ids: list[int], **_: Any) -> str:
            return {1: "word", 2: "s"}[ids[0]]

    assert [t.text for t in read_tokens(Stub(), [1, 2], [1, 2])] == [" word", "s"]
