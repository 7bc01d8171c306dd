"""Frozen weights of linear layers, in the number types that they may be held in, with what LoRA needs of them.

Shapes: T tokens, K input features, N output features, R ranks of all adapters of a weight together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from axolotl.kernels.fp8 import Quantized


class Frozen(Protocol):
    """Frozen weights of layers that share their input, one above the other: [N,K] in all."""

    standing: bool
    """Whether `widened` gives the same memory every time, in which the low-rank matrices stay."""
    eight_bit: bool
    """Whether the products are made of 8-bit floats, which whoever writes an input may make on the way."""

    @property
    def column_scale(self) -> torch.Tensor | None:
        """[N]: what the columns of an incoming gradient are multiplied by before they become 8-bit floats."""
        ...

    @property
    def folds(self) -> bool:
        """Whether `widened` gives anything."""
        ...

    def widened(self, dtype: torch.dtype, room: int) -> torch.Tensor | None:
        """The weights [N,K+room] in this type, with room for the low-rank matrices at the right; or None."""
        ...

    def product(self, x: torch.Tensor, q: Quantized | None = None) -> torch.Tensor:
        """x [T,K], or what stands for it in 8 bits, to x @ W.T [T,N], in x's type."""
        ...

    def product_onto(self, y: torch.Tensor, x: torch.Tensor, q: Quantized | None = None) -> torch.Tensor:
        """y + x @ W.T, [T,N]; y may be overwritten."""
        ...

    def gradient(self, dy: torch.Tensor, q: Quantized | None = None) -> torch.Tensor:
        """dy [T,N], or what stands for it in 8 bits, to dy @ W [T,K], in dy's type."""
        ...


class Dense:
    """Weights in their own type. With `room`, they move into one buffer that has R more columns, and the tensors given
    become views into it, so that nothing is held twice."""

    standing = True
    eight_bit = False
    column_scale: torch.Tensor | None = None

    def __init__(self, weights: Sequence[torch.Tensor], room: int = 0) -> None:
        self.weights = list(weights)
        self.wide: torch.Tensor | None = None
        if not room:
            return
        first, sizes = weights[0], [w.shape[0] for w in weights]
        K = first.shape[1]
        self.wide = torch.zeros(sum(sizes), K + room, dtype=first.dtype, device=first.device)
        start = 0
        for weight, size in zip(weights, sizes, strict=True):
            view = self.wide[start : start + size, :K]
            view.copy_(weight.data)
            weight.data = view
            start += size

    @property
    def folds(self) -> bool:
        return self.wide is not None

    def widened(self, dtype: torch.dtype, room: int) -> torch.Tensor | None:
        """The buffer itself, where it is of this type and has this room."""
        fits = self.wide is not None and self.wide.dtype is dtype
        return self.wide if fits and self.wide.shape[1] == self.weights[0].shape[1] + room else None  # type: ignore[union-attr]

    def release(self) -> None:
        """Gives every weight a storage of its own again."""
        if self.wide is not None:
            for weight in self.weights:
                weight.data = weight.data.contiguous()
            self.wide = None

    def _whole(self, dtype: torch.dtype) -> torch.Tensor | None:
        if self.wide is not None:
            return self.wide[:, : self.weights[0].shape[1]].to(dtype)
        return self.weights[0].to(dtype) if len(self.weights) == 1 else None

    def product(self, x: torch.Tensor, q: Quantized | None = None) -> torch.Tensor:
        whole = self._whole(x.dtype)
        return stacked_product(x, self.weights) if whole is None else torch.mm(x, whole.t())

    def product_onto(self, y: torch.Tensor, x: torch.Tensor, q: Quantized | None = None) -> torch.Tensor:
        whole = self._whole(x.dtype)
        return y.add_(stacked_product(x, self.weights)) if whole is None else y.addmm_(x, whole.t())

    def gradient(self, dy: torch.Tensor, q: Quantized | None = None) -> torch.Tensor:
        whole = self._whole(dy.dtype)
        return stacked_gradient(dy, self.weights) if whole is None else torch.mm(dy, whole)


def stacked_product(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """x [T,K] by each weight [N_i,K], side by side: [T,N]."""
    parts = [torch.mm(x, weight.to(x.dtype).t()) for weight in weights]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def stacked_gradient(dy: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """dy [T,N] back through each weight [N_i,K], summed: [T,K]."""
    out: torch.Tensor | None = None
    start = 0
    for weight in weights:
        size = weight.shape[0]
        part, w = dy[:, start : start + size], weight.to(dy.dtype)
        out = torch.mm(part, w) if out is None else out.addmm_(part, w)
        start += size
    assert out is not None
    return out
