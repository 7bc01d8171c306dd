"""Registries: a feature is a file that registers itself, found by name without importing the others.

A registry belongs to one folder of the package. Names, aliases and declared facts are read from the source of that
folder (the decorator's literal arguments), so that a config can be checked against them before torch is imported;
`get` imports the one file that holds the feature. Plugins register at import time with the same decorator.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from axolotl.errors import ConfigError, EnvironmentProblem, Problem

T = TypeVar("T")
PACKAGE_ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Entry:
    """What a feature declares about itself: its names, its file, and the literal facts given to the decorator."""

    name: str
    module: str
    facts: dict[str, Any] = field(default_factory=dict)


class Registry(Generic[T]):
    """Named features of one kind.

    `what` is the word that error messages use ("optimizer"); `folder` is the dotted package whose files register;
    `variable` is the name by which those files call the registry, as in `@optimizers.register("lion", extra="...")`.
    """

    def __init__(self, what: str, folder: str, variable: str) -> None:
        self.what, self.folder, self.variable = what, folder, variable
        self._loaded: dict[str, T] = {}
        self._declared: dict[str, Entry] = {}
        self._scanned = False

    def register(self, name: str, *aliases: str, **facts: Any) -> Callable[[T], T]:
        """Decorator: enters a feature under `name` (and its aliases). Built-in features use literal arguments only."""

        def enter(feature: T) -> T:
            module = getattr(feature, "__module__", "")
            for each in (name, *aliases):
                self._loaded[each] = feature
                self._declared.setdefault(each, Entry(name, module, facts))
            return feature

        return enter

    def _scan(self) -> None:
        """Reads the decorators of the folder's files, importing none of them."""
        if self._scanned:
            return
        self._scanned = True
        folder = PACKAGE_ROOT.joinpath(*self.folder.split(".")[1:])
        for file in sorted(folder.glob("*.py")):
            source = file.read_text(encoding="utf-8")
            if f"{self.variable}.register(" not in source:
                continue
            module = self.folder if file.stem == "__init__" else f"{self.folder}.{file.stem}"
            for node in ast.walk(ast.parse(source)):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr == "register"
                    and isinstance(node.func.value, ast.Name)
                    and node.func.value.id == self.variable
                ):
                    names = [ast.literal_eval(a) for a in node.args]
                    facts = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg}
                    for each in names:
                        self._declared.setdefault(each, Entry(names[0], module, facts))

    def names(self) -> list[str]:
        """Every name and alias, sorted."""
        self._scan()
        return sorted(self._declared)

    def __contains__(self, name: str) -> bool:
        self._scan()
        return name in self._declared

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def describe(self, name: str) -> Entry:
        """What the feature declares about itself. Raises ConfigError for an unknown name."""
        self._scan()
        if name not in self._declared:
            raise ConfigError(f"`{name}` is not a known {self.what}.", self.suggest(name))
        return self._declared[name]

    def suggest(self, name: str) -> str:
        """The remedy for an unknown name: the nearest one, and all there are."""
        near = difflib.get_close_matches(name, self.names(), n=1, cutoff=0.6)
        hint = f"Did you mean `{near[0]}`? " if near else ""
        return f"{hint}Known: {', '.join(self.names())}."

    def forget(self, name: str) -> None:
        """Takes out a feature that was registered at run time."""
        self._loaded.pop(name, None)
        self._declared.pop(name, None)

    def get(self, name: str) -> T:
        """The feature itself; imports its file. Raises ConfigError for an unknown name."""
        if name not in self._loaded:
            importlib.import_module(self.describe(name).module)
        return self._loaded[name]


def missing_extra(module: str, extra: str, purpose: str, *keys: str) -> list[Problem]:
    """The problem of an optional package that is not installed: what needs it, and the extra; none where it is there.

    `keys` are those of the config that ask for it.
    """
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is not None:
        return []
    return [
        Problem(
            f"{purpose} needs the package `{package}`, which is not installed.",
            f"Install it with: pip install 'axolotl[{extra}]'",
            "environment",
            keys,
            code="AX1404",
        )
    ]


def require_extra(module: str, extra: str, purpose: str, *keys: str) -> Any:
    """Imports an optional dependency. Raises EnvironmentProblem naming the extra to install.

    The one place where an import stands inside a function outside `cli/`.
    """
    missing = missing_extra(module, extra, purpose, *keys)
    if missing:
        raise EnvironmentProblem(missing)
    return importlib.import_module(module)
