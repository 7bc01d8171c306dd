"""YAML of all kinds: values as people mean them, places of everything, and a clear word about what is no YAML."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.config import load_config
from axolotl.config.keys import owners
from axolotl.config.old_keys import OLD_KEYS
from axolotl.config.yaml_file import decode, dotted, parse, parse_value, undotted
from axolotl.errors import ConfigError, Problem

CORPUS = sorted((Path(__file__).parent / "garbage").iterdir())


def problem_of(text: str | bytes) -> Problem:
    with pytest.raises(ConfigError) as caught:
        parse(decode(text.encode() if isinstance(text, str) else text, "c.yml"), "c.yml")
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", True),
        ("off", False),
        ("True", True),
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        ("5.0e-05", 5e-5),
        (".5", 0.5),
        ("-3", -3),
        ("1_000", 1000),
        ("0x10", 16),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-05-01", "2024-05-01"),
        ("1:30", "1:30"),
        ("12e", "12e"),
        ("y", "y"),
        ("'yes'", "yes"),
        ('"1"', "1"),
        ("!!str 1", "1"),
        ('!!float "1"', 1),
        ("[a, 1, {b: no}]", ["a", 1, {"b": False}]),
        ("train[:500]", "train[:500]"),
        ("<|end|>", "<|end|>"),
    ],
)
def test_scalars_mean_what_people_mean(text: str, value: object) -> None:
    found = parse_value(text, "c.yml")
    assert found == value
    assert type(found) is type(value) or text.startswith("!!float")


def test_places_of_keys_values_and_items() -> None:
    document = parse("a: 1\nb:\n  - path: x\n    n: {deep: [3, 4]}\n", "c.yml")
    spots = {dotted(path): (str(spot.key), str(spot.value)) for path, spot in document.spots.items()}
    assert spots["a"] == ("c.yml:1:1", "c.yml:1:4")
    assert spots["b[0].path"] == ("c.yml:3:5", "c.yml:3:11")
    assert spots["b[0].n.deep[1]"] == ("c.yml:4:19", "c.yml:4:19")


def test_paths_are_written_and_read_back() -> None:
    for text in ("datasets[0].path", "trl.beta", "a[1][2].b", "lora_r"):
        assert dotted(undotted(text)) == text
    assert undotted("datasets.0.path") == ("datasets", 0, "path")


def test_merge_keys_fill_what_is_not_written() -> None:
    text = "base: &b {x: 1, y: 2}\nmore: &m {y: 5, z: 6}\nlist: {<<: [*b, *m], y: 3}\n"
    assert parse(text, "c.yml").values["list"] == {"x": 1, "y": 3, "z": 6}
    assert parse(text, "c.yml").spots[("list", "y")].value.line == 3


def test_a_key_that_stands_twice_is_told_with_both_lines() -> None:
    [problem] = parse("lora_r: 8\na: 1\nlora_r: 16\n", "c.yml").problems
    assert problem.kind == "duplicate_key"
    assert [str(p) for p in problem.places] == ["c.yml:3:1", "c.yml:1:1"]
    assert "line 1" in problem.message
    assert "line 3" in problem.message


@pytest.mark.parametrize(
    ("text", "kind", "line", "word"),
    [
        ("a: 1\n\tb: 2\n", "syntax", 2, "tab"),
        ("a:\n\t- b\n", "syntax", 2, "tab"),
        ("a: b: c\n", "syntax", 1, "quote"),
        ("a: [1, 2\nb: 3\n", "syntax", 1, "bracket"),
        ("a: 1\nb: 'x\nc: 3\n", "syntax", 2, "quote"),
        ("a: 1\nb 2\nc: 3\n", "syntax", 2, "colon"),
        ("a: 1\nb:2\nc: 3\n", "syntax", 2, "space behind"),
        ("a:\n  - b: 1\n   c: 2\n", "syntax", 3, "same column"),
        ("a: 1\n: 2\n", "syntax", 2, "key"),
        ("a: 1\n b: 2\n", "syntax", 2, ""),
        ("- a\n- b\n", "syntax", 1, "list"),
        ("just words\n", "syntax", 1, "text"),
        ("", "syntax", 1, "empty"),
        ("# only a comment\n", "syntax", 1, "empty"),
        ("---\n", "syntax", 1, "empty"),
        ("a: 1\n---\nb: 2\n", "syntax", 2, "second"),
        ("a: \x00\n", "syntax", 1, "U+0000"),
        ("a: *nope\n", "syntax", 1, "anchor"),
        ("a: &x [*x]\n", "syntax", 1, "inside"),
        ("a: !!python/object:os.system x\n", "syntax", 1, "tag"),
        ("? [a, b]\n: 1\n", "syntax", 1, "word"),
        ("a: {<<: 3}\n", "syntax", 1, "<<"),
        ("[" * 100_000, "syntax", 1, "nested"),
        ("a:\n" + "".join(" " * i + "- \n" for i in range(1, 80)), "syntax", None, ""),
    ],
)
def test_what_is_no_config_is_told(text: str, kind: str, line: int | None, word: str) -> None:
    problem = problem_of(text)
    assert problem.kind == kind
    assert problem.places[0].file == "c.yml"
    assert line is None or problem.places[0].line == line
    assert word.lower() in f"{problem.message} {problem.remedy}".lower()


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"\xff\xfea\x00", "UTF-16"),
        (b"a: \xe9\n", "UTF-8"),
        (b"x" * 10_000_000, "MB"),
        (b"\x89PNG\r\n", "UTF-8"),
    ],
)
def test_other_files_are_told(raw: bytes, word: str) -> None:
    assert word in problem_of(raw).message


def test_a_byte_order_mark_is_no_part_of_the_first_key() -> None:
    assert parse(decode(b"\xef\xbb\xbfa: 1\n", "c.yml"), "c.yml").values == {"a": 1}


def bomb(width: int, depth: int) -> str:
    lines = ["a0: &a0 [" + ", ".join("x" * width) + "]"]
    lines += [f"a{i}: &a{i} [" + ", ".join(f"*a{i - 1}" for _ in range(width)) + "]" for i in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text", [bomb(9, 9), bomb(2, 45), "a: " + "- " * 60, "".join(f"k{i}: 1\n" for i in range(60_000))]
)
def test_bombs_end_within_a_second(text: str) -> None:
    start = time.process_time()
    assert problem_of(text).kind == "syntax"
    assert time.process_time() - start < 1


def problems_of(source: Path, overrides: dict[str, object] | None = None) -> tuple[Problem, ...]:
    """The problems of a config that may be garbage; any other exception is a failure."""
    try:
        return load_config(source, overrides).warnings
    except ConfigError as error:
        return error.problems


def outcome(text: str, folder: Path) -> None:
    """Loading garbage either works or tells problems with a message, quickly."""
    file = folder / "g.yml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    start = time.process_time()
    found = problems_of(file)
    assert time.process_time() - start < 2
    assert all(problem.message and str(problem) for problem in found)


@pytest.mark.parametrize("file", CORPUS, ids=lambda f: f.name)
def test_garbage_that_once_did_harm(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert all(problem.message for problem in caught.value.problems)


LINES = st.sampled_from(
    [
        "base_model: x",
        "datasets:",
        "  - path: a",
        "    type: alpaca",
        "learning_rate: 1e-4",
        "a: &a",
        "b: *a",
        "<<: *a",
        "- ",
        "lora_r: [",
        "x: {y: ",
        "? k",
        "!!set {a}",
        "trl: {beta: {}}",
        "fsdp_config: [1]",
        "special_tokens: 3",
        "datasets: {path: x}",
        "plugins: 5",
        "datasets: [null, 3, [], {}]",
        "fsdp: [1]",
        "gc_steps: x",
        "adapter: [lora]",
        "chat_template: {}",
        "datasets: [{type: {field_input: {}}}]",
        "flash_attention: {}",
        "dataset_processes: [a]",
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(LINES | st.text(max_size=20), max_size=12))
def test_lines_thrown_together(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    outcome("\n".join(lines), tmp_path_factory.getbasetemp())


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_any_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    outcome(text, tmp_path_factory.getbasetemp())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_value_under_any_key(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from([*owners(), *sorted(OLD_KEYS)]), max_size=5))
    file = tmp_path_factory.getbasetemp() / "v.yml"
    file.write_text("base_model: x\n")
    found = problems_of(file, {key: data.draw(VALUES) for key in keys})
    assert all(problem.message and (problem.places or problem.kind == "missing") for problem in found)
