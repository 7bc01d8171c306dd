"""The quickstart keeps its word: nothing held out was seen, the base knows nothing of the task, and the figures hold."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors import safe_open

from axolotl.config import load_config
from axolotl.run.train import train

PROJECT = Path(__file__).resolve().parent.parent
FOLDER = PROJECT / "examples" / "quickstart"
LAST_LINE = re.compile(r"held-out exact match before: (\d+\.\d) % after: (\d+\.\d) % \((\d+) rows\)")


def module(name: str) -> ModuleType:
    """A script of the quickstart's folder, imported under its own name."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def read(name: str) -> list[tuple[str, str]]:
    """(question, answer) of a shipped file."""
    rows = [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [tuple(message["content"] for message in row["messages"]) for row in rows]  # type: ignore[misc]


def test_nothing_held_out_occurs_in_a_training_row() -> None:
    heldout = read("heldout")
    everything = "\n".join(f"{question}\n{answer}" for question, answer in read("train"))
    assert len(heldout) >= 200
    assert [question for question, _ in heldout if question in everything] == []
    assert [answer for _, answer in heldout if answer in everything] == []


def test_shipped_rows_are_what_the_script_writes() -> None:
    train_rows, heldout = module("dates").rows()
    assert [(r["question"], r["answer"]) for r in train_rows] == read("train")
    assert [(r["question"], r["answer"]) for r in heldout] == read("heldout")


def test_every_question_has_one_answer() -> None:
    answers: dict[str, set[str]] = {}
    for question, answer in read("train") + read("heldout"):
        answers.setdefault(question, set()).add(answer)
    assert [q for q, found in answers.items() if len(found) > 1] == []
    # Figures alone leave open which is the day: they always say so, or begin with the year.
    bare = [q for q in answers if re.fullmatch(r"[\d/.]+", q) and not re.match(r"\d{4}/", q)]
    assert bare == []


def test_the_base_has_read_nothing_of_the_task() -> None:
    dates = module("dates")
    names = {n.lower() for n in (*dates.MONTHS, *dates.SHORT, *dates.WEEKDAYS)} | {"sep"}
    names |= {day[:3].lower() for day in dates.WEEKDAYS} | {
        "date",
        "day",
        "month",
        "year",
        "calendar",
        "week",
        "weekday",
    }
    iso = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\(\s*[dmy]\W[dmy]\W[dmy]\s*\)", re.IGNORECASE)
    words: set[str] = set()
    for text in module("corpus").rows():
        assert iso.search(text) is None
        words.update(re.findall(r"[a-z]+", text.lower()))
    assert words & names == set()
    assert len(words) > 200


def test_corpus_is_reproducible() -> None:
    corpus = module("corpus")
    assert list(corpus.rows(30)) == list(corpus.rows(30))
    assert list(corpus.rows(30)) != list(corpus.rows(30, seed=8))


def test_base_is_small_and_has_the_shape_that_the_script_writes(tmp_path: Path) -> None:
    architecture = module("architecture")
    tokenizer = architecture.build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == (FOLDER / "base" / "tokenizer.json").read_text()
    config = architecture.build_config(tokenizer).to_dict()
    shipped = json.loads((FOLDER / "base" / "config.json").read_text())
    assert {
        k: config[k] for k in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    } == {k: shipped[k] for k in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")}
    weights = FOLDER / "base" / "model.safetensors"
    assert weights.stat().st_size <= 12_000_000
    with safe_open(weights, "numpy") as tensors:
        count = sum(tensors.get_tensor(name).size for name in tensors.keys())  # noqa: SIM118
    assert 2_000_000 <= count <= 6_000_000


def test_tokenizer_gives_every_text_back() -> None:
    tokenizer = module("architecture").build_tokenizer()
    for text in ("the 4th of July, '84", "naïve ¥ 日本", " two  spaces\n", "user system"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("31 May")["input_ids"]) == 6


def test_base_config_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config that made the base, for two steps on a little of its corpus."""
    monkeypatch.chdir(PROJECT)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in module("corpus").rows(40)))
    overrides = {
        "datasets": [{"path": str(corpus), "ds_type": "json", "type": "completion", "field": "text"}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "micro_batch_size": 1,
    }
    assert train(load_config("examples/quickstart/base.yml", overrides)).complete
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("before", "after", "rows", "fails"),
    [
        (0.0, 97.0, 400, False),
        (5.0, 90.0, 200, False),
        (5.5, 97.0, 400, True),
        (0.0, 89.9, 400, True),
        (0, 97, 199, True),
    ],
)
def test_missed_figures_fail(
    before: float,
    after: float,
    rows: int,
    fails: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = module("run")
    shares = iter((before, after))
    commands: list[tuple[str, ...]] = []

    def axolotl(*args: str) -> None:
        commands.append(args)
        if args[0] == "inference":
            print("$ axolotl inference\n1984-07-04")

    monkeypatch.setattr(run, "OUT", tmp_path)
    monkeypatch.setattr(run, "PROMPT", FOLDER / "prompt.txt")
    monkeypatch.setattr(run, "axolotl", axolotl)
    monkeypatch.setattr(run, "exact_match", lambda: (next(shares), rows))
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    if fails:
        with pytest.raises(SystemExit) as exit_:
            run.main()
        assert exit_.value.code not in (0, None)
    else:
        run.main()
    assert [c[0] for c in commands] == ["evaluate", "train", "merge-lora", "evaluate", "inference"]
    figures, answer = capsys.readouterr().out.strip().splitlines()[-2:]
    assert LAST_LINE.fullmatch(figures)
    assert answer == "1984-07-04"


@pytest.mark.parametrize(("typed", "asked"), [("3 May '07", "3 May '07"), ("  ", "the 4th of July, '84")])
def test_a_person_at_the_terminal_is_asked(typed: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = module("run")
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: typed)
    assert run.question() == asked


def test_the_prompt_is_no_row_of_the_data() -> None:
    prompt = (FOLDER / "prompt.txt").read_text(encoding="utf-8").strip()
    assert prompt
    assert all(prompt not in question for question, _ in read("train"))


@pytest.mark.slow
def test_the_whole_quickstart(tmp_path: Path) -> None:
    """As a stranger runs it, without a terminal, in a copy."""
    shutil.copytree(
        FOLDER, tmp_path / "examples" / "quickstart", ignore=shutil.ignore_patterns("__pycache__")
    )
    options: dict[str, Any] = {
        "cwd": tmp_path,
        "stdin": subprocess.DEVNULL,
        "capture_output": True,
        "text": True,
    }
    result = subprocess.run([sys.executable, "examples/quickstart/run.py"], timeout=1500, **options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    figures, answer = result.stdout.strip().splitlines()[-2:]
    found = LAST_LINE.fullmatch(figures)
    assert found
    assert float(found[1]) <= 5
    assert float(found[2]) >= 90
    assert int(found[3]) >= 200
    assert answer == "1984-07-04"
