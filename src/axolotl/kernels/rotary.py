"""Rotary position embedding (arXiv 2104.09864) of queries and keys, in the layout that turns halves of a head.

Shapes: B batch, H query heads, G key heads, T tokens, D width of a head, R turned part of it.
"""

from __future__ import annotations

from typing import Any

import torch

from axolotl.kernels.triton_language import power_of_2, programs, runs_on


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    R = cos.shape[-1]
    part, rest = x[..., :R], x[..., R:]
    half = torch.cat((-part[..., R // 2 :], part[..., : R // 2]), dim=-1)
    out = part * cos + half * sin
    return out if x.shape[-1] == R else torch.cat((out, rest), dim=-1)


def plain_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of `rotary`, by plain torch."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _turned(q, cos, sin), _turned(k, cos, sin)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns queries [B,H,T,D] and keys [B,G,T,D] (heads at axis `unsqueeze_dim`, 1 or 2) by their positions.

    cos and sin [B or 1,T,R] hold each angle twice, as transformers makes them; features from R on stay. The results
    keep memory order of the inputs. Only q and k get gradients.
    """
    if unsqueeze_dim not in (1, 2) or not runs_on(q) or not q.numel() or q.dtype is torch.float64:
        return plain_rotary(q, k, cos, sin, unsqueeze_dim)
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    q, k = _Turn.apply(q, cos, sin), _Turn.apply(k, cos, sin)
    return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 2 else (q, k)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _run(x, cos, sin, back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _run(grads[0], cos, sin, back=True), None, None


def _run(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool) -> torch.Tensor:
    B, H, T, D = x.shape
    R = cos.shape[-1]
    if x.stride(3) != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    dtype = torch.promote_types(x.dtype, cos.dtype)
    # Tokens before heads: attention and the backward GEMM want them so.
    out = torch.empty(B, T, H, D, dtype=dtype, device=x.device).transpose(1, 2)
    programs("rotary").turn[(B * T,)](
        x, out, cos, sin, T, 0 if cos.shape[0] == 1 else T,
        x.stride(0), x.stride(1), x.stride(2), out.stride(0), out.stride(1), out.stride(2),
        H=H, D=D, HALF=R // 2, HEADS=power_of_2(H), WIDE=power_of_2(R // 2), REST=power_of_2(max(D - R, 1)),
        PARTIAL=D > R, BACK=back, num_warps=4,
    )  # fmt: skip
    return out
