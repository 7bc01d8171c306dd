"""Gated activations of feed-forward layers: act(gate) * up, with SiLU (SwiGLU) or GELU (GeGLU), arXiv 2002.05202.

Shapes: T tokens, M features; gate, up and result are [T,M] with any distance between rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from axolotl.kernels.fp8 import Quantized, empty_rows, plain_quantize_rows, row_block
from axolotl.kernels.triton_language import power_of_2, programs, runs_on

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def activation(name: str, x: torch.Tensor) -> torch.Tensor:
    """One of ACTIVATIONS. Raises KeyError for another."""
    if name == "silu":
        return F.silu(x)
    return F.gelu(x, approximate={"gelu": "none", "gelu_tanh": "tanh"}[name])


def plain_gated(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    """The twin of `gated`, by plain torch."""
    return activation(act, gate) * up


def gated(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    """`act(gate) * up`, [...,M]; the backward pass keeps nothing but gate and up. `act`: one of ACTIVATIONS."""
    if not runs_on(gate) or gate.dtype is torch.float64 or not gate.numel():
        return plain_gated(gate, up, act)
    out: torch.Tensor = _Gated.apply(gate, up, act)
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        gated_into(_rows(gate), _rows(up), act, _rows(out))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = (
            torch.empty_like(gate, memory_format=torch.contiguous_format),
            torch.empty(up.shape, dtype=up.dtype, device=up.device),
        )
        gated_backward(_rows(grads[0]), _rows(gate), _rows(up), ctx.act, _rows(dgate), _rows(dup), None)
        return dgate, dup, None


def gated_into(
    gate: torch.Tensor, up: torch.Tensor, act: str, out: torch.Tensor, *, quantize: bool = False
) -> Quantized | None:
    """Writes `act(gate) * up` into `out`; all [T,M]. With `quantize`, gives it in 8 bits too. No gradients."""
    T, M = gate.shape
    if not runs_on(gate) or gate.dtype is torch.float64 or not T:
        torch.mul(activation(act, gate), up, out=out)
        return plain_quantize_rows(out) if quantize else None
    strides = (gate.stride(0), up.stride(0), out.stride(0))
    if quantize:
        values, scale = empty_rows(T, M, gate.device)
        programs("gates").forward_rows[(T,)](
            gate, up, out, values, scale, *strides,
            M=M, ACT=ACTIVATIONS.index(act), BLOCK=row_block(M), num_warps=8,
        )  # fmt: skip
        return values, scale
    block = min(2048, power_of_2(M))
    programs("gates").forward[(T, -(-M // block))](
        gate, up, out, M, *strides, ACT=ACTIVATIONS.index(act), BLOCK=block, num_warps=8
    )
    return None


def gated_backward(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    act: str,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    again: torch.Tensor | None,
    *,
    quantize: bool = False,
    scale: torch.Tensor | None = None,
) -> Quantized | None:
    """Writes the gradients of gate and up, and into `again`, where given, `act(gate) * up` once more; all [T,M].

    `again` may be `dout` itself, which is read before. With `quantize`, gives both gradients side by side [T,2M] times
    `scale` [2M] in 8 bits.
    """
    T, M = gate.shape
    if not runs_on(gate) or gate.dtype is torch.float64 or not T:
        _plain_backward(dout, gate, up, act, dgate, dup, again)
        return plain_quantize_rows(torch.cat((dgate, dup), dim=1), scale) if quantize else None
    tensors = (dout, gate, up, dgate, dup, dgate if again is None else again)
    strides = tuple(t.stride(0) for t in tensors)
    options: dict[str, Any] = {"ACT": ACTIVATIONS.index(act), "AGAIN": again is not None, "num_warps": 8}
    if quantize:
        values, scales = empty_rows(T, 2 * M, gate.device)
        programs("gates").backward_rows[(T,)](
            *tensors, dgate if scale is None else scale, values, scales, *strides,
            M=M, SCALED=scale is not None, BLOCK=min(2048, row_block(M)), **options,
        )  # fmt: skip
        return values, scales
    block = min(2048, power_of_2(M))
    programs("gates").backward[(T, -(-M // block))](*tensors, M, *strides, BLOCK=block, **options)
    return None


def _plain_backward(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    act: str,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    again: torch.Tensor | None,
) -> None:
    wide = torch.float64 if gate.dtype is torch.float64 else torch.float32
    d, g, u = dout.to(wide), gate.to(wide), up.to(wide)
    value, slope = _value_and_slope(g, act)
    dgate.copy_(d * u * slope)
    dup.copy_(d * value)
    if again is not None:
        again.copy_(activation(act, gate) * up)


def _value_and_slope(g: torch.Tensor, act: str) -> tuple[torch.Tensor, torch.Tensor]:
    if act == "silu":
        s = torch.sigmoid(g)
        return g * s, s * (1 + g * (1 - s))
    if act == "gelu":
        below = 0.5 * (1 + torch.erf(g * math.sqrt(0.5)))
        return g * below, below + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    inner = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    t = torch.tanh(inner)
    rise = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * g * g)
    return 0.5 * g * (1 + t), 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * rise


def _rows(x: torch.Tensor) -> torch.Tensor:
    """As [T,M] with neighbouring features, without a copy where that is possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
