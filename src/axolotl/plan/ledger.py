"""Counts what a rehearsal does: every block of memory from its first use to its last, every operation with its cost.

The rehearsal runs on fake tensors, which have shapes and number types but no content. Each has a storage all the same,
and the storage of a tensor that nobody needs any more goes away at the same moment as it would on a GPU. So the sum of
what is alive is what `torch.cuda.max_memory_allocated` would show.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

BLOCK_BYTES = 512
"""CUDA's allocator hands out memory in multiples of this."""

_MATMULS = {"aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten._grouped_mm"}
_EIGHT_BIT = "aten._scaled_mm"
_FREE = ("aten.empty", "aten.new_empty", "aten.detach")


@dataclass
class Work:
    """What one stretch of a rehearsal computes: all operations of one kind and size together."""

    kind: str
    """`matmul`, `fp8 matmul`, `attention`, `packed attention` or `memory` (bound by reading and writing)."""
    flops: float
    moved: float
    """Bytes read and written by one operation."""
    smallest: int
    """The smallest of the sizes of a matrix product; 0 for other kinds."""
    count: int = 0


@dataclass(frozen=True)
class Peak:
    """The moment at which most memory is in use."""

    total: int
    phase: str
    by_category: dict[str, int]


@dataclass
class Usage:
    """Bytes alive now and at most, by what they are for."""

    live: int = 0
    by_category: Counter[str] = field(default_factory=Counter)
    peak: Peak = field(default_factory=lambda: Peak(0, "", {}))
    by_phase: dict[str, int] = field(default_factory=dict)
    """The most bytes alive in each phase."""


@dataclass
class Account:
    """What was computed, by phase: kinds of work, and the number of operations that start something on the device."""

    work: dict[str, dict[tuple[str, float, float, int], Work]] = field(default_factory=dict)
    operations: Counter[str] = field(default_factory=Counter)


class Ledger(TorchDispatchMode):
    """A dispatch mode that books every operation below it. Enter it inside FakeTensorMode.

    `category` says what new memory is for; `phase` names the part of the step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.usage = Usage()
        self.category, self.phase = "temporary", "start"
        self.account = Account()
        self._blocks: dict[int, tuple[int, str]] = {}

    # Memory

    def book(self, tensor: torch.Tensor) -> None:
        """Counts the memory of a tensor, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks:
            return
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self._blocks[key] = (size, self.category)
        usage = self.usage
        usage.live += size
        usage.by_category[self.category] += size
        self._note_peak()
        weakref.finalize(storage, self._free, key)

    def _note_peak(self) -> None:
        usage = self.usage
        if usage.live > usage.peak.total:
            usage.peak = Peak(usage.live, self.phase, dict(usage.by_category))
        if usage.live > usage.by_phase.get(self.phase, 0):
            usage.by_phase[self.phase] = usage.live

    def _free(self, key: int) -> None:
        size, category = self._blocks.pop(key)
        self.usage.live -= size
        self.usage.by_category[category] -= size

    def move(self, tensor: torch.Tensor, category: str) -> None:
        """Books the memory of a tensor under another category."""
        key = tensor.untyped_storage()._cdata
        size, before = self._blocks.get(key, (0, ""))
        if size and before != category:
            self._blocks[key] = (size, category)
            self.usage.by_category[before] -= size
            self.usage.by_category[category] += size

    def begin_anew(self) -> None:
        """Forgets the peak and the operations so far; what is alive stays."""
        before = self.usage
        self.usage = Usage(before.live, before.by_category)
        self.account = Account()
        self._note_peak()

    @contextmanager
    def during(self, phase: str, category: str | None = None) -> Iterator[None]:
        """Names the phase of what happens inside, and the category of new memory."""
        before = self.phase, self.category
        self.phase, self.category = phase, category or self.category
        try:
            yield
        finally:
            self.phase, self.category = before

    def rename(self, before: str, category: str) -> None:
        """Books all that is alive in one category under another."""
        for key, (size, named) in self._blocks.items():
            if named == before:
                self._blocks[key] = (size, category)
        self.usage.by_category[category] += self.usage.by_category.pop(before, 0)

    # Operations

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        results = [out] if isinstance(out, torch.Tensor) else _tensors(out)
        if results:
            self._count(function, args, kwargs, results)
        for tensor in results:
            self.book(tensor)
        return out

    def _count(self, function: Any, args: Any, kwargs: Any, results: list[torch.Tensor]) -> None:
        name, free = _described(function)
        if free:
            return
        inputs = _tensors((args, kwargs))
        moved = float(sum(_bytes(t) for t in inputs) + sum(_bytes(t) for t in results))
        if not moved:
            return
        self.account.operations[self.phase] += 1
        if name == _EIGHT_BIT:
            left, right = inputs[:2]
            rows, inner, columns = left.shape[0], left.shape[1], right.shape[1]
            self.add("fp8 matmul", 2.0 * rows * inner * columns, moved, min(rows, inner, columns))
        elif name in _MATMULS:
            left, right = [t for t in inputs if t.dim() >= 2][-2:]
            rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
            batch = left.shape[0] if left.dim() == 3 else 1
            self.add("matmul", 2.0 * batch * rows * inner * columns, moved, min(rows, inner, columns))
        else:
            self.add("memory", 0.0, moved)

    def add(self, kind: str, flops: float, moved: float, smallest: int = 0) -> None:
        """Counts one operation of the present phase."""
        table = self.account.work.setdefault(self.phase, {})
        key = (kind, flops, moved, smallest)
        if key not in table:
            table[key] = Work(kind, flops, moved, smallest)
        table[key].count += 1


@functools.cache
def _described(function: Any) -> tuple[str, bool]:
    """Name of an operation without its overload, and whether it moves no memory."""
    name = str(function).rsplit(".", 1)[0]
    return name, bool(function.is_view) or name.startswith(_FREE) or name == "aten._unsafe_view"


def _tensors(value: Any) -> list[torch.Tensor]:
    return [t for t in tree_iter(value) if isinstance(t, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> float:
    """Bytes that reading a tensor touches; what is expanded is read once."""
    return float(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))
