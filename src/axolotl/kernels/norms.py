"""Root-mean-square norm (arXiv 1910.07467), as Llama and as Gemma round it.

Shapes: the last axis, of N features, is normed; whatever is in front of it are rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from axolotl.kernels.fp8 import Quantized, empty_rows, plain_quantize_rows
from axolotl.kernels.triton_language import power_of_2, programs, runs_on

WIDEST = 65536
"""Features that one program holds at most."""


@dataclass(frozen=True)
class Norm:
    """The kind of a root-mean-square norm; see `rms_norm`."""

    eps: float
    offset: float
    round_first: bool


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
    if not _has_program(x):
        return plain_rms_norm(x, weight, eps, offset=offset, round_first=round_first)
    out: torch.Tensor = _RmsNorm.apply(x, weight, eps, offset, round_first)
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, round_first: bool
    ) -> torch.Tensor:
        N = x.shape[-1]
        rows = _side_by_side(x.reshape(-1, N))
        dtype = torch.promote_types(x.dtype, weight.dtype) if round_first else x.dtype
        out = torch.empty(rows.shape[0], N, dtype=dtype, device=x.device)
        inverse, _ = norm_into(rows, weight, Norm(eps, offset, round_first), out)
        ctx.save_for_backward(rows, weight, inverse)
        ctx.offset, ctx.shape = offset, x.shape
        return out.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, inverse = ctx.saved_tensors
        dy = grads[0].reshape(rows.shape)
        dx, dw = norm_backward(
            dy, rows, weight, inverse, ctx.offset, None, wants_weight=ctx.needs_input_grad[1]
        )
        return dx.view(ctx.shape), dw, None, None, None


def norm_into(
    rows: torch.Tensor, weight: torch.Tensor, norm: Norm, out: torch.Tensor, *, quantize: bool = False
) -> tuple[torch.Tensor, Quantized | None]:
    """Writes the normed rows [T,N] into `out`, with any distance between rows. Gives 1/rms [T,1] of each row, float32,
    and with `quantize` the normed rows in 8 bits. No gradients."""
    T, N = rows.shape
    if not _has_program(rows):
        options: dict[str, Any] = {"offset": norm.offset, "round_first": norm.round_first}
        out.copy_(plain_rms_norm(rows, weight, norm.eps, **options))
        wide = rows.to(torch.float64 if rows.dtype is torch.float64 else torch.float32)
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
        return inverse, plain_quantize_rows(out) if quantize else None
    rows = _side_by_side(rows)
    inverse = torch.empty(T, 1, dtype=torch.float32, device=rows.device)
    values, scale = empty_rows(T, N, rows.device) if quantize else (inverse, inverse)
    programs("norms").forward[(T,)](
        rows, weight, out, inverse, values, scale, rows.stride(0), out.stride(0), norm.eps, norm.offset,
        N=N, ROUND_FIRST=norm.round_first, QUANTIZE=quantize, BLOCK=power_of_2(N), num_warps=_warps(N),
    )  # fmt: skip
    return inverse, (values, scale) if quantize else None


def norm_backward(
    dy: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    inverse: torch.Tensor,
    offset: float,
    residual: torch.Tensor | None,
    *,
    wants_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dy [T,N] to the gradient of the rows, plus `residual` [T,N] where given, and to that of the weight where wanted."""
    T, N = rows.shape
    if not _has_program(rows):
        return _plain_norm_backward(dy, rows, weight, inverse, offset, residual, wants_weight=wants_weight)
    dy, rows = _side_by_side(dy), _side_by_side(rows)
    residual = None if residual is None else _side_by_side(residual)
    dx = torch.empty(T, N, dtype=rows.dtype, device=rows.device)
    # Few programs with many rows each, so that the partial sums for the weight stay small.
    per_program = max(1, -(-T // 512)) if wants_weight else 1
    count = -(-T // per_program)
    partial = torch.empty(count if wants_weight else 1, N, dtype=torch.float32, device=rows.device)
    programs("norms").backward[(count,)](
        dy, rows, weight, inverse, dx if residual is None else residual, dx, partial,
        dy.stride(0), rows.stride(0), 0 if residual is None else residual.stride(0), T, offset,
        N=N, ROWS=per_program, WEIGHT=wants_weight, RESIDUAL=residual is not None,
        BLOCK=power_of_2(N), num_warps=_warps(N),
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if wants_weight else None


def _plain_norm_backward(
    dy: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    inverse: torch.Tensor,
    offset: float,
    residual: torch.Tensor | None,
    *,
    wants_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    wide = inverse.dtype
    d, normed = dy.to(wide), rows.to(wide) * inverse
    scaled = d * (weight.to(wide) + offset)
    dx = (scaled - normed * (normed * scaled).mean(-1, keepdim=True)) * inverse
    if residual is not None:
        dx = dx + residual.to(wide)
    return dx.to(rows.dtype), (d * normed).sum(0).to(weight.dtype) if wants_weight else None


def _has_program(x: torch.Tensor) -> bool:
    """Whether the programs do the work for these rows; otherwise plain torch does."""
    return runs_on(x) and 0 < x.shape[-1] <= WIDEST and x.numel() > 0 and x.dtype is not torch.float64


def _side_by_side(rows: torch.Tensor) -> torch.Tensor:
    """The rows such that the numbers of each lie side by side, as the programs read them; copied where they do not."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _warps(N: int) -> int:
    return 4 if N <= 2048 else 8 if N <= 8192 else 16
