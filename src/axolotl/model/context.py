"""Rows that several processes share: each holds a part of every row, and attention sees the whole of it.

The exchange is that of DeepSpeed-Ulysses (Jacobs et al., 2023): before attention each process gives away the heads that
are others' and gets its own heads' tokens of the other parts; afterwards the way back. Every process computes as
much, the result is that of one process, and every kind of attention works, with documents, windows and sinks.

Shapes: B batch, H heads, G key/value heads, T tokens of the whole row, S = T / processes, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from axolotl.errors import ModelError, Problem


class _Exchange(torch.autograd.Function):
    """Gives parts along one dimension away and joins what comes along another one; its gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, give: int, join: int) -> torch.Tensor:
        ctx.way = (group, give, join)
        return exchange(x, group, give, join)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        group, give, join = ctx.way
        return exchange(grads[0], group, join, give), None, None, None


def exchange(x: torch.Tensor, group: dist.ProcessGroup, give: int, join: int) -> torch.Tensor:
    """all-to-all: process r gets the r-th part along dimension `give` of all, joined along `join` in their order."""
    size = group.size()
    # Also makes a gradient contiguous that is not: gloo would send its storage as it lies.
    sent = torch.stack([part.contiguous() for part in x.chunk(size, dim=give)])
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    return torch.cat(got.unbind(0), dim=join)


@dataclass(frozen=True)
class SharedRows:
    """The processes among which rows are divided, each holding S tokens of T."""

    group: dist.ProcessGroup
    packed: bool
    """Rows hold several documents; their borders come with the batch."""

    @property
    def size(self) -> int:
        """Processes that share a row."""
        return self.group.size()

    @property
    def place(self) -> int:
        """Which part of the row is this process's."""
        return self.group.rank()

    def whole_rows(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """[B,H,S,D] of all heads to [B,h,T,D] of this process's; key/value heads are repeated where they do not go round.

        `heads` is the number of query heads, H. Raises ModelError where they cannot be divided.
        """
        again = _repeats(heads, x.shape[1], self.size)
        if again > 1:
            x = x.repeat_interleave(again, dim=1)
        whole: torch.Tensor = _Exchange.apply(x, self.group, 1, 2)
        return whole

    def own_part(self, x: torch.Tensor) -> torch.Tensor:
        """[B,T,h,D] of this process's heads to [B,S,H,D] of all."""
        part: torch.Tensor = _Exchange.apply(x, self.group, 1, 2)
        return part

    def own_heads(self, x: torch.Tensor) -> torch.Tensor:
        """The part of a value per head [H] that belongs to this process's heads."""
        return x.chunk(self.size, dim=0)[self.place]


def _repeats(heads: int, grouped: int, size: int) -> int:
    """How often key/value heads have to be repeated so that `size` processes can divide them."""
    if heads % size == 0:
        for again in range(1, heads // grouped + 1):
            if (grouped * again) % size == 0 and heads % (grouped * again) == 0:
                return again
    raise ModelError(heads_problem(heads, size))


def heads_problem(heads: int, size: int) -> Problem:
    """What is said where the heads of a model cannot be divided among so many processes."""
    fits = [n for n in range(2, heads + 1) if heads % n == 0]
    return Problem(
        f"`context_parallel_size: {size}`: the model has {heads} attention heads on each process, which {size} processes "
        "cannot share evenly.",
        f"Choose one of {', '.join(map(str, fits))}, or delete the line.",
        "conflict",
        ("context_parallel_size",),
    )


_shared: SharedRows | None = None


def share_rows(shared: SharedRows | None) -> None:
    """From here on the model of this process gets parts of rows; None: whole ones."""
    global _shared
    _shared = shared


def shared_rows() -> SharedRows | None:
    """How rows are shared at present."""
    return _shared
