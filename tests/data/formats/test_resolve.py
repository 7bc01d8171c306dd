"""From `type:` to a format: names and their mistakes, the user's own module, columns that do not fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from axolotl.config.data import DataSection, DatasetEntry
from axolotl.data.formats import Format, check_fields, check_type, formats, register_format, resolve_format
from axolotl.data.formats.fields import suggestion
from axolotl.data.types import Completion, Conversation, Message, Piece, Pieces, Tokenized
from axolotl.errors import ConfigError, Place

PLACE = Place("config.yml", 7, 5)


def resolve(kind: Any, columns: list[str] | None = None, **entry: Any) -> Format:
    return resolve_format(
        DatasetEntry.model_validate({"type": kind, **entry}), columns or ["some"], DataSection(), PLACE
    )


def refused(kind: Any, columns: list[str] | None = None, **entry: Any) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        resolve(kind, columns, **entry)
    (problem,) = caught.value.problems
    assert problem.places == (PLACE,)
    return problem.message, problem.remedy


def test_every_registered_type_builds_or_says_why_not() -> None:
    for name in formats.names():
        if "unavailable" in formats.describe(name).facts:
            message, _ = refused(name)
            assert message.startswith(f"the dataset type `{name}` is known, but not available yet: ")
        else:
            assert resolve(name).required_fields


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from axolotl.data.formats import formats; [formats.get(n) for n in formats]; "
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("kind", "message", "remedy"),
    [
        ("alpacca", "`alpacca` is not a known dataset type.", "Did you mean `alpaca`?"),
        ("chat_templat", "`chat_templat` is not a known dataset type.", "Did you mean `chat_template`?"),
        ("sharegpt", "`sharegpt` is gone", "field_messages: conversations"),
        ("sharegpt.load_role", "`sharegpt.load_role` is gone", "role: from"),
        ("sharegpt:chat", "`sharegpt:chat` is gone", "type: chat_template"),
        (
            "alpaca_chat:load_qa",
            "`alpaca_chat:load_qa` is not a known dataset type.",
            "Did you mean `alpaca_chat.load_qa`?",
        ),
        ("alpaca_chat.load_q", "`alpaca_chat.load_q` is not a known dataset type.", "Known: alpaca_chat, "),
        ("completion:chat", "has no styles", "Write `type: completion`."),
        ("alpaca:vicuna", "`vicuna` is not a known prompt style.", "instruct, chat, chatml, phi"),
        (
            "no_such_package.fmt",
            "`no_such_package.fmt` is not a known dataset type.",
            "no Python module `no_such_package`",
        ),
    ],
)
def test_wrong_names(kind: str, message: str, remedy: str) -> None:
    told, helped = refused(kind)
    assert message in told
    assert remedy in helped


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("chatml.ultra", "learns from pairs"),
        ("llama3.icr", "learns from pairs"),
        ("chat_template.argilla", "learns from pairs"),
        ("bradley_terry.llama3", "reward models"),
        ("ebft_pretrain.transform", "energy-based"),
    ],
)
def test_types_of_methods_that_are_not_built_are_known(kind: str, why: str) -> None:
    problem = check_type(DatasetEntry(type=kind), PLACE)
    assert problem is not None
    assert problem.kind == "unavailable"
    assert why in problem.message


def test_only_what_trains_is_offered() -> None:
    for kind in ("chatml", "chat_template.argila", "zephyr.necta"):
        _, remedy = refused(kind)
        assert "ultra" not in remedy and "argilla" not in remedy and "nectar" not in remedy


def test_a_type_is_checked_without_importing_it() -> None:
    assert check_type(DatasetEntry(type="alpaca:chat")) is None
    assert check_type(DatasetEntry(type=None)) is None
    problem = check_type(DatasetEntry(type="alpacca"), PLACE)
    assert problem is not None
    assert problem.places == (PLACE,)


def test_no_type() -> None:
    message, remedy = refused(None, ["messages"])
    assert "has no `type`" in message
    assert "`type: chat_template`" in remedy
    assert resolve(None, ["input_ids", "labels"]).name == "tokenized"


def test_fields_follow_the_options() -> None:
    assert resolve("completion", field="body").required_fields == ("body",)
    assert resolve("chat_template", field_messages="chat").required_fields == ("chat",)
    mapping = {"field_instruction": "q", "field_output": "a"}
    assert resolve(mapping).required_fields == ("q", "a")


@pytest.mark.parametrize(
    ("kind", "columns", "wanted", "remedy"),
    [
        ("alpaca", ["messages"], "needs `instruction`, `output`", "`type: chat_template`"),
        ("chat_template", ["instruction", "input", "output"], "needs `messages`", "`type: alpaca`"),
        ("chat_template", ["conversations"], "needs `messages`", "field_messages: conversations"),
        ("alpaca", ["text"], "needs `instruction`, `output`", "`type: completion`"),
        ("alpaca", ["prompt", "completion"], "needs `instruction`, `output`", "field_instruction: prompt"),
        ("completion", ["content"], "needs `text`", "field: content"),
        ("explainchoice", ["question", "choices"], "needs `solution` or `explanation`", "mapping"),
        ("alpaca", ["x"], "Found: `x`.", "Name the columns with a mapping"),
    ],
)
def test_columns_that_do_not_fit(kind: str, columns: list[str], wanted: str, remedy: str) -> None:
    entry = DatasetEntry(type=kind, path="data.jsonl")
    problem = check_fields(resolve_format(entry, columns, DataSection()), columns, entry, PLACE)
    assert problem is not None
    assert wanted in problem.message
    assert "`data.jsonl`" in problem.message
    assert remedy in problem.remedy
    assert problem.places == (PLACE,)


def test_columns_that_fit() -> None:
    entry = DatasetEntry(type="explainchoice")
    columns = ["question", "choices", "explanation"]
    assert check_fields(resolve_format(entry, columns, DataSection()), columns, entry) is None


def test_suggestions_prefer_the_plainest_type() -> None:
    assert suggestion(["instruction", "input", "output"]).endswith("`type: alpaca`.")
    assert suggestion(["text", "id"]).endswith("`type: completion`.")
    assert suggestion(["segments"]).endswith("`type: input_output`.")
    assert suggestion(["nothing", "known"]) == ""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """module("name", source) writes a module into the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    written: list[str] = []

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_own_module(module: Any) -> None:
    module(
        "own_format",
        """
from axolotl.data.types import Completion

def load(entry, data):
    def convert(row):
        return Completion(row["a"] * data.sequence_len)
    return convert

def plain(row):
    return {"messages": [{"role": "human", "content": row["a"]}, {"role": "gpt", "content": row["b"]}]}

def number(row):
    return 3

def three(a, b, c):
    pass

value = 4
""",
    )
    data = DataSection(sequence_len=2)
    built = resolve_format(DatasetEntry(type="own_format"), ["a"], data)
    assert built.convert({"a": "x"}) == Completion("xx")
    assert resolve("own_format.load").name == "own_format.load"
    chat = resolve("own_format.plain").convert({"a": "Q", "b": "A"})
    assert chat == Conversation([Message("user", "Q"), Message("assistant", "A")])
    with pytest.raises(ConfigError, match="returned int for a row"):
        resolve("own_format.number").convert({})
    assert "has no function `nope`" in refused("own_format.nope")[0]
    assert "is a function of 3 arguments" in refused("own_format.three")[0]
    assert "has no function `value`" in refused("own_format.value")[0]


