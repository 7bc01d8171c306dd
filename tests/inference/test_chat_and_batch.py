"""The conversation's commands, and the batch that goes on where it stopped."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.errors import DataError, UserError
from axolotl.inference import chat as chat_module
from axolotl.inference.batch import run_batch
from axolotl.inference.chat import Chat, run_chat
from axolotl.inference.generate import Sampling
from axolotl.inference.loading import Loaded
from axolotl.inference.thinking import DIM, PLAIN, Shown, opened_by, without_thinking
from scripted import scripted

TEXT = "The old blue house"


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return scripted(TEXT)


@pytest.fixture
def chat(loaded: Loaded) -> tuple[Chat, list[str]]:
    shown: list[str] = []
    return Chat(loaded, Sampling(max_new_tokens=20), shown.append), shown


def roles(chat: Chat) -> str:
    return "".join(m["role"][0] for m in chat.messages)


def test_turns_and_commands(chat: tuple[Chat, list[str]], tmp_path: Path) -> None:
    talk, shown = chat
    talk.handle("hi")
    talk.handle("  ")
    talk.handle("/system Be terse.")
    talk.handle("again")
    assert "".join(shown) == f"{TEXT}\n{TEXT}\n"
    assert roles(talk) == "suaua"
    talk.handle("/system Be long.")
    assert (talk.messages[0]["content"], roles(talk)) == ("Be long.", "suaua")
    talk.handle("/retry")
    assert roles(talk) == "suaua"
    assert len(shown) > 4
    talk.handle("/undo")
    assert roles(talk) == "sua"
    talk.handle(f"/save {tmp_path / 'c.jsonl'}")
    assert json.loads((tmp_path / "c.jsonl").read_text())["messages"] == talk.messages
    talk.handle("/clear")
    assert roles(talk) == "s"
    talk.handle("//not a command")
    assert talk.messages[-2]["content"] == "/not a command"
    talk.handle("/quit")
    assert talk.over


def test_mistakes_in_commands_change_nothing(
    chat: tuple[Chat, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    talk, shown = chat
    for line in (
        "/sett temperature 1",
        "/set temprature 1",
        "/set temperature hot",
        "/retry",
        "/save",
        "/save x.jsonl",
        "/undo",
        "/undo 2",
        "/retry please",
        "/clear all",
        "/help me",
        "/quit now",
        "/set temperature",
        "/set temperature -1",
        "/set temperature nan",
        "/set top_p 1.5",
        "/set top_k 0",
        "/set max_new_tokens none",
        "/set seed -1",
        "/set do_sample maybe",
    ):
        talk.handle(line)
    told = capsys.readouterr().err
    for words in (
        "`/sett` is no command",
        "`temprature`",
        "`hot`",
        "no message to answer",
        "needs a file name",
        "no answer to save",
        "nothing to undo",
        "`/undo` takes nothing",
        "`/retry` takes nothing",
        "`/clear` takes nothing",
        "`/help` takes nothing",
        "`/quit` takes nothing",
        "`/set temperature` needs a value",
        "`-1` is no value for `temperature`. It takes a number from 0 to 100",
        "`nan` is no value",
        "`1.5` is no value for `top_p`",
        "`0` is no value for `top_k`",
        "`none` is no value for `max_new_tokens`",
        "`-1` is no value for `seed`",
        "It takes true or false",
    ):
        assert words in told
    assert (talk.messages, shown, talk.sampling) == ([], [], Sampling(max_new_tokens=20))
    talk.handle("/set temperature=0.3")
    assert talk.sampling.temperature == 0.3
    talk.handle("/set temperature none")
    assert talk.sampling.temperature is None
    assert not talk.over
    talk.handle("/help")
    assert "/retry" in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_told_and_forgotten(
    chat: tuple[Chat, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    talk, _ = chat
    talk.handle("word " * 9000)
    assert talk.messages == []
    assert "context holds 8,192" in capsys.readouterr().err


def test_without_a_terminal_each_line_is_a_message(
    loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = run_chat(loaded, Sampling(max_new_tokens=20), io.StringIO("hi\n/quit\nnever\n"))
    assert roles(talk) == "ua"
    assert capsys.readouterr().out == f"{TEXT}\n"
    assert roles(run_chat(loaded, Sampling(max_new_tokens=20), io.StringIO("hi\nhi"))) == "uaua"


def test_a_conversation_without_an_answer_is_not_saved(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Chat(loaded, Sampling(max_new_tokens=20), lambda _: None, system="Be terse.")
    assert roles(talk) == "s"
    talk.handle(f"/save {tmp_path / 'c.jsonl'}")
    talk.handle("/undo")
    told = capsys.readouterr().err
    assert "no answer to save" in told and "nothing to undo" in told
    assert not (tmp_path / "c.jsonl").exists()
    talk.handle("hi")
    talk.handle("/save /no/where/x")
    talk.handle(f"/save {tmp_path}")
    assert capsys.readouterr().err.count("cannot be written") == 2


def test_ctrl_c_keeps_the_chat(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Chat(loaded, Sampling(max_new_tokens=20), lambda _: None)

    def stopped(*_: Any, on_text: Callable[[str], None], **__: Any) -> None:
        on_text(said)
        raise KeyboardInterrupt

    talk.handle("hi")
    with monkeypatch.context() as patch:
        patch.setattr(chat_module, "generate", stopped)
        said = "The old"
        talk.handle("again")
        assert (roles(talk), talk.messages[-1]["content"]) == ("uaua", "The old")
        said = ""
        talk.handle("once more")
        assert roles(talk) == "uaua"
        talk.handle("/retry")
        assert talk.messages[-1]["content"] == "The old"
    talk.handle("/retry")
    assert talk.messages[-1]["content"] == TEXT
    assert "kept as far as it came" in capsys.readouterr().err


@settings(deadline=None)
@given(st.data())
def test_tags_may_come_in_any_pieces(data: st.DataObject) -> None:
    text = "".join(
        data.draw(st.lists(st.sampled_from(["<think>", "</think>", "<", "th", "</", "a", "ink>", " ", "\n"])))
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    whole: list[str] = []
    for pieces, written in ((([text]), whole), ([text[a:b] for a, b in pairwise([0, *cuts, len(text)])], [])):
        shown = Shown(written.append, dim=True)
        for piece in pieces:
            shown(piece)
        shown.end()
        assert shown.text == text
        assert "".join(written) == "".join(whole)
        assert "".join(written).replace(DIM, "").replace(PLAIN, "") == text


def test_thinking_that_the_prompt_has_opened() -> None:
    pieces: list[str] = []
    assert opened_by("<|assistant|><think>\n")
    assert not opened_by("<think>hm</think>")
    shown = Shown(pieces.append, dim=True, thinking=True)
    for piece in ("hm", "</th", "ink>Yes"):
        shown(piece)
    assert "".join(pieces) == f"{DIM}hm</think>{PLAIN}Yes"
    assert without_thinking("hm</think>\n\nYes") == "Yes"


def test_thinking_is_dimmed_and_left_out_of_later_turns() -> None:
    pieces: list[str] = []
    shown = Shown(pieces.append, dim=True)
    for piece in ("<think>", "hm", "</think>", "Yes"):
        shown(piece)
    assert "".join(pieces) == "\x1b[2m<think>hm</think>\x1b[0mYes"
    assert without_thinking("<think>hm</think>\n\nYes") == "Yes"
    assert without_thinking("<think>never closed") == "<think>never closed"


def rows_file(folder: Path, count: int = 5) -> Path:
    file = folder / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"hi {'x' * i}", "id": i}) + "\n" for i in range(count)) + "\n"
    )
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_batch_goes_on_where_it_stopped(loaded: Loaded, tmp_path: Path) -> None:
    source, target, sampling = (
        rows_file(tmp_path),
        tmp_path / "new" / "out.jsonl",
        Sampling(max_new_tokens=20),
    )
    assert run_batch(loaded, source, target, sampling, batch_size=2) == 5
    whole = target.read_text()
    answers = read(target)
    assert [(r["id"], r["row"], r["finish"]) for r in answers] == [(i, i + 1, "stop") for i in range(5)]
    assert {r["answer"] for r in answers} == {TEXT}
    target.write_text(whole[: len(whole) // 2])  # in the middle of a line
    assert 0 < run_batch(loaded, source, target, sampling, batch_size=2) < 5
    assert target.read_text() == whole
    assert run_batch(loaded, source, target, sampling) == 0
    changed = r"something else: sampling \(max_new_tokens 20, now 3; temperature unset, now 0.5\)"
    with pytest.raises(DataError, match=changed):
        run_batch(loaded, source, target, Sampling(max_new_tokens=3, temperature=0.5))
    weight = next(loaded.model.parameters())
    weight.data += 1
    with pytest.raises(DataError, match="something else: weights"):
        run_batch(loaded, source, target, sampling)
    weight.data -= 1
    questions = source.read_text()
    source.write_text(questions.replace(questions.splitlines()[0], '{"prompt": "another question"}', 1))
    with pytest.raises(DataError, match=r"something else: .*rows 1"):
        run_batch(loaded, source, target, sampling)


def test_line_separators_inside_of_a_text_end_no_row(loaded: Loaded, tmp_path: Path) -> None:
    """JSON may hold U+2028 and U+0085 as they are; answers are written so."""
    source, target = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "one\u2028two\u0085three"}\n', encoding="utf-8")
    assert run_batch(loaded, source, target, Sampling(max_new_tokens=2)) == 1
    assert run_batch(loaded, source, target, Sampling(max_new_tokens=2)) == 0


def test_rows_in_the_form_of_the_training_data(loaded: Loaded, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "left out"}]
    source.write_text(f'{json.dumps({"messages": messages})}\n"just a question"\n')
    run_batch(loaded, source, tmp_path / "out.jsonl", Sampling(max_new_tokens=20))
    assert [r["answer"] for r in read(tmp_path / "out.jsonl")] == [TEXT, TEXT]


def test_all_wrong_rows_are_told_before_the_first_answer(loaded: Loaded, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "hi"}\n{"prompt"\n[1]\n')
    with source.open("ab") as file:
        file.write(b'{"colour": 1}\n\xff\n{"prompt": "' + b"x " * 9000 + b'"}\n')
    with pytest.raises(DataError) as told:
        run_batch(loaded, source, tmp_path / "out.jsonl", Sampling())
    assert [str(p.places[0]) for p in told.value.problems] == [f"{source}:{n}" for n in (2, 3, 4, 5)]
    for words in ("column 10", "a list", "not UTF-8", "A row with `colour`"):
        assert any(words in p.message for p in told.value.problems)
    assert all(p.remedy for p in told.value.problems)
    source.write_text('"hi"\n' + json.dumps({"prompt": "x " * 9000}) + "\n")
    with pytest.raises(DataError, match=r":2: .*context holds") as told:
        run_batch(loaded, source, tmp_path / "out.jsonl", Sampling())
    source.write_text('{"prompt": "a", "prompt": "b"}\n{"prompt": " "}\n""\n{"prompt": "hi"}\n')
    with pytest.raises(DataError) as told:
        run_batch(loaded, source, tmp_path / "out.jsonl", Sampling())
    assert [p.places[0].line for p in told.value.problems] == [1, 2, 3]
    assert "`prompt` stands twice" in told.value.problems[0].message
    assert "empty" in told.value.problems[1].message
    source.write_text("[1]\n" * 70)
    with pytest.raises(DataError, match="and 20 more rows") as told:
        run_batch(loaded, source, tmp_path / "out.jsonl", Sampling())
    assert (tmp_path / "out.jsonl").read_text() == ""
    for other, words in (
        (tmp_path / "no.jsonl", "does not exist"),
        (tmp_path / "empty.jsonl", "has no rows"),
    ):
        (tmp_path / "empty.jsonl").write_text("\n")
        with pytest.raises(DataError, match=words):
            run_batch(loaded, other, tmp_path / "out.jsonl", Sampling())


def test_separators_inside_texts_and_columns_of_the_same_names(loaded: Loaded, tmp_path: Path) -> None:
    source, target = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    row = {"prompt": "hi\u2028there\x85", "answer": "gold", "row": "x"}
    source.write_text("\ufeff" + (json.dumps(row, ensure_ascii=False) + "\r\n") * 2, encoding="utf-8")
    run_batch(loaded, source, target, Sampling(max_new_tokens=20))
    found = [json.loads(line) for line in target.read_bytes().split(b"\n")[:-1]]
    assert [(r["answer_in_row"], r["row_in_row"], r["row"]) for r in found] == [
        ("gold", "x", 1),
        ("gold", "x", 2),
    ]
    os.truncate(target, target.stat().st_size - 5)
    assert run_batch(loaded, source, target, Sampling(max_new_tokens=20)) == 1
    assert [json.loads(line) for line in target.read_bytes().split(b"\n")[:-1]] == found


def test_a_system_message_for_rows_that_have_none(loaded: Loaded, tmp_path: Path) -> None:
    source, target = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    ask = loaded.prompter
    user = {"role": "user", "content": "hi"}
    own = {"role": "system", "content": "Mine."}
    assert ask.row({"prompt": "hi"}, "S") == ask.row({"messages": [user]}, "S") == ask.ask("hi", "S")
    assert ask.row({"messages": [own, user]}, "S") == ask.row({"messages": [own, user]}) != ask.ask("hi", "S")
    assert ask.takes_system()
    source.write_text('"hi"\n')
    run_batch(loaded, source, target, Sampling(max_new_tokens=20), system="S")
    with pytest.raises(DataError, match="something else: system message"):
        run_batch(loaded, source, target, Sampling(max_new_tokens=20))


def test_files_of_others_are_left_alone(loaded: Loaded, tmp_path: Path) -> None:
    source = rows_file(tmp_path)
    before = source.read_text()
    with pytest.raises(DataError, match="is the file with the questions"):
        run_batch(loaded, source, source, Sampling())
    for mine in ('{"mine": 1}\n', "one line\nand half a", "no line at all"):
        (tmp_path / "notes.jsonl").write_text(mine)
        with pytest.raises(DataError, match="was not written by this command"):
            run_batch(loaded, source, tmp_path / "notes.jsonl", Sampling())
        assert (tmp_path / "notes.jsonl").read_text() == mine
    for wrong in (tmp_path, tmp_path / "notes.jsonl" / "out.jsonl"):
        with pytest.raises(UserError, match=r"is a folder|cannot be written"):
            run_batch(loaded, source, wrong, Sampling())
    assert source.read_text() == before
