"""Reading YAML with the place of every key and value, safely: bounded in size, depth and number of values.

The language is YAML 1.1 as people's files have it (`yes` and `on` are true), with `1e-4` a number and dates plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from axolotl.config.secrets import masked
from axolotl.config.yaml_faults import explain
from axolotl.errors import ConfigError, Kind, Place, Problem

MAX_BYTES = 2_000_000
MAX_DEPTH = 50
MAX_VALUES = 50_000

Path = tuple[str | int, ...]

_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE = {"true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"}
_FALSE = {"false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"}
_INT = re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0o[0-7_]+|[0-9][0-9_]*)$")
_FLOAT = re.compile(r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a key and its value stand, and the value as it was written (for numbers that are meant as text)."""

    key: Place
    value: Place
    written: str | None = None


@dataclass
class Document:
    """The values of one source, with the spot of each by its path, and the source's lines."""

    name: str
    values: dict[Any, Any] = field(default_factory=dict)
    spots: dict[Path, Spot] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def excerpt(self, place: Place) -> str:
        """The line of a place with a caret below it."""
        return excerpt(self.lines, place)


def excerpt(lines: list[str], place: Place) -> str:
    """One line with its number, and a caret below the place's column. Empty where the place has no line."""
    if place.line is None or not 0 < place.line <= len(lines):
        return ""
    start = max(0, (place.column or 1) - 80)
    text = masked(lines[place.line - 1].rstrip("\n\r"))[start : start + 120].replace("\t", " ")
    number = f"{place.line:>5} | "
    column = (place.column or 1) - start
    return f"{number}{text}\n{' ' * (len(number) - 2)}| {' ' * (column - 1)}^"


def scalar(text: str) -> Any:
    """The value of an unquoted YAML scalar: None, bool, int, float or str."""
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _INT.match(text):
        digits = text.replace("_", "")
        try:
            if digits.lstrip("+-")[:2] in ("0b", "0x", "0o"):
                return int(digits, 0)
            return int(digits) if len(digits) < 400 else text
        except ValueError:
            return text
    if _FLOAT.match(text):
        try:
            return float(text.replace("_", ""))
        except ValueError:
            return text
    if _SPECIAL.match(text):
        return float(text.lower().replace(".", ""))
    return text


def _syntax(message: str, remedy: str, place: Place, lines: list[str], kind: Kind = "syntax") -> ConfigError:
    return ConfigError(Problem(message, remedy, kind, (), (place,), excerpt(lines, place)))


