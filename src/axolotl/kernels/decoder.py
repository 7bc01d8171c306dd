"""The two halves of a pre-norm decoder layer around its attention, each with its LoRA layers, as one pass that keeps the
least: norm with query, key and value in front; output projection, residual, norm and gated feed-forward layer behind.

    q, k, v, h = norm_linears(h, ...);  h = output_and_mlp(attention(q, k, v), h, ...)

Norms write into the buffers that the products read, residuals ride in the products and in the norms' backward passes,
and 8-bit copies are made where their numbers are made anyway.

Shapes: T tokens, H width of the model, A width of the attention's output, M width inside the feed-forward layer.
"""

from __future__ import annotations

from typing import Any

import torch

from axolotl.kernels.lora import LoraGroup, incoming, mlp_backward, mlp_forward, outputs
from axolotl.kernels.norms import Norm, norm_backward, norm_into


def norm_linears(
    h: torch.Tensor, weight: torch.Tensor, norm: Norm, group: LoraGroup
) -> tuple[torch.Tensor, ...]:
    """h [...,H] normed and through all layers of the group: one [...,N_i] for each, and h as it is. The norm's weight [H]
    is frozen.

    Whoever goes on with the h that is given back has its gradient added where that of the norm is made.
    Gradients for h and the adapters; once.
    """
    outs = _NormLinears.apply(h.reshape(-1, group.K), weight, norm, group, *group.parameters)
    return tuple(y.unflatten(0, h.shape[:-1]) for y in outs)


class _NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        weight: torch.Tensor,
        norm: Norm,
        group: LoraGroup,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        with torch.autocast(h.device.type, enabled=False):
            buffer = group.room(h.shape[0], h)
            inverse, q = norm_into(h, weight, norm, buffer[:, : group.K], quantize=group.base.eight_bit)
            y = group.product(buffer, q)
        ctx.save_for_backward(h, weight, inverse, buffer)
        ctx.group, ctx.offset = group, norm.offset
        ctx.set_materialize_grads(False)
        return (*outputs(y, group), h.view_as(h))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        h, weight, inverse, buffer = ctx.saved_tensors
        group: LoraGroup = ctx.group
        x, low = buffer[:, : group.K], buffer[:, group.K :]
        with torch.autocast(h.device.type, enabled=False):
            *of_outputs, residual = grads
            shapes = zip(of_outputs, group.columns, strict=True)
            dy = incoming([x.new_zeros(len(x), n1 - n0) if d is None else d for d, (n0, n1) in shapes])
            dx, g = group.input_gradient(dy, wanted=ctx.needs_input_grad[0])
            of_weights = group.weight_gradients(dy, g, x, low)
            if dx is not None:
                dx, _ = norm_backward(dx, h, weight, inverse, ctx.offset, residual, wants_weight=False)
        return (dx, None, None, None, *of_weights)


def output_and_mlp(
    attended: torch.Tensor,
    h: torch.Tensor,
    output: LoraGroup,
    weight: torch.Tensor,
    norm: Norm,
    gate_up: LoraGroup,
    down: LoraGroup,
    act: str,
) -> torch.Tensor:
    """The attention's output [...,A] projected and added to h [...,H], and the feed-forward layer of the normed sum added
    to that, [...,H]. The norm's weight [H] is frozen. Gradients for `attended`, h and the adapters; once.
    """
    parameters = [*output.parameters, *gate_up.parameters, *down.parameters]
    flat: torch.Tensor = _OutputAndMlp.apply(
        attended.reshape(-1, output.K), h.reshape(-1, output.N), weight, norm, output, gate_up, down, act, *parameters
    )  # fmt: skip
    return flat.view(h.shape)


class _OutputAndMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        attended: torch.Tensor,
        h: torch.Tensor,
        weight: torch.Tensor,
        norm: Norm,
        output: LoraGroup,
        gate_up: LoraGroup,
        down: LoraGroup,
        act: str,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        with torch.autocast(h.device.type, enabled=False):
            a, _ = output.low(h.dtype)
            # Not folded: the attention keeps its output anyway, and a buffer would be one more copy of it.
            low = torch.mm(attended, a.t())
            middle = output.product_with(attended, low, None, h)
            buffer = gate_up.room(h.shape[0], h)
            inverse, q = norm_into(
                middle, weight, norm, buffer[:, : gate_up.K], quantize=gate_up.base.eight_bit
            )
            y, both, inner_low = mlp_forward(buffer, q, gate_up, down, act, middle)
        ctx.save_for_backward(attended, low, middle, weight, inverse, buffer, both, inner_low)
        ctx.parts, ctx.offset = (output, gate_up, down, act), norm.offset
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        attended, low, middle, weight, inverse, buffer, both, inner_low = ctx.saved_tensors
        output, gate_up, down, act = ctx.parts
        x, x_low = buffer[:, : gate_up.K], buffer[:, gate_up.K :]
        with torch.autocast(middle.device.type, enabled=False):
            dy = grads[0].contiguous()
            dx, of_mlp = mlp_backward(dy, None, x, x_low, both, inner_low, gate_up, down, act, wanted=True)
            assert dx is not None
            d_middle, _ = norm_backward(dx, middle, weight, inverse, ctx.offset, dy, wants_weight=False)
            d_attended, g = output.input_gradient(d_middle, wanted=ctx.needs_input_grad[0])
            of_output = output.weight_gradients(d_middle, g, attended, low)
        return (d_attended, d_middle, None, None, None, None, None, None, *of_output, *of_mlp)
