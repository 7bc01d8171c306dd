"""What pydantic found wrong, told in our words: the key, the value got, the values allowed."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ValidationError

from axolotl.config.examples import example
from axolotl.config.keys import SYNONYMS, block_at, did_you_mean, distance, field_at, nearest, nested, owners
from axolotl.config.old_keys import ALIASES, OLD_KEYS, RENAMED
from axolotl.config.secrets import is_secret, masked
from axolotl.config.section import Also, members
from axolotl.config.yaml_file import Document, Path, Spot, dotted
from axolotl.errors import Kind, Problem

_VARIABLE = re.compile(r"\$\{?\w+(:-[^}]*)?\}?")
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping"}

# What keys of one block are called in another.
IN_BLOCKS = {"field": ("text_column",), "text_column": ("field",)}
_MANY = 24

# What people who write this value usually want.
HINTS = {
    "resume_from_checkpoint": "Name the checkpoint's folder; `auto_resume_from_checkpoints: true` takes the newest one.",
    "datasets": "Write a list, one entry per dataset: `- path: ...` and `type: ...` below it.",
    "test_datasets": "Write a list, one entry per dataset: `- path: ...` and `type: ...` below it.",
}


def expected(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """The values that a field takes, in words: "a whole number above 0"."""
    metadata = tuple(metadata)
    further = [each.words for each in metadata if isinstance(each, Also) and each.words]
    if further:
        rest = [each for each in metadata if not isinstance(each, Also)]
        return " or ".join([expected(annotation, rest), *further])
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return expected(args[0], (*args[1:], *metadata))
    limits = _limits(metadata)
    if origin in (Union, types.UnionType):
        parts = [expected(a) for a in args if a is not type(None)]
        if len(parts) > 1 and {"a whole number", "a number"} <= set(parts):
            parts.remove("a whole number")
        return " or ".join(dict.fromkeys(parts)) + limits
    if origin is Literal:
        return (
            " or ".join(f"`{a}`" for a in args)
            if len(args) < 3
            else "one of " + ", ".join(f"`{a}`" for a in args)
        )
    if origin in (list, tuple):
        return "a list of " + _plural(expected(args[0])) if origin is list else "a list"
    if origin is dict:
        return "a mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a mapping with keys such as " + ", ".join(f"`{k}`" for k in list(annotation.model_fields)[:4])
    return _WORDS.get(annotation, "a value") + limits


def _plural(text: str) -> str:
    for one, many in (
        ("a mapping", "mappings"),
        ("a whole number", "whole numbers"),
        ("a number", "numbers"),
        ("a list", "lists"),
        ("text", "texts"),
    ):
        if text.startswith(one):
            return many + text[len(one) :]
    return text


def _limits(metadata: Iterable[Any]) -> str:
    low = next((m for m in metadata if isinstance(m, Gt | Ge)), None)
    high = next((m.le for m in metadata if isinstance(m, Le)), None)
    if low is None and high is None:
        return ""
    if isinstance(low, Ge) and high is not None:
        return f" from {low.ge} to {high}"
    if isinstance(low, Gt):
        return f" above {low.gt}"
    return f" of {low.ge} or more" if low is not None else f" of {high} or less"


def show(value: Any) -> str:
    """A value as the user wrote it, cut short."""
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    text = text or (value if isinstance(value, str) else repr(value))
    text = masked(text)
    return text if len(text) <= 60 else text[:57] + "..."


class Complaints:
    """Turns errors of a section into problems with places and remedies."""

    def __init__(self, document: Document, spot_excerpt: Any) -> None:
        self.document, self.excerpt = document, spot_excerpt
        # Looking for the nearest key takes milliseconds; a file of garbage would take minutes.
        self.guesses = 40
        self.meant: set[str] = set()
        """Keys that unknown ones were probably meant to be."""

    def spot(self, path: Path) -> Spot | None:
        while path:
            if path in self.document.spots:
                return self.document.spots[path]
            path = path[:-1]
        return None

    def problem(self, kind: Kind, message: str, remedy: str, path: Path, *, at_key: bool = False) -> Problem:
        spot = self.spot(path)
        places = () if spot is None else (spot.key if at_key else spot.value,)
        return Problem(
            message, remedy, kind, (dotted(path),), places, self.excerpt(places[0]) if places else ""
        )

    def translate(
        self, model: type[BaseModel], values: dict[str, Any], error: ValidationError
    ) -> Iterator[Problem]:
        """One problem for each place that is wrong, however many branches of a union complained about it."""
        found: dict[Path, str] = {}
        for each in error.errors(include_url=False, include_input=False):
            path = self.data_path(values, each["loc"], each["type"])
            found[path] = "" if each["type"] != "value_error" else str(each.get("msg", ""))
            if each["type"] in ("extra_forbidden", "missing"):
                found[path] = each["type"]
        for path in list(found):
            # A deeper complaint explains a shallower one.
            if any(len(p) > len(path) and p[: len(path)] == path for p in found):
                del found[path]
        for path, kind in found.items():
            if kind == "extra_forbidden":
                yield self.unknown(path, block_at(model, path[:-1]))
            elif kind == "missing":
                yield self.problem("missing", f"`{dotted(path)}` is missing.", f"Add `{path[-1]}:`.", path)
            else:
                yield self.invalid(model, values, path, kind.removeprefix("Value error, "))

    @staticmethod
    def data_path(values: Any, loc: tuple[int | str, ...], kind: str) -> Path:
        """The part of pydantic's location that leads through the data (the rest names branches of unions)."""
        path: list[int | str] = []
        here = values
        for index, part in enumerate(loc):
            last = index == len(loc) - 1
            if isinstance(here, dict) and (part in here or (last and kind == "missing")):
                here = here.get(part)
            elif isinstance(here, list) and isinstance(part, int) and part < len(here):
                here = here[part]
            else:
                continue
            path.append(part)
        return tuple(path)

    def invalid(self, model: type[BaseModel], values: dict[str, Any], path: Path, said: str = "") -> Problem:
        value: Any = values
        for part in path:
            value = value[part]
        spot = self.spot(path)
        got = spot.written if spot and spot.written and not isinstance(value, dict | list) else show(value)
        if isinstance(value, dict | list):
            got = "a mapping" if isinstance(value, dict) else "a list"
        else:
            got = f"`{masked(got)}`"
        if is_secret(str(path[-1])):
            got = "a value that is not shown"
        known = field_at(model, path)
        takes = expected(*known) if known else "another value"
        remedy = ""
        if known and isinstance(value, str):
            choices = [str(a) for k in members(known[0]) if get_origin(k) is Literal for a in get_args(k)]
            remedy = did_you_mean(nearest(value, choices))
        if known and isinstance(value, str) and takes.startswith("a list of texts") and "," not in value:
            name = f"{path[-1]}: [{got.strip('`')}]" if isinstance(path[-1], str) else f"- [{got.strip('`')}]"
            remedy = f"Write `{name}`."
        if path[0] in HINTS and len(path) == 2 and isinstance(value, str):
            remedy = f"Write `- path: {got.strip('`')}`, and `type:` below it."
        if path == ("warmup_steps",) and isinstance(value, float) and 0 < value < 1:
            remedy = f"Write `warmup_ratio: {got.strip('`')}` for a share of all steps."
        if value is None and isinstance(path[-1], int):
            remedy = "Delete the empty `-`, or fill it in."
        if path[0] in HINTS and len(path) == 1:
            remedy = HINTS[str(path[0])]
        if isinstance(value, str) and _VARIABLE.fullmatch(value):
            remedy = "Write the value itself: variables of the environment stand for paths and names alone."
        shown = example(model, path)
        remedy = remedy or f"Write {takes}" + (f", such as `{path[-1]}: {shown}`." if shown else ".")
        why = f": {said}." if said else f"; it takes {takes}."
        return self.problem("invalid_value", f"`{dotted(path)}` is {got}{why}", remedy, path)

    def unknown(self, path: Path, block: type[BaseModel] | None = None) -> Problem:
        """A key that does not exist where it stands: the nearest that does, or where it belongs."""
        self.guesses -= 1
        if self.guesses < 0:
            at = f"a key of `{dotted(path[:-1])}`" if block else "a known key"
            return self.problem("unknown_key", f"`{path[-1]}` is not {at}.", "Delete it.", path, at_key=True)
        word, where = str(path[-1]), dotted(path[:-1])
        inside = list(block.model_fields) if block else []
        top = owners()
        homes = [n for n in nested() if n.key == word]
        parent = "".join("[]" if isinstance(p, int) else f".{p}" for p in path[:-1]).lstrip(".")
        remedy = ""
        if block is not None:
            near = [each for each in IN_BLOCKS.get(word, ()) if each in inside] or nearest(word, inside)
            below = [h.parent for h in homes if h.parent.startswith(parent + ".")]
            if word in top:
                remedy = f"`{word}` belongs at the top level of the file, not inside `{where}`."
            elif below:
                remedy = f"`{word}` belongs inside `{below[0]}`."
            elif near:
                remedy = did_you_mean(near)
            else:
                known = ", ".join(f"`{k}`" for k in inside)
                few = f"Known here: {known}."
                remedy = few if len(inside) <= _MANY else f"`axolotl explain {path[0]}` lists the keys."
            return self.problem(
                "unknown_key", f"`{word}` is not a key of `{where}`.", remedy, path, at_key=True
            )
        synonym = SYNONYMS.get(word.lower().replace("-", "_"))
        near = (
            [synonym] if synonym else nearest(word, [*top, *OLD_KEYS], [str(k) for k in self.document.values])
        )
        near = list(dict.fromkeys((ALIASES | RENAMED).get(key, key) for key in near))
        if homes and (not near or all(len(word) <= 4 for _ in near)):
            places = " or ".join(dict.fromkeys(f"`{h.parent}`" for h in homes[:3]))
            remedy = f"`{word}` belongs inside {places}."
        elif near:
            remedy = did_you_mean(near)
            self.meant.update(near)
        else:
            limit = 1 if len(word) <= 8 else 2
            homes = [n for n in nested() if len(word) > 4 and distance(word.lower(), n.key, limit) <= limit]
            if homes:
                remedy = f"Did you mean `{homes[0].key}` inside `{homes[0].parent}`?"
        remedy = remedy or "Delete it, or look it up with `axolotl explain`."
        return self.problem("unknown_key", f"`{word}` is not a known key.", remedy, path, at_key=True)