def decode(raw: bytes, name: str) -> str:
    """The text of a config file. Raises ConfigError for anything that is not plain UTF-8 text of a sane size."""
    if len(raw) > MAX_BYTES:
        message = f"{name} is larger than {MAX_BYTES // 1_000_000} MB."
        raise ConfigError(Problem(message, "Is this the right file?", "syntax", (), (Place(name),)))
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ConfigError(
            Problem(f"{name} is UTF-16 text.", "Save it as UTF-8.", "syntax", (), (Place(name, 1),))
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8", "replace")
        place = Place(name, before.count("\n") + 1, len(before) - before.rfind("\n"))
        message = f"{name} is not UTF-8 text: byte 0x{raw[error.start]:02x} cannot stand here."
        raise ConfigError(Problem(message, "Save the file as UTF-8.", "syntax", (), (place,))) from None
    found = _CONTROL.search(text)
    if found:
        before = text[: found.start()]
        place = Place(name, before.count("\n") + 1, len(before) - before.rfind("\n"))
        message = f"A control character (U+{ord(found.group()):04X}) stands in {name}."
        raise ConfigError(Problem(message, "Delete it; is this a text file?", "syntax", (), (place,)))
    return text


@dataclass(slots=True, eq=False)
class _Node:
    """A value as it stands in the text: a scalar's text, a list of nodes, or a list of (key, value) nodes."""

    kind: str
    line: int
    column: int
    content: Any
    plain: bool = True


def _events(text: str) -> Iterator[Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.parse(text, Loader=loader)


def _compose(text: str, name: str, lines: list[str]) -> _Node | None:
    """The tree of one YAML document, built without recursion."""
    root: _Node | None = None
    stack: list[_Node] = []
    anchors: dict[str, _Node] = {}
    documents = count = 0

    def place(event: Any) -> Place:
        return Place(name, event.start_mark.line + 1, event.start_mark.column + 1)

    for event in _events(text):
        kind = type(event).__name__
        if kind == "DocumentStartEvent":
            documents += 1
            if documents > 1:
                raise _syntax(
                    "A config is one YAML document; here a second begins.",
                    "Put it into a file of its own.",
                    place(event),
                    lines,
                )
        elif kind in ("SequenceEndEvent", "MappingEndEvent"):
            stack.pop()
        elif kind in ("AliasEvent", "ScalarEvent", "SequenceStartEvent", "MappingStartEvent"):
            count += 1
            if count > MAX_VALUES:
                raise _syntax(
                    f"The file holds more than {MAX_VALUES} values.",
                    "Is this the right file?",
                    place(event),
                    lines,
                )
            mark = event.start_mark
            if kind == "AliasEvent":
                if event.anchor not in anchors:
                    raise _syntax(
                        f"`*{event.anchor}` names an anchor that is not defined above.",
                        f"Define it with `&{event.anchor}`.",
                        place(event),
                        lines,
                    )
                node = anchors[event.anchor]
                if node in stack:
                    raise _syntax(
                        f"`*{event.anchor}` stands inside the value that it names.",
                        "Write the value out.",
                        place(event),
                        lines,
                    )
                # The alias's own position serves errors better than the anchor's.
                node = _Node(node.kind, mark.line, mark.column, node.content, node.plain)
            else:
                tag = event.tag
                if tag not in (None, "!") and not (
                    tag.startswith("tag:yaml.org,2002:") and tag[18:] in _TAGS
                ):
                    raise _syntax(
                        f"The tag `{tag}` has no place in a config.", "Delete the tag.", place(event), lines
                    )
                if kind == "ScalarEvent":
                    plain = bool(event.implicit[0]) and not event.style
                    if tag is not None:
                        plain = tag[18:] not in ("str", "") and tag != "!"
                    node = _Node("scalar", mark.line, mark.column, event.value, plain)
                else:
                    node = _Node(
                        "list" if kind == "SequenceStartEvent" else "map", mark.line, mark.column, []
                    )
                if event.anchor:
                    anchors[event.anchor] = node
            if not stack:
                root = node
            elif stack[-1].kind == "list":
                stack[-1].content.append(node)
            elif stack[-1].content and len(stack[-1].content[-1]) == 1:
                stack[-1].content[-1].append(node)
            else:
                stack[-1].content.append([node])
            if kind in ("SequenceStartEvent", "MappingStartEvent"):
                stack.append(node)
                if len(stack) > MAX_DEPTH:
                    raise _syntax(
                        f"The file is nested deeper than {MAX_DEPTH} levels.",
                        "Is this the right file?",
                        place(event),
                        lines,
                    )
    return root


_TAGS = ("str", "int", "float", "bool", "null", "seq", "map")


class _Construction:
    """Turns the tree into Python values, noting the spot of each and every key that stands twice."""

    def __init__(self, document: Document) -> None:
        self.document, self.count = document, 0

    def place(self, node: _Node) -> Place:
        return Place(self.document.name, node.line + 1, node.column + 1)

    def fail(self, message: str, remedy: str, node: _Node) -> ConfigError:
        return _syntax(message, remedy, self.place(node), self.document.lines)

    def value(self, node: _Node, path: Path, depth: int = 0) -> Any:
        self.count += 1
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            raise self.fail(
                "The aliases of this file unfold to too many values.", "Write fewer aliases.", node
            )
        if node.kind == "scalar":
            return scalar(node.content) if node.plain else node.content
        if node.kind == "list":
            values = []
            for index, item in enumerate(node.content):
                at = (*path, index)
                self.spot(at, item, item)
                values.append(self.value(item, at, depth + 1))
            return values
        return self.mapping(node, path, depth)

    def spot(self, path: Path, key: _Node, value: _Node) -> None:
        written = value.content if value.kind == "scalar" else None
        self.document.spots[path] = Spot(self.place(key), self.place(value), written)

    def mapping(self, node: _Node, path: Path, depth: int) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        seen: dict[Any, _Node] = {}
        merged: list[_Node] = []
        for key_node, value_node in node.content:
            if key_node.kind != "scalar":
                raise self.fail("A key has to be a word.", "Write `key: value`.", key_node)
            if key_node.plain and key_node.content == "<<":
                merged += value_node.content if value_node.kind == "list" else [value_node]
                continue
            key = scalar(key_node.content) if key_node.plain else key_node.content
            if key is None or isinstance(key, bool | float):
                key = key_node.content
            if key in seen:
                self.duplicate(key, seen[key], key_node, path)
                continue
            seen[key] = key_node
            at = (*path, key)
            self.spot(at, key_node, value_node)
            values[key] = self.value(value_node, at, depth + 1)
        for each in merged:
            if each.kind != "map":
                raise self.fail(
                    "`<<` merges mappings only.", "Write `<<: *name` with the name of a mapping.", each
                )
            before = dict(self.document.spots)
            for key, value in self.mapping(each, path, depth + 1).items():
                if key not in values:
                    values[key] = value
            self.document.spots.update(before)
        return values

    def duplicate(self, key: Any, first: _Node, second: _Node, path: Path) -> None:
        whole = dotted((*path, key))
        places = (self.place(second), self.place(first))
        self.document.problems.append(
            Problem(
                f"`{whole}` stands twice: in line {first.line + 1} and in line {second.line + 1}.",
                "Keep one of them.",
                "duplicate_key",
                (whole,),
                places,
                self.document.excerpt(places[0]),
            )
        )


def dotted(path: Path) -> str:
    """A path as people write it: `datasets[0].path`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def undotted(key: str) -> Path:
    """The path of `datasets[0].path` or `datasets.0.path`."""
    parts = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    return tuple(int(p) if p.isdigit() and i else p for i, p in enumerate(parts))


def parse_value(text: str, name: str) -> Any:
    """One YAML value, as an override carries it. Raises ConfigError where it is not YAML."""
    document = Document(name, lines=[text])
    node = _parsed(text, name, document.lines)
    return None if node is None else _Construction(document).value(node, ())


def _parsed(text: str, name: str, lines: list[str]) -> _Node | None:
    try:
        return _compose(text, name, lines)
    except yaml.YAMLError as error:
        fault = explain(error, name, lines)
        shown = excerpt(lines, fault.places[0])
        raise ConfigError(Problem(fault.message, fault.remedy, "syntax", (), fault.places, shown)) from None


def parse(text: str, name: str) -> Document:
    """The keys, values and places of one config file. Raises ConfigError when it is not a YAML mapping."""
    lines = text.splitlines()
    document = Document(name, lines=lines)
    node = _parsed(text, name, lines)
    empty = node is None or (node.kind == "scalar" and node.plain and scalar(node.content) is None)
    if node is None or empty:
        raise ConfigError(
            Problem(
                f"{name} is empty.",
                "A config holds at least `base_model:` and `datasets:`.",
                "syntax",
                (),
                (Place(name, 1),),
            )
        )
    if node.kind != "map":
        what = "list" if node.kind == "list" else "text"
        raise _syntax(
            f"A config is a mapping of keys to values; {name} is a {what}.",
            "Write one `key: value` per line.",
            Place(name, node.line + 1, node.column + 1),
            lines,
        )
    document.values = _Construction(document).value(node, ())
    for key in [k for k in document.values if not isinstance(k, str)]:
        document.values[str(key)] = document.values.pop(key)
        for path in [p for p in document.spots if p[0] == key]:
            document.spots[(str(key), *path[1:])] = document.spots.pop(path)
    return document
