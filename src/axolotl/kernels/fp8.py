"""Frozen weights in 8-bit floats (e4m3) for LoRA: quantised once, multiplied by the scaled GEMM of the GPU.

Each row of a weight has one scale, each row of an activation too. In the backward pass the weight's scales go into the
incoming gradient, so the same bytes serve both directions; only their order in memory is turned, since the GEMM of
Hopper wants it so. Where there is no such GEMM, as on a CPU, the same numbers are multiplied in float32.

Shapes: T tokens, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

HIGHEST = 448.0
"""The largest number of e4m3."""


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T,K] as e4m3 and the float32 scale [T,1] of each row: `bytes.float() * scale` is near x."""
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp_(min=1e-30) / HIGHEST
    return (wide / scale).to(torch.float8_e4m3fn), scale


def dequantize_rows(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that `quantize_rows` kept."""
    return (values.float() * scale).to(dtype)


def has_scaled_gemm(device: torch.device) -> bool:
    """Whether this GPU multiplies e4m3 with a scale per row: Hopper (9.0) and newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def scaled_product(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """x [T,K] and w [N,K] in e4m3 with their scales [T,1] and [N,1] to x @ w.T [T,N].

    By the GPU's scaled GEMM where it has one and the sizes are multiples of 16, else in float32.
    """
    if has_scaled_gemm(x.device) and not (w.shape[0] % 16 or w.shape[1] % 16) and x.shape[0]:
        return torch._scaled_mm(
            x, w.t(), scale_a=x_scale, scale_b=w_scale.t(), out_dtype=dtype, use_fast_accum=True
        )
    return (torch.mm(x.float(), w.float().t()) * x_scale * w_scale.t()).to(dtype)


class EightBit:
    """A frozen weight [N,K] in e4m3."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.values, self.scale = quantize_rows(weight.detach())
        self.dtype = weight.dtype

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in another type."""
        return dequantize_rows(self.values, self.scale, dtype)


class EightBitStack:
    """Frozen e4m3 weights that share their input; see `axolotl.kernels.frozen.Frozen`."""

    wide: torch.Tensor | None = None

    def __init__(self, matrices: Sequence[EightBit]) -> None:
        self.matrices = list(matrices)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [T,K] to x @ W.T [T,N], rounding both to e4m3."""
        values, scale = quantize_rows(x)
        parts = [scaled_product(values, scale, m.values, m.scale, x.dtype) for m in self.matrices]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def gradient(self, dy: torch.Tensor) -> torch.Tensor:
        """dy [T,N] to dy @ W [T,K], rounding both to e4m3."""
        out: torch.Tensor | None = None
        start = 0
        for m in self.matrices:
            size = m.values.shape[0]
            values, scale = quantize_rows(dy[:, start : start + size].float() * m.scale.t())
            turned = m.values.view(torch.uint8).t().contiguous().view(torch.float8_e4m3fn)
            one = torch.ones(turned.shape[0], 1, device=dy.device)
            part = scaled_product(values, scale, turned, one, dy.dtype)
            out = part if out is None else out.add_(part)
            start += size
        assert out is not None
        return out
