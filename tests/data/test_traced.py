"""Traced strings: every operation gives the text that `str` gives, and each character keeps its origin."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from axolotl.data.traced import Traced, concat, find_tag, join, trace

TEXT = st.text(alphabet="ab \n<é|", max_size=12)


def origins(value: str) -> list[int | None]:
    """The tag of each character; None where it has none."""
    found: list[int | None] = [None] * len(value)
    if isinstance(value, Traced):
        for start, end, tag in value.runs:
            found[start:end] = [tag] * (end - start)
    return found


@st.composite
def woven(draw: st.DrawFn) -> Traced:
    """Characters that know their origin: the tag of each is its own code point, so places can be told apart."""
    pieces = draw(st.lists(TEXT, min_size=1, max_size=4))
    made = concat([Traced.whole(p, 0) if i % 2 == 0 else p for i, p in enumerate(pieces)])
    return Traced(str.__str__(made), tuple((i, i + 1, i) for i in range(len(made))) or ((0, 0, 0),))


def check_slice(result: str, source: Traced) -> None:
    """A result that is a stretch of the source keeps the tags of just those characters."""
    assert isinstance(result, Traced)
    tags = list(origins(result))
    assert all(source[t] == c for t, c in zip(tags, result, strict=True) if t is not None)
    if len(tags) > 1:
        assert tags == list(range(tags[0] or 0, (tags[0] or 0) + len(tags)))


@given(woven(), st.sampled_from([None, " ", "a", " \n"]))
def test_strips_are_those_of_str_and_keep_origins(text: Traced, chars: str | None) -> None:
    plain = "".join(list(str.__str__(text)))
    for name in ("strip", "lstrip", "rstrip"):
        result = getattr(text, name)(chars)
        assert result == getattr(plain, name)(chars)
        check_slice(result, text)


@given(woven(), st.sampled_from([None, " ", "a", "\n", "<|"]), st.integers(-1, 3))
def test_splits_are_those_of_str_and_keep_origins(text: Traced, sep: str | None, limit: int) -> None:
    plain = str.__add__("", text)
    for name in ("split", "rsplit"):
        result = getattr(text, name)(sep, limit)
        assert result == getattr(plain, name)(sep, limit)
        for part in result:
            check_slice(part, text)
    assert text.splitlines() == plain.splitlines() and text.splitlines(True) == plain.splitlines(True)
    if sep:
        assert text.partition(sep) == plain.partition(sep) and text.rpartition(sep) == plain.rpartition(sep)


@given(woven(), st.integers(-14, 14), st.integers(-14, 14))
def test_slices_are_those_of_str_and_keep_origins(text: Traced, start: int, stop: int) -> None:
    plain = str.__add__("", text)
    assert text[start:stop] == plain[start:stop]
    check_slice(text[start:stop], text)
    if -len(text) <= start < len(text):
        assert text[start] == plain[start]
        assert origins(text[start]) == [start % len(text)]


@given(woven(), TEXT, TEXT)
def test_concatenation_shifts_origins(text: Traced, left: str, right: str) -> None:
    result = left + text + right
    assert result == left + str.__add__("", text) + right
    assert origins(result)[len(left) : len(left) + len(text)] == list(range(len(text)))
    assert origins(result)[: len(left)] == [None] * len(left)
    assert join(left, [text, text]) == left.join([text, text])


@given(woven(), st.sampled_from(["a", "b", " ", "<|"]), TEXT)
def test_replace_keeps_the_origin_of_what_stays(text: Traced, old: str, new: str) -> None:
    result = text.replace(old, new)
    assert result == str.replace(text, old, new)
    if old not in text:
        check_slice(result, text)


def test_nested_values_are_traced_through_json_keys_and_values() -> None:
    value = trace({"city": ["Oslo", 3]}, 7)
    assert find_tag(value) == 7 and json.dumps(value) == '{"city": ["Oslo", 3]}'
    assert find_tag({"plain": [1, "x"]}) is None
