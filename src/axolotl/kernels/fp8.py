"""Frozen weights in 8-bit floats (e4m3) for LoRA: quantised once, multiplied by the scaled GEMM of the GPU.

Each row of a weight has one scale, each row of an activation too. In the backward pass the weight's scales go into the
incoming gradient, so the same bytes serve both directions; only their order in memory is turned, since the GEMM of
Hopper wants it so. Where there is no such GEMM, as on a CPU, the same numbers are multiplied in float32.

Shapes: T tokens, K input features, N output features of all layers of a stack.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from axolotl.kernels.triton_language import power_of_2, programs, runs_on

HIGHEST = 448.0
"""The largest number of e4m3."""

Quantized = tuple[torch.Tensor, torch.Tensor]
"""Rows in e4m3 [T,K] and the float32 scale [T,1] of each: `values.float() * scale` is near what they stand for."""


def plain_quantize_rows(x: torch.Tensor, columns: torch.Tensor | None = None) -> Quantized:
    """The twin of `quantize_rows`, by plain torch."""
    wide = x.float() if columns is None else x.float() * columns
    scale = wide.abs().amax(1, keepdim=True).clamp_(min=1e-30) / HIGHEST
    return (wide / scale).to(torch.float8_e4m3fn), scale


def quantize_rows(x: torch.Tensor, columns: torch.Tensor | None = None) -> Quantized:
    """x [T,K], with any distance between rows, times `columns` [K] where given, in 8 bits."""
    if not runs_on(x) or not x.numel() or x.stride(1) != 1:
        return plain_quantize_rows(x, columns)
    T, K = x.shape
    values, scale = empty_rows(T, K, x.device)
    programs("fp8").rows[(T,)](
        x, x if columns is None else columns, values, scale, x.stride(0),
        K=K, SCALED=columns is not None, BLOCK=row_block(K), num_warps=8,
    )  # fmt: skip
    return values, scale


def empty_rows(T: int, K: int, device: torch.device) -> Quantized:
    """Room for T rows of K numbers."""
    values = torch.empty(T, K, dtype=torch.float8_e4m3fn, device=device)
    return values, torch.empty(T, 1, dtype=torch.float32, device=device)


def row_block(K: int) -> int:
    """Numbers that a program with a whole row of K for itself takes at a time."""
    return min(4096, power_of_2(K))


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


def turned(values: torch.Tensor) -> torch.Tensor:
    """e4m3 numbers [N,K] as [K,N], in that order in memory."""
    return values.view(torch.uint8).t().contiguous().view(torch.float8_e4m3fn)


class EightBit:
    """A frozen weight [N,K] in e4m3."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.values, self.scale = quantize_rows(weight.detach())
        self.dtype = weight.dtype

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in another type."""
        return dequantize_rows(self.values, self.scale, dtype)


class EightBitStack:
    """Frozen e4m3 weights that share their input; see `axolotl.kernels.frozen.Frozen`.

    They move into one buffer, and the matrices given become views into it. The turned copy that the backward pass
    multiplies by is made at its first use and kept: both together are as large as the weights were in 16 bits.
    """

    folds = False
    standing = False
    eight_bit = True

    def __init__(self, matrices: Sequence[EightBit]) -> None:
        self.matrices = list(matrices)
        self._all: Quantized | None = None
        if len(matrices) > 1:
            bits = torch.cat([m.values.view(torch.uint8) for m in matrices])
            values, scale = bits.view(torch.float8_e4m3fn), torch.cat([m.scale for m in matrices])
            self._all = values, scale
            start = 0
            for m in matrices:
                size = m.values.shape[0]
                m.values, m.scale = values[start : start + size], scale[start : start + size]
                start += size
        self._turned: torch.Tensor | None = None
        self._ones = torch.ones(self.values.shape[1], 1, device=self.values.device)

    @property
    def values(self) -> torch.Tensor:
        # That of a single matrix is asked for: it may move into the buffer of another stack, and would stay here too.
        return self.matrices[0].values if self._all is None else self._all[0]

    @property
    def scale(self) -> torch.Tensor:
        return self.matrices[0].scale if self._all is None else self._all[1]

    @property
    def column_scale(self) -> torch.Tensor | None:
        return self.scale.view(-1)

    def widened(self, dtype: torch.dtype, room: int) -> torch.Tensor | None:
        """None: 8-bit weights have no room for others beside them."""
        return None

    def product(self, x: torch.Tensor, q: Quantized | None = None) -> torch.Tensor:
        """x [T,K] to x @ W.T [T,N], rounding both to e4m3."""
        values, scale = quantize_rows(x) if q is None else q
        return scaled_product(values, scale, self.values, self.scale, x.dtype)

    def product_onto(self, y: torch.Tensor, x: torch.Tensor, q: Quantized | None = None) -> torch.Tensor:
        """y + x @ W.T, [T,N], over y."""
        return y.add_(self.product(x, q))

    def gradient(self, dy: torch.Tensor, q: Quantized | None = None) -> torch.Tensor:
        """dy [T,N] to dy @ W [T,K], rounding both to e4m3. `q`: dy times `column_scale`."""
        if self._turned is None:
            self._turned = turned(self.values)
        values, scale = quantize_rows(dy, self.column_scale) if q is None else q
        return scaled_product(values, scale, self._turned, self._ones, dy.dtype)
