"""A string that remembers which of its characters came from which part of a conversation.

Chat templates are programs: they trim, split, slice and join the texts of messages. Rendering a conversation whose
texts are `Traced` gives, in one pass, the rendered text and the exact origin of each of its characters. That origin is
what the loss mask is made of, so that no second render and no text search is needed.

A run is (start, end, tag): characters start..end-1 came from the source numbered `tag`. Runs are sorted and disjoint.
An empty string keeps one empty run, so that the place of an empty message is known as well.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex

Runs = tuple[tuple[int, int, int], ...]


class Traced(str):
    """A `str` with `runs`; every operation that templates use on text keeps them."""

    __slots__ = ("runs",)
    runs: Runs

    def __new__(cls, text: str, runs: Runs) -> Traced:
        self = super().__new__(cls, text)
        self.runs = runs
        return self

    @classmethod
    def whole(cls, text: str, tag: int) -> Traced:
        """All of `text` from the one source `tag`."""
        return cls(text, ((0, len(text), tag),))

    @property
    def tag(self) -> int:
        """The source that stands for all of it where its characters cannot be told apart: the one entered last.

        Ranges that are trained are entered before those of the same text that are not, so that what mixes is masked.
        """
        return max(tag for *_, tag in self.runs)

    def _cut(self, start: int, end: int) -> Traced:
        """Characters start..end-1, with their runs."""
        text = str.__getitem__(self, slice(start, end))
        runs = self.runs
        if len(runs) == 1:
            a, b, tag = runs[0]
            return Traced(text, ((max(a, start) - start, max(min(b, end), start) - start, tag),))
        kept = [(max(a, start) - start, min(b, end) - start, t) for a, b, t in runs if a < end and b > start]
        return Traced(text, tuple(kept) or ((0, 0, runs[0][2]),))

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> Traced:
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> Traced:
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> Traced:
        return concat([self] * int(times))

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        return _same(str.__mod__(self, values), self)

    def __getitem__(self, index: Any) -> str:
        if isinstance(index, slice):
            start, end, step = index.indices(len(self))
            if step == 1:
                return self._cut(start, max(start, end))
            return _same(str.__getitem__(self, index), self)
        start = operator.index(index)
        text = str.__getitem__(self, start)
        start = start if start >= 0 else len(self) + start
        return self._cut(start, start + len(text))

    def __iter__(self) -> Any:
        return (self._cut(i, i + 1) for i in range(len(self)))

    def strip(self, chars: str | None = None, /) -> Traced:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> Traced:
        left = len(self) - len(str.lstrip(self, chars))
        return self._cut(left, len(self)) if left else self

    def rstrip(self, chars: str | None = None, /) -> Traced:
        right = len(str.rstrip(self, chars))
        return self._cut(0, right) if right != len(self) else self

    def removeprefix(self, prefix: str, /) -> Traced:
        return self._cut(len(prefix), len(self)) if prefix and self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> Traced:
        return self._cut(0, len(self) - len(suffix)) if suffix and self.endswith(suffix) else self

    def _located(self, parts: Iterable[str]) -> list[Any]:
        """`parts` are pieces of this string in order, as `split` gives them; here with their runs."""
        found: list[Any] = []
        at = 0
        for part in parts:
            at = self.index(part, at)
            found.append(self._cut(at, at + len(part)))
            at += len(part)
        return found

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        if sep is None:
            return self._located(str.split(self, None, maxsplit))
        found: list[Any] = []
        at = 0
        for part in str.split(self, sep, maxsplit):
            found.append(self._cut(at, at + len(part)))
            at += len(part) + len(sep)
        return found

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        if sep is None:
            return self._located(str.rsplit(self, None, maxsplit))
        found: list[Any] = []
        at = 0
        for part in str.rsplit(self, sep, maxsplit):
            found.append(self._cut(at, at + len(part)))
            at += len(part) + len(sep)
        return found

    def splitlines(self, keepends: bool = False) -> list[str]:
        found: list[Any] = []
        at = 0
        for line in str.splitlines(self, True):
            kept = line if keepends else line.splitlines()[0]
            found.append(self._cut(at, at + len(kept)))
            at += len(line)
        return found

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        at = self.find(sep)
        if at < 0:
            return self, "", ""
        return self._cut(0, at), self._cut(at, at + len(sep)), self._cut(at + len(sep), len(self))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        at = self.rfind(sep)
        if at < 0:
            return "", "", self
        return self._cut(0, at), self._cut(at, at + len(sep)), self._cut(at + len(sep), len(self))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Traced:
        if not old or old not in self:
            return self if old else _same(str.replace(self, old, new, count), self)
        parts: list[str] = []
        for i, part in enumerate(self.split(old, count)):
            if i:
                # what replaces a text of the source is of that source
                parts.append(new if isinstance(new, Traced) else Traced.whole(new, self.runs[0][2]))
            parts.append(part)
        return concat(parts)

    def join(self, parts: Iterable[Any], /) -> Traced:
        return join(self, parts)

    def upper(self) -> str:
        return _same(str.upper(self), self)

    def lower(self) -> str:
        return _same(str.lower(self), self)

    def title(self) -> str:
        return _same(str.title(self), self)

    def capitalize(self) -> str:
        return _same(str.capitalize(self), self)

    def format(self, *args: Any, **kwargs: Any) -> str:
        return _same(str.format(self, *args, **kwargs), self)


def _same(text: str, source: Traced) -> Traced:
    """A text made from `source` in a way that loses places: character by character if the length is kept, else whole."""
    if len(text) == len(source):
        return Traced(str(text), source.runs)
    return Traced.whole(str(text), source.tag)


def concat(parts: Iterable[Any]) -> Any:
    """`"".join(parts)`, keeping runs; a plain `str` where no part is traced."""
    parts = [p if isinstance(p, str) else str(p) for p in parts]
    text = "".join(parts)
    runs: list[tuple[int, int, int]] = []
    at = 0
    for part in parts:
        if type(part) is Traced:
            for a, b, tag in part.runs:
                if runs and runs[-1][1] == a + at and runs[-1][2] == tag:
                    runs[-1] = (runs[-1][0], b + at, tag)
                else:
                    runs.append((a + at, b + at, tag))
        at += len(part)
    return Traced(text, tuple(runs)) if runs else text


def join(separator: str, parts: Iterable[Any]) -> Any:
    """`separator.join(parts)`, keeping runs."""
    woven: list[Any] = []
    for i, part in enumerate(parts):
        if i and separator:
            woven.append(separator)
        woven.append(part)
    return concat(woven)


def find_tag(value: Any) -> int | None:
    """The tag that stands for the first traced text inside a nested value; None where there is none."""
    if type(value) is Traced:
        return value.tag
    if isinstance(value, dict):
        for pair in value.items():
            for each in pair:
                if (tag := find_tag(each)) is not None:
                    return tag
    elif isinstance(value, (list, tuple)):
        for each in value:
            if (tag := find_tag(each)) is not None:
                return tag
    return None


def trace(value: Any, tag: int) -> Any:
    """A copy of a nested value in which every text, keys included, is traced to `tag`."""
    if isinstance(value, str):
        return Traced.whole(value, tag)
    if isinstance(value, dict):
        return {trace(k, tag): trace(v, tag) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [trace(v, tag) for v in value]
    return value