def test_mistakes_of_own_modules_are_told_as_theirs(module: Any) -> None:
    module("needs_other", "import surely_not_installed")
    message, _ = refused("needs_other")
    assert (
        "`needs_other`, named in `type`, cannot be imported: No module named 'surely_not_installed'"
        in message
    )
    module("is_broken", "1 / 0")
    assert "ZeroDivisionError" in refused("is_broken")[0]
    module("without_load", "")
    assert "has no function `load`" in refused("without_load")[0]


def test_registered_by_a_plugin() -> None:
    @register_format("test_plugin_pairs", requires=["left", "right"])
    def pairs(row: dict[str, Any]) -> Pieces:
        return Pieces([Piece(row["left"], False, bos=True), Piece(row["right"], True, eos=1)])

    @register_format("test_plugin_tokens")
    def tokens(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [1], "labels": [1]}

    chosen = resolve("test_plugin_pairs")
    assert (chosen.name, chosen.required_fields) == ("test_plugin_pairs", ("left", "right"))
    assert pairs({"left": "a", "right": "b"}) == chosen.convert({"left": "a", "right": "b"})
    assert resolve("test_plugin_tokens").convert({}) == Tokenized([1], [1])


def test_registered_in_own_module(module: Any) -> None:
    module(
        "registers_itself",
        """
from axolotl.data.formats import register_format

@register_format("registers_itself.sums", requires=["a"])
def sums(row):
    return {"text": row["a"]}
""",
    )
    chosen = resolve("registers_itself.sums")
    assert chosen.required_fields == ("a",)
    assert chosen.convert({"a": "1+1"}) == Completion("1+1")
