"""What the docs say about keys: the docstring below each field, read from the source when it is asked for.

Pydantic could collect them at import; that would cost every command a tenth of a second.
"""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from axolotl.config.complaints import expected
from axolotl.config.keys import owner, owners
from axolotl.config.old_keys import ALIASES, BITSANDBYTES, CHOICES, LEFTOVER, REMOVED, RENAMED
from axolotl.config.section import facts


@functools.cache
def _documented(file: str) -> dict[str, dict[str, str]]:
    """The docstring of every attribute of every class of a source file."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ClassDef):
            continue
        mine = found.setdefault(node.name, {})
        for field, after in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                mine[field.target.id] = " ".join(after.value.value.split())
    return found


def meaning(model: type[BaseModel], key: str) -> str:
    """The one line that says what a field means; empty where none is written."""
    for kind in model.__mro__:
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if file and issubclass(kind, BaseModel) and kind is not BaseModel:
            text = _documented(file).get(kind.__name__, {}).get(key)
            if text:
                return text
    return ""


def state(model: type[BaseModel], key: str) -> str:
    """available, validated (loads, cannot run yet), unavailable, or idle (without effect)."""
    return str(facts(model, key).get("state", "available"))


def type_of(model: type[BaseModel], key: str) -> str:
    """The values that a field takes, in words."""
    field = model.model_fields[key]
    return expected(field.annotation, field.metadata)


def old_keys() -> dict[str, tuple[str, str]]:
    """Every key of old: its state (alias, renamed, removed, leftover) and what to know about it."""
    special = {
        "fsdp": ("renamed", "`fsdp_config`"),
        "gc_steps": ("renamed", "`torch_empty_cache_steps` and `gc_collect_steps`"),
        "save_safetensors": ("leftover", "weights are always saved as safetensors; false is refused"),
    }
    return dict(
        sorted(
            {
                **{old: ("alias", f"`{new}`") for old, new in ALIASES.items()},
                **{old: ("renamed", f"`{new}`") for old, new in RENAMED.items()},
                **{old: ("renamed", f"`bnb_config_kwargs.{old}`") for old in BITSANDBYTES},
                **{old: ("alias", f"`{new}: {value}`") for old, (new, value) in CHOICES.items()},
                **{old: ("removed", remedy) for old, remedy in REMOVED.items()},
                **{old: ("leftover", reason) for old, reason in LEFTOVER.items()},
                **special,
            }.items()
        )
    )


def default_text(value: Any) -> str:
    """A default in words."""
    return (
        "not set"
        if value is None or value == []
        else ("true" if value is True else "false" if value is False else str(value))
    )


def every_key() -> list[tuple[str, type[BaseModel]]]:
    """All top-level keys with their sections, by section and in the order of the source."""
    return [(key, owner(key)) for key in owners()]
