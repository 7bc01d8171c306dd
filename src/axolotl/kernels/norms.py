"""Root-mean-square norm (arXiv 1910.07467), as Llama and as Gemma round it.

Shapes: the last axis, of N features, is normed; whatever is in front of it are rows.
"""

from __future__ import annotations

from typing import Any

import torch

from axolotl.kernels.triton_language import power_of_2, programs, runs_on

WIDEST = 65536
"""Features that one program holds at most."""


def plain_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, round_first: bool = True
) -> torch.Tensor:
    """The twin of `rms_norm`, by plain torch."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    normed = x.to(wide)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    if round_first:
        return (offset + weight if offset else weight) * normed.to(x.dtype)
    return (normed * (offset + weight.to(wide))).to(x.dtype)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, round_first: bool = True
) -> torch.Tensor:
    """`x / sqrt(mean(x²) + eps) * (offset + weight)` over the last axis, [...,N] to [...,N].

    `round_first`: the normed rows are rounded to x's type before they are multiplied, as Llama does (the result has the
    wider type of both); otherwise the product is rounded, as Gemma does. Runs as one Triton program per row where it
    can, else as the twin. Differentiable once in both.
    """
    if not runs_on(x) or x.shape[-1] > WIDEST or not x.numel() or x.dtype is torch.float64:
        return plain_rms_norm(x, weight, eps, offset=offset, round_first=round_first)
    out: torch.Tensor = _RmsNorm.apply(x, weight, eps, offset, round_first)
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, round_first: bool
    ) -> torch.Tensor:
        N = x.shape[-1]
        rows = x.reshape(-1, N)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        T = rows.shape[0]
        dtype = torch.promote_types(x.dtype, weight.dtype) if round_first else x.dtype
        out = torch.empty(T, N, dtype=dtype, device=x.device)
        inverse = torch.empty(T, dtype=torch.float32, device=x.device)
        programs("norms").forward[(T,)](
            rows, weight, out, inverse, rows.stride(0), eps, offset,
            N=N, ROUND_FIRST=round_first, BLOCK=power_of_2(N), num_warps=_warps(N),
        )  # fmt: skip
        ctx.save_for_backward(rows, weight, inverse)
        ctx.offset, ctx.shape = offset, x.shape
        return out.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, inverse = ctx.saved_tensors
        T, N = rows.shape
        dy = grads[0].reshape(T, N)
        dy = dy if dy.stride(1) == 1 else dy.contiguous()
        dx = torch.empty(T, N, dtype=rows.dtype, device=rows.device)
        wants_weight = ctx.needs_input_grad[1]
        # Few programs with many rows each, so that the partial sums for the weight stay small.
        per_program = max(1, -(-T // 512)) if wants_weight else 1
        count = -(-T // per_program)
        partial = torch.empty(count if wants_weight else 1, N, dtype=torch.float32, device=rows.device)
        programs("norms").backward[(count,)](
            dy, rows, weight, inverse, dx, partial, dy.stride(0), rows.stride(0), T, ctx.offset,
            N=N, ROWS=per_program, WEIGHT=wants_weight, BLOCK=power_of_2(N), num_warps=_warps(N),
        )  # fmt: skip
        dw = partial.sum(0).to(weight.dtype) if wants_weight else None
        return dx.view(ctx.shape), dw, None, None, None


def _warps(N: int) -> int:
    return 4 if N <= 2048 else 8 if N <= 8192 else 16
