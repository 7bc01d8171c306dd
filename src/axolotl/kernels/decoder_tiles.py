"""The half of a decoder layer behind its attention in tiles of tokens, keeping nothing but its two inputs.

What `axolotl.kernels.decoder.output_and_mlp` makes in one pass is made here for one tile of tokens at a time. The
backward pass makes what it needs of a tile once more, which leaves out the last product, and then takes the tile's
gradients: so memory does not grow with tokens times the width of the feed-forward layer, and in a layer that is
computed again this half is gone through twice in all, the second time without its largest product but two.

Shapes: T tokens, H width of the model, A width of the attention's output, M width inside the feed-forward layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from axolotl.kernels.gates import gated_into
from axolotl.kernels.lora import LoraGroup, mlp_backward, mlp_forward
from axolotl.kernels.norms import Norm, norm_backward, norm_into


@dataclass(frozen=True)
class Half:
    """What stands behind a layer's attention; the norm's weight [H] is frozen."""

    output: LoraGroup
    weight: torch.Tensor
    norm: Norm
    gate_up: LoraGroup
    down: LoraGroup
    act: str

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [*self.output.parameters, *self.gate_up.parameters, *self.down.parameters]


def output_and_mlp_in_tiles(attended: torch.Tensor, h: torch.Tensor, half: Half, length: int) -> torch.Tensor:
    """As `output_and_mlp`, `length` tokens at a time: attended [...,A] and h [...,H] to [...,H]; once."""
    flat: torch.Tensor = _Tiles.apply(
        attended.reshape(-1, half.output.K), h.reshape(-1, half.output.N), half, length, *half.parameters
    )
    return flat.view(h.shape)


def _begin(attended: torch.Tensor, h: torch.Tensor, half: Half) -> tuple[Any, ...]:
    """Up to the input of the feed-forward layer: (low, middle, buffer, inverse, q)."""
    a, _ = half.output.low(h.dtype)
    low = torch.mm(attended, a.t())
    middle = half.output.product_with(attended, low, None, h)
    buffer = half.gate_up.room(h.shape[0], h)
    inside, eight_bit = buffer[:, : half.gate_up.K], half.gate_up.base.eight_bit
    inverse, q = norm_into(middle, half.weight, half.norm, inside, quantize=eight_bit)
    return low, middle, buffer, inverse, q


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, attended: torch.Tensor, h: torch.Tensor, half: Half, length: int, *parameters: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty_like(h, memory_format=torch.contiguous_format)
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, h.shape[0], length):
                rows = slice(start, start + length)
                _, middle, buffer, _, q = _begin(attended[rows], h[rows], half)
                out[rows] = mlp_forward(buffer, q, half.gate_up, half.down, half.act, middle)[0]
        ctx.save_for_backward(attended, h)
        ctx.half, ctx.length = half, length
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        attended, h = ctx.saved_tensors
        half: Half = ctx.half
        wanted = ctx.needs_input_grad[0]
        d_attended = torch.empty_like(attended, memory_format=torch.contiguous_format) if wanted else None
        dh = torch.empty_like(h, memory_format=torch.contiguous_format)
        sums: list[torch.Tensor] | None = None
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, h.shape[0], ctx.length):
                rows = slice(start, start + ctx.length)
                d_out, d_middle, found = _tile_backward(
                    grads[0][rows].contiguous(), attended[rows], h[rows], half, wanted
                )
                dh[rows] = d_middle
                if d_attended is not None:
                    d_attended[rows] = d_out
                if sums is None:
                    sums = [g.float() if g.dtype in (torch.bfloat16, torch.float16) else g for g in found]
                else:
                    torch._foreach_add_(sums, [g.to(s.dtype) for g, s in zip(found, sums, strict=True)])
        if sums is None:
            sums = [torch.zeros_like(p) for p in half.parameters]
        of_weights = [s.to(p.dtype) for s, p in zip(sums, half.parameters, strict=True)]
        return (d_attended, dh, None, None, *of_weights)


def _tile_backward(
    dy: torch.Tensor, attended: torch.Tensor, h: torch.Tensor, half: Half, wanted: bool
) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    gate_up, down, M = half.gate_up, half.down, half.down.K
    low, middle, buffer, inverse, q = _begin(attended, h, half)
    both = gate_up.product(buffer, q)
    inner = torch.empty(h.shape[0], M, dtype=h.dtype, device=h.device)
    gated_into(both[:, :M], both[:, M:], half.act, inner)
    a, _ = down.low(h.dtype)
    inner_low = torch.mm(inner, a.t())
    del inner
    x, x_low = buffer[:, : gate_up.K], buffer[:, gate_up.K :]
    dx, of_mlp = mlp_backward(dy, None, x, x_low, both, inner_low, gate_up, down, half.act, wanted=True)
    assert dx is not None
    d_middle, _ = norm_backward(dx, middle, half.weight, inverse, half.norm.offset, dy, wants_weight=False)
    d_attended, g = half.output.input_gradient(d_middle, wanted=wanted)
    return d_attended, d_middle, [*half.output.weight_gradients(d_middle, g, attended, low), *of_mlp]
