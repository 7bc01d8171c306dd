"""4-bit weights as QLoRA holds them (arXiv 2305.14314): back to 16 bits in one pass, the scales' own quantisation too.

Two numbers share a byte, the first in its upper half; `block` neighbours share one scale. The scales may themselves be
bytes that index a table, with a scale per `scale_block` of them and one offset for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from axolotl.kernels.fp8 import Quantized
from axolotl.kernels.triton_language import programs, runs_on


@dataclass(frozen=True)
class FourBit:
    """A matrix in 4 bits: `packed` bytes [N*K/2], `scales` one per block, `table` [16]."""

    packed: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor
    shape: tuple[int, int]
    block: int
    scale_scales: torch.Tensor | None = None
    """Scales of the scales, float32; then `scales` are bytes."""
    scale_table: torch.Tensor | None = None
    scale_block: int = 256
    offset: torch.Tensor | None = None


def from_bitsandbytes(weight: torch.Tensor) -> FourBit:
    """The 4-bit weight of a bitsandbytes layer, [N,K], sharing its memory.

    Raises ValueError for a weight that is not in bitsandbytes' common layout.
    """
    state: Any = getattr(weight, "quant_state", None)
    if state is None or len(state.shape) != 2 or getattr(state, "packing_format_for_cpu", None):
        raise ValueError("no 4-bit weight in the common layout")
    packed = weight.detach().reshape(-1).view(torch.uint8)
    N, K = state.shape
    if packed.numel() * 2 != N * K:
        raise ValueError(f"{packed.numel()} bytes for a weight of {N} x {K}")
    nested = {}
    if state.nested:
        inner = state.state2
        nested = {"scale_scales": inner.absmax, "scale_table": inner.code, "scale_block": inner.blocksize,
                  "offset": state.offset}  # fmt: skip
    return FourBit(packed, state.absmax, state.code, (N, K), state.blocksize, **nested)


def plain_dequantize(matrix: FourBit, dtype: torch.dtype) -> torch.Tensor:
    """The twin of `dequantize`, by plain torch."""
    codes = torch.stack((matrix.packed >> 4, matrix.packed & 15), dim=1).reshape(-1)
    scales = matrix.scales
    if matrix.scale_scales is not None:
        assert matrix.scale_table is not None and matrix.offset is not None
        of_scales = matrix.scale_scales.repeat_interleave(matrix.scale_block)[: scales.numel()]
        scales = matrix.scale_table[scales.long()] * of_scales + matrix.offset
    values = matrix.table.float()[codes.long()]
    return (values * scales.repeat_interleave(matrix.block)[: values.numel()]).to(dtype).view(matrix.shape)


def dequantize(matrix: FourBit, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """The matrix [N,K] in this type, into `out` where given, with any distance between its rows. One Triton program
    where it can run, else the twin."""
    if not runs_on(matrix.packed):
        plain = plain_dequantize(matrix, dtype)
        return plain if out is None else out.copy_(plain)
    count = matrix.packed.numel()
    if out is None:
        out = torch.empty(matrix.shape, dtype=dtype, device=matrix.packed.device)
    nested = matrix.scale_scales is not None
    # Arguments that a plain scale does not need still have to be tensors.
    more = (matrix.scale_scales, matrix.scale_table, matrix.offset) if nested else (matrix.scales,) * 3
    programs("nf4").dequantize[(-(-count // 1024),)](
        matrix.packed, matrix.scales, matrix.table, *more, out, count, out.stride(0), K=matrix.shape[1],
        BLOCK=matrix.block, SCALE_BLOCK=matrix.scale_block, NESTED=nested, BYTES=1024, num_warps=4,
    )  # fmt: skip
    return out


class FourBitStack:
    """Frozen 4-bit weights that share their input; see `axolotl.kernels.frozen.Frozen`. Made 16-bit for each product,
    all in one buffer, in which the low-rank matrices find room too."""

    folds = True
    standing = False
    eight_bit = False
    column_scale: torch.Tensor | None = None

    def __init__(self, matrices: Sequence[FourBit]) -> None:
        self.matrices = list(matrices)
        self.N, self.K = sum(m.shape[0] for m in matrices), matrices[0].shape[1]

    def widened(self, dtype: torch.dtype, room: int) -> torch.Tensor | None:
        """The weights [N,K+room] in this type; what is in the room is not said."""
        wide = torch.empty(self.N, self.K + room, dtype=dtype, device=self.matrices[0].packed.device)
        start = 0
        for m in self.matrices:
            dequantize(m, dtype, wide[start : start + m.shape[0], : self.K])
            start += m.shape[0]
        return wide

    def _whole(self, dtype: torch.dtype) -> torch.Tensor:
        whole = self.widened(dtype, 0)
        assert whole is not None
        return whole

    def product(self, x: torch.Tensor, q: Quantized | None = None) -> torch.Tensor:
        """x [T,K] to x @ W.T [T,N]."""
        return torch.mm(x, self._whole(x.dtype).t())

    def product_onto(self, y: torch.Tensor, x: torch.Tensor, q: Quantized | None = None) -> torch.Tensor:
        """y + x @ W.T, [T,N], over y."""
        return y.addmm_(x, self._whole(x.dtype).t())

    def gradient(self, dy: torch.Tensor, q: Quantized | None = None) -> torch.Tensor:
        """dy [T,N] to dy @ W [T,K]."""
        return torch.mm(dy, self._whole(dy.dtype))
