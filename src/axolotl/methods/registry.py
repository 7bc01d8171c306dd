"""The registry of training methods, and what a method is: a value that tells the engine what differs from the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from axolotl.config.method import MethodSection
from axolotl.errors import Problem
from axolotl.registry import Registry


def _no_options(method: MethodSection) -> Mapping[str, Any]:
    return {}


def _no_problems(method: MethodSection) -> list[Problem]:
    return []


@dataclass(frozen=True)
class Method:
    """A way to train. The engine puts its own mixin on `trainer`, so that batches, saving and logging are the same."""

    name: str
    trainer: str
    """Dotted name of the trainer class: transformers', or one of TRL's."""
    arguments: str
    """Dotted name of the class of its arguments."""
    extra: str | None = None
    """The extra that brings the package of these classes."""
    columns: tuple[str, ...] = ("input_ids", "labels")
    """Columns of a prepared row."""
    own_batches: bool = True
    """Rows are tokens with labels: our plan, collators and token-weighted loss apply."""
    packs: bool = True
    """Rows may be packed."""
    options: Callable[[MethodSection], Mapping[str, Any]] = _no_options
    """Further arguments, from the method's keys."""
    check: Callable[[MethodSection], list[Problem]] = _no_problems
    """What is wrong with the method's keys."""


methods: Registry[Method] = Registry("training method", "axolotl.methods", "methods")


def method_of(section: MethodSection) -> Method:
    """The method that the config asks for; supervised fine-tuning where it names none."""
    return methods.get(section.rl or "sft")
