"""From `type:` in the config to the format of one dataset."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from axolotl.data.formats.fields import suggestion
from axolotl.data.formats.registry import Format, as_builder, formats
from axolotl.data.formats.tokenized import COLUMNS as TOKENIZED
from axolotl.data.formats.user_defined import user_defined
from axolotl.errors import ConfigError, Place, Problem

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry

_SHAREGPT = """\
Write instead:
    type: chat_template
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value"""


def resolve_format(
    entry: DatasetEntry, columns: list[str] | tuple[str, ...], data: DataSection, place: Place | None = None
) -> Format:
    """The format of a dataset whose rows have these columns. `place`: where its `type` stands.

    Raises ConfigError for a type that is not known, not available, or cannot be built from the entry's options.
    """
    if set(TOKENIZED) <= set(columns):
        return _built("tokenized", None, entry, data)
    problem = check_type(entry, place)
    if problem is None and entry.type is None:
        problem = Problem(
            "this dataset has no `type`, and its rows do not come tokenised (no `input_ids` and `labels`).",
            suggestion(columns, entry) or "Set `type`, for example `type: chat_template`.",
            "missing",
            places=(place,) if place else (),
        )
    if problem is not None:
        raise ConfigError(problem)
    try:
        match entry.type:
            case str(kind):
                name, _, style = kind.partition(":")
                return (
                    _built(name, style or None, entry, data) if name in formats else _own(kind, entry, data)
                )
            case mapping:
                assert mapping is not None  # told above
                return user_defined(mapping, data)
    except ConfigError as error:
        raise _placed(error, place) from error


def check_type(entry: DatasetEntry, place: Place | None = None) -> Problem | None:
    """What is wrong with the `type` of an entry, told without importing any format, nor the user's module."""
    if not isinstance(entry.type, str):
        return None
    places = (place,) if place else ()
    kind = entry.type
    name, _, style = kind.partition(":")
    if name.partition(".")[0] == "sharegpt":
        return Problem(
            f"`{kind}` is gone: `chat_template` reads such rows.", _SHAREGPT, "removed", places=places
        )
    if style.startswith("load"):
        return Problem(
            f"`{kind}` is not a known dataset type.", f"Did you mean `{name}.{style}`?", places=places
        )
    if name in formats:
        facts = formats.describe(name).facts
        if "unavailable" in facts:
            return Problem(
                f"the dataset type `{name}` is known, but not available yet: {facts['unavailable']}",
                kind="unavailable",
                places=places,
            )
        if style and not facts.get("styles"):
            return Problem(
                f"the dataset type `{name}` has no styles, so `:{style}` means nothing.",
                f"Write `type: {name}`.",
                places=places,
            )
        return None
    built = [n for n in formats.names() if "unavailable" not in formats.describe(n).facts]
    family = name.partition(".")[0]
    if family in formats:
        variants = [n for n in built if n.startswith(family + ".") or n == family]
        return Problem(
            f"`{kind}` is not a known dataset type.", f"Known: {', '.join(variants)}.", places=places
        )
    if ":" not in kind and (_stands_here(family) or ("." in kind and _installed(family))):
        return None
    near = difflib.get_close_matches(name, built, n=1, cutoff=0.6)
    known = [n for n in built if "." not in n and not n.startswith("_")]
    remedy = (f"Did you mean `{near[0]}`? " if near else "") + f"Known: {', '.join(known)}."
    if "." in kind:
        remedy = f"There is no Python module `{family}` either. {remedy}"
    return Problem(f"`{kind}` is not a known dataset type.", remedy, places=places)


def _built(name: str, style: str | None, entry: DatasetEntry, data: DataSection) -> Format:
    build = formats.get(name)
    facts = formats.describe(name).facts
    options: dict[str, Any] = {"style": style} if facts.get("styles") else {}
    built = build(entry, data, **options)
    if isinstance(built, Format):
        return built
    return Format(name, built, tuple(facts.get("requires", ())), tuple(facts.get("optional", ())))


def _placed(error: ConfigError, place: Place | None) -> ConfigError:
    if place is None:
        return error
    return ConfigError([p if p.places else replace(p, places=(place,)) for p in error.problems])


def _stands_here(module: str) -> bool:
    """Whether the current folder has a module of this name."""
    here = Path.cwd()
    return (here / f"{module}.py").is_file() or (here / module / "__init__.py").is_file()


def _installed(module: str) -> bool:
    try:
        return (Path.cwd() / module).is_dir() or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _own(kind: str, entry: DatasetEntry, data: DataSection) -> Format:
    """The format of the user's own module: `pkg.mod` with a function `load`, or `pkg.mod.function`."""
    module, function = _imported(kind)
    if kind in formats:  # the import registered it under this very name
        return _built(kind, None, entry, data)
    if function is None:
        function = "load"
        if not hasattr(module, function):
            raise ConfigError(
                f"the module `{kind}` has no function `load`.",
                f"Add it, or name one of its functions: `type: {kind}.<function>`.",
            )
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"the module `{module.__name__}` has no function `{function}`.", "Correct `type`.")
    facts: dict[str, Any] = next(
        (
            entered.facts
            for entered in map(formats.describe, formats.names())
            if entered.module == module.__name__
            and getattr(formats.get(entered.name), "__wrapped__", None) is found
        ),
        {},
    )
    built = as_builder(found, kind)(entry, data)
    if isinstance(built, Format):
        return built
    return Format(kind, built, tuple(facts.get("requires", ())), tuple(facts.get("optional", ())))


def _imported(kind: str) -> tuple[ModuleType, str | None]:
    """The user's module, and the function named after it where `kind` goes on."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    owner, _, function = kind.rpartition(".")
    for module, rest in ((kind, None), (owner, function)) if owner else ((kind, None),):
        try:
            return importlib.import_module(module), rest
        except ModuleNotFoundError as error:
            # A module that the user's own module fails to find is the user's to hear about.
            if not (error.name and (module == error.name or module.startswith(error.name + "."))):
                raise ConfigError(
                    f"`{module}`, named in `type`, cannot be imported: {error}.", "Install what it needs."
                ) from error
        except Exception as error:
            raise ConfigError(
                f"`{module}`, named in `type`, cannot be imported: {type(error).__name__}: {error}.",
                "Correct the module.",
            ) from error
    raise ConfigError(
        f"there is no Python module `{owner or kind}`.", "Correct `type`, or start from the module's folder."
    )
