"""Replacing what modules of one model do: never a class, never a module of transformers, and everything can be undone.

A replacement is an attribute of the instance, so another model in the same process is not touched, and the names and
numbers of the weights stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from torch import nn

_MISSING = object()


class Replacements:
    """What was replaced in a model, and how to undo it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """Modules by what was done to them."""
        self._undo: list[Callable[[], None]] = []

    def forward(self, module: nn.Module, function: Callable[..., Any], what: str = "") -> None:
        """Gives one module another forward, `function(module, ...)`."""
        before = module.__dict__.get("forward", _MISSING)
        mine = MethodType(function, module)
        module.forward = mine  # type: ignore[method-assign]

        def undo() -> None:
            if module.__dict__.get("forward") is not mine:
                return
            if before is _MISSING:
                del module.forward
            else:
                module.forward = before  # type: ignore[method-assign,assignment]

        self._undo.append(undo)
        if what:
            self.counts[what] += 1

    def undoing(self, action: Callable[[], None]) -> None:
        """Something else to be done when the replacements go."""
        self._undo.append(action)

    def undo(self) -> None:
        """The model as it was. Safe to call twice."""
        while self._undo:
            self._undo.pop()()
        self.counts.clear()


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the module's class, called on this module, whatever replaced it."""
    return MethodType(type(module).forward, module)


def with_global(function: Callable[..., Any], name: str, value: Any) -> FunctionType | None:
    """A copy of a plain function that sees `value` under a global name; None where the function does not use it.

    The module that defines the function keeps its own.
    """
    if not isinstance(function, FunctionType) or name not in function.__code__.co_names:
        return None
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, name: value},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__ = function.__qualname__
    return copy
