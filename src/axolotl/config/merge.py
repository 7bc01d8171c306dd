"""Files and overrides merged into one document, each value with the place that it came from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from axolotl.config.fetch import read_source
from axolotl.config.keys import kinds_at, owner, owners
from axolotl.config.section import off
from axolotl.config.yaml_file import Document, Spot, dotted, excerpt, parse_value, scalar, undotted
from axolotl.config.yaml_file import Path as KeyPath
from axolotl.errors import ConfigError, Place, Problem

Source = str | Path
Overrides = Mapping[str, Any] | Sequence[Any]


class Merged:
    """The merged document, the layer (file or override) that each key came from, and the problems so far."""

    def __init__(self) -> None:
        self.document = Document("")
        self.layers: dict[str, int] = {}
        self.lines: dict[str, list[str]] = {}
        self.problems: list[Problem] = []
        self.sources: list[Path] = []
        self.bad: set[str] = set()
        self.typed: dict[str, str] = {}
        """Keys that the user wrote by an old name, and that name."""

    def excerpt(self, place: Place) -> str:
        return excerpt(self.lines.get(place.file, []), place)

    def add(self, problem: Problem) -> None:
        """Notes a problem, told in the user's words, with its excerpt where it has none."""
        if problem.fatal:
            self.bad.update(str(undotted(k)[0]) for k in problem.keys)
        problem = _by_old_names(_as_typed(problem), self.typed)
        if not problem.excerpt and problem.places:
            problem = Problem(
                problem.message,
                problem.remedy,
                problem.kind,
                problem.keys,
                problem.places,
                self.excerpt(problem.places[0]),
            )
        self.problems.append(problem)

    def read(self, source: Source, layer: int) -> None:
        """Merges one file over what was read before."""
        try:
            document = read_source(source)
        except ConfigError as error:
            self.problems += error.problems
            return
        self.sources.append(Path(document.name))
        self.lines[document.name] = document.lines
        for problem in document.problems:
            self.add(problem)
        for key, value in document.values.items():
            self.put((key,), value, document.spots, layer)

    def put(self, path: KeyPath, value: Any, spots: Mapping[KeyPath, Spot], layer: int) -> None:
        """Sets a value: mappings merge key by key, anything else replaces what was there."""
        here: Any = self.document.values
        for part in path[:-1]:
            here = here[part]
        old = here.get(path[-1]) if isinstance(here, dict) else None
        self.layers[str(path[0])] = layer
        if isinstance(old, dict) and isinstance(value, dict):
            if path in spots:
                self.document.spots[path] = spots[path]
            for key, inner in value.items():
                self.put((*path, key), inner, spots, layer)
            return
        for each in [p for p in self.document.spots if p[: len(path)] == path]:
            del self.document.spots[each]
        for each, spot in spots.items():
            if each[: len(path)] == path:
                self.document.spots[each] = spot
        here[path[-1]] = value

    def override(self, key: str, text: Any, flag: str, layer: int) -> None:
        """Applies `--key text` as it was typed (or a Python value from a mapping of overrides)."""
        place = Place(flag)
        path = tuple(p.replace("-", "_") if isinstance(p, str) else p for p in undotted(key))
        try:
            value = self.override_value(path, text, flag)
        except ConfigError as error:
            why = error.problems[0].message
            return self.add(
                Problem(
                    f"The value of `{flag}` cannot be read: {why}",
                    "Quote it.",
                    "syntax",
                    (dotted(path),),
                    (place,),
                )
            )
        spots: dict[KeyPath, Spot] = {}

        def note(at: KeyPath, each: Any) -> None:
            written = text if isinstance(text, str) and at == path else None
            spots[at] = Spot(place, place, written if not isinstance(each, dict | list) else None)
            items = (
                each.items() if isinstance(each, dict) else enumerate(each) if isinstance(each, list) else ()
            )
            for name, inner in items:
                note((*at, name), inner)

        note(path, value)
        here: Any = self.document.values
        for index, part in enumerate(path[:-1]):
            following: Any = [] if isinstance(path[index + 1], int) else {}
            if isinstance(here, list):
                if not isinstance(part, int) or part > len(here):
                    return self.add(self.misplaced(flag, path[: index + 1], len(here)))
                if part == len(here):
                    here.append(following)
                here = here[part]
            elif isinstance(here, dict):
                if here.get(part) is None:
                    here[part] = following
                    self.document.spots.setdefault(path[: index + 1], Spot(place, place))
                here = here[part]
            if not isinstance(here, dict | list):
                at = dotted(path[: index + 1])
                return self.add(
                    Problem(
                        f"`{flag}` reaches into `{at}`, which is not a mapping or list.",
                        f"Set `{at}` as a whole.",
                        "invalid_value",
                        (at,),
                        (place,),
                    )
                )
        if isinstance(here, list):
            last = path[-1]
            if not isinstance(last, int) or last > len(here):
                return self.add(self.misplaced(flag, path, len(here)))
            if last == len(here):
                here.append(None)
        self.put(path, value, spots, layer)
        return None

    @staticmethod
    def override_value(path: KeyPath, text: Any, flag: str) -> Any:
        """The value of an override's text: as it stands where only text can be meant, else as YAML."""
        if not isinstance(text, str):
            return text
        if kinds_at(path) == [str]:
            value = scalar(text)
            unset = value is None or (
                value is False
                and len(path) == 1
                and path[0] in owners()
                and off(owner(str(path[0])), str(path[0]), value)
            )
            return None if unset else text
        return parse_value(text, flag)

    @staticmethod
    def misplaced(flag: str, path: KeyPath, length: int) -> Problem:
        return Problem(
            f"`{flag}` names an item that is not there: `{dotted(path[:-1])}` has {length} items.",
            "Items are counted from 0.",
            "invalid_value",
            (dotted(path),),
            (Place(flag),),
        )


def _as_typed(problem: Problem) -> Problem:
    """A problem of an override, told with the flag that the user typed."""
    flag = problem.places[0].file if problem.places else ""
    if not flag.startswith("--"):
        return problem
    message = problem.message
    if problem.kind == "missing" and flag.startswith("--no-"):
        return problem  # what is missing is the key, which the flag unsets
    for key in problem.keys:
        word = str(undotted(key)[-1])
        for name in (key, word):
            message = message.replace(f"`{name}`", f"`{flag}`")
        break
    remedy = problem.remedy
    if problem.kind == "unknown_key" and remedy.startswith("Did you mean"):
        stem = flag.rpartition(".")[0] + "." if "." in flag else "--no-" if flag.startswith("--no-") else "--"
        remedy = re.sub(r"`(\w+)`", lambda found: f"`{stem}{found[1].replace('_', '-')}`", remedy)
    return replace(problem, message=message, remedy=remedy)


def _by_old_names(problem: Problem, typed: Mapping[str, str]) -> Problem:
    """A problem of a key that was written by an old name, told with that name."""
    if not typed.keys() & set(problem.keys):
        return problem
    message = problem.message
    for key in problem.keys:
        if key in typed:
            message = message.replace(f"`{key}`", f"`{typed[key]}`")
    return replace(problem, message=message, keys=tuple(typed.get(k, k) for k in problem.keys))


def override_parts(overrides: Overrides | None) -> Iterable[tuple[str, Any, str, str]]:
    """Key, value, how the user wrote it, and what is wrong with the way it is written."""
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            yield key, value, f"override of {key}", ""
        return
    for each in overrides or ():
        key, text, *rest = each
        flag = rest[0] if rest else "--" + str(key).replace("_", "-")
        yield key, text, flag, rest[1] if len(rest) > 1 else ""
