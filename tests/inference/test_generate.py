"""Answers end by themselves, arrive piece by piece, and are sampled as asked."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from transformers import GenerationConfig

from axolotl.errors import ConfigError, DataError
from axolotl.inference.generate import Sampling, Stops, find_stops, generate, generate_batch
from axolotl.inference.once import answer_once, read_question
from scripted import CHATML, scripted

TEXT = "The old blue house"


@pytest.mark.parametrize("base", ["", CHATML])
def test_an_answer_ends_at_the_end_of_the_turn(base: str) -> None:
    loaded = scripted(TEXT, base=base) if base else scripted(TEXT)
    answer = generate(loaded.model, loaded.tokenizer, loaded.prompter.ask("hi"), Sampling(), loaded.stops)
    assert (answer.text, answer.finish) == (TEXT, "stop")
    assert answer.tokens == len(loaded.tokenizer.encode(TEXT, add_special_tokens=False)) + 1
    assert answer.speed > 0


def test_every_known_end_ends_it() -> None:
    loaded = scripted(TEXT)
    assert {4081, 4084} <= set(loaded.stops.ids)
    other = scripted(TEXT, stop=4081)
    assert (
        generate(other.model, other.tokenizer, other.prompter.ask("hi"), Sampling(), other.stops).text == TEXT
    )


def test_a_stop_text_of_several_tokens_ends_it_and_is_not_shown() -> None:
    loaded = scripted("Yes #Qz more")
    stops = find_stops(loaded.tokenizer, [4081], [" #Qz", "<|eot_id|>"])
    assert stops == Stops((4081, 4084), (" #Qz",))
    pieces: list[str] = []
    answer = generate(
        loaded.model, loaded.tokenizer, loaded.prompter.ask("hi"), Sampling(), stops, on_text=pieces.append
    )
    assert (answer.text, "".join(pieces), answer.finish) == ("Yes", "Yes", "stop")


@pytest.mark.parametrize("text", [TEXT, "naïve 日🙂 ok"])
def test_pieces_make_the_answer_and_no_character_is_torn(text: str) -> None:
    loaded = scripted(text)
    pieces: list[str] = []
    answer = generate(
        loaded.model,
        loaded.tokenizer,
        loaded.prompter.ask("hi"),
        Sampling(),
        loaded.stops,
        on_text=pieces.append,
    )
    assert "".join(pieces) == answer.text == text
    assert len(pieces) > 2
    assert not any("\ufffd" in p for p in pieces)


def test_a_limit_and_a_stop_by_the_user() -> None:
    loaded = scripted(TEXT)
    prompt = loaded.prompter.ask("hi")
    cut = generate(loaded.model, loaded.tokenizer, prompt, Sampling(max_new_tokens=2), loaded.stops)
    assert (cut.tokens, cut.finish) == (2, "length")
    seen: list[str] = []
    stopped = generate(
        loaded.model,
        loaded.tokenizer,
        prompt,
        Sampling(),
        loaded.stops,
        on_text=seen.append,
        cancelled=lambda: len(seen) >= 2,
    )
    assert stopped.finish == "cancelled"
    assert 2 <= len(seen) <= 3


def test_prompts_that_cannot_be_answered() -> None:
    loaded = scripted(TEXT)
    for prompt, words in (
        ([], "is empty"),
        ([5] * 8192, "has 8,192 tokens; this model's context holds 8,192"),
    ):
        with pytest.raises(DataError, match=words):
            generate(loaded.model, loaded.tokenizer, prompt, Sampling(), loaded.stops)


@pytest.mark.parametrize(
    ("sampling", "own", "expected"),
    [
        (Sampling(), None, (False, None)),
        (Sampling(temperature=0.0), GenerationConfig(do_sample=True, temperature=0.6), (False, None)),
        (Sampling(temperature=0.5), None, (True, 0.5)),
        (Sampling(), GenerationConfig(do_sample=True, temperature=0.6), (True, 0.6)),
        (Sampling(top_p=0.9), GenerationConfig(do_sample=True, temperature=0.6), (True, 0.6)),
        (Sampling(do_sample=False), GenerationConfig(do_sample=True, temperature=0.6), (False, None)),
    ],
)
def test_sampling_values(
    sampling: Sampling, own: GenerationConfig | None, expected: tuple[bool, float | None]
) -> None:
    config = sampling.config(own)
    found = config.temperature if config.do_sample else None
    assert (config.do_sample, found) == expected


def test_a_seed_repeats_an_answer() -> None:
    loaded = scripted(TEXT)
    prompt = loaded.prompter.ask("hi")
    sampling = Sampling(max_new_tokens=12, temperature=500.0, top_k=0, seed=1)
    first, again, other = (
        generate(loaded.model, loaded.tokenizer, prompt, s, Stops(())).text
        for s in (sampling, sampling, sampling.changed("seed", "2"))
    )
    assert first == again != other


def test_setting_values_by_name() -> None:
    sampling = Sampling().changed("temperature", "0.7").changed("top_k", "40").changed("do_sample", "true")
    assert (sampling.temperature, sampling.top_k, sampling.do_sample) == (0.7, 40, True)
    for name, value in (("temprature", "1"), ("top_k", "many"), ("do_sample", "1")):
        with pytest.raises(ConfigError):
            sampling.changed(name, value)


def test_many_prompts_of_different_length_at_once() -> None:
    loaded = scripted(TEXT)
    prompts = [
        loaded.prompter.ask(q) for q in ("hi", "hi, this one is quite a bit longer than the other", "hm hi")
    ]
    results = generate_batch(
        loaded.model, loaded.tokenizer, prompts, Sampling(max_new_tokens=20), loaded.stops
    )
    assert [(loaded.tokenizer.decode(ids), finish) for ids, finish in results] == [(TEXT, "stop")] * 3
    short = generate_batch(loaded.model, loaded.tokenizer, prompts, Sampling(max_new_tokens=2), loaded.stops)
    assert {finish for _, finish in short} == {"length"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_where_the_question_comes_from(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("from a file\n")
    assert read_question("given", tmp_path / "q.txt", io.StringIO("x")) == "given"
    assert read_question(None, tmp_path / "q.txt", io.StringIO("x")) == "from a file"
    assert read_question(None, None, io.StringIO("two\nlines\n")) == "two\nlines"
    assert read_question(None, None, Terminal()) is None
    for prompt, file, stdin in ((None, None, ""), (" ", None, "x"), (None, tmp_path / "no", "x")):
        with pytest.raises(DataError):
            read_question(prompt, file, io.StringIO(stdin))


def test_the_answer_is_all_that_stdout_gets(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = scripted(TEXT)
    capsys.readouterr()
    answer_once(loaded, "hi", Sampling())
    shown = capsys.readouterr()
    assert shown.out == f"{TEXT}\n"
    assert "tokens/s" in shown.err
