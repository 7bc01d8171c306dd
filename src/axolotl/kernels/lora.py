"""LoRA (arXiv 2106.09685) on frozen linear layers: the low-rank product rides in the frozen GEMM, little is kept.

`y = x W' + s (x A') B'` is `[x, x A'] @ [W, s B]'`: one GEMM with a few more columns and no second pass over the
output. Layers with the same input (query, key, value; gate, up) are one GEMM. Of a feed-forward layer the backward pass
keeps input, gate and up; the gated value is made again.

Shapes: T tokens, K input features, N output features of all layers of a group, R ranks of all its adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from axolotl.kernels.frozen import Frozen
from axolotl.kernels.gates import gated_backward, gated_into, plain_gated
from axolotl.kernels.triton_language import compute_dtype


def place(tensor: torch.Tensor) -> int:
    """Where a tensor's numbers lie, by which it is seen that it was moved."""
    return tensor.data_ptr()


class LoraGroup:
    """Adapted linear layers that share their input: frozen weights, adapters and scalings.

    `a[i]` [R_i,K] and `b[i]` [N_i,R_i] are trained; `biases[i]` [N_i] is frozen, or None. Copies of a and b in the type
    of the products are made once per pass of the model, as `begin_pass` tells.
    """

    def __init__(
        self,
        base: Frozen,
        a: Sequence[torch.nn.Parameter],
        b: Sequence[torch.nn.Parameter],
        scalings: Sequence[float],
        biases: Sequence[torch.Tensor | None],
    ) -> None:
        self.base, self.a, self.b, self.scalings = base, list(a), list(b), list(scalings)
        self.biases = list(biases)
        self.K = a[0].shape[1]
        self.columns = _spans([each.shape[0] for each in b])
        self.ranks = _spans([each.shape[0] for each in a])
        self.N, self.R = self.columns[-1][1], self.ranks[-1][1]
        self._passes = 0
        self._made: tuple[Any, ...] = ()
        self._low: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [*self.a, *self.b]

    def low(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R,K] of all layers, and s B [N,R] with each layer's block in its place, in this type."""
        made = (dtype, self._passes, *((place(p), p._version) for p in self.parameters))
        if made != self._made or self._low is None:
            with torch.no_grad():
                a = torch.cat([p.detach().to(dtype) for p in self.a])
                wide = self.base.wide
                if wide is not None and wide.dtype is dtype:
                    b = wide[:, self.K :]
                else:
                    b = torch.zeros(self.N, self.R, dtype=dtype, device=a.device)
                for p, s, (n0, n1), (r0, r1) in zip(
                    self.b, self.scalings, self.columns, self.ranks, strict=True
                ):
                    b[n0:n1, r0:r1] = p.detach() * s
            self._made, self._low = made, (a, b)
        return self._low

    def begin_pass(self) -> None:
        """A pass of the model begins: the weights may have changed, which fused optimizers do without a trace."""
        self._passes += 1

    def forget(self) -> None:
        """Drops the copies; they are made again when they are needed."""
        self._made, self._low = (), None

    @property
    def folds(self) -> bool:
        return self.base.wide is not None

    def room(self, T: int, x: torch.Tensor) -> torch.Tensor:
        """An empty [T,K+R]: the input at the left, its low-rank image at the right."""
        return torch.empty(T, self.K + self.R, dtype=x.dtype, device=x.device)

    def product(self, buffer: torch.Tensor) -> torch.Tensor:
        """[T,K+R] whose left K columns are filled, to [T,N]; fills the right R columns."""
        a, b = self.low(buffer.dtype)
        x, low = buffer[:, : self.K], buffer[:, self.K :]
        torch.mm(x, a.t(), out=low)
        wide = self.base.wide
        if wide is not None and wide.dtype is buffer.dtype:
            y = torch.mm(buffer, wide.t())
        else:
            y = self.base.product(x)
            for (n0, n1), (r0, r1) in zip(self.columns, self.ranks, strict=True):
                y[:, n0:n1].addmm_(low[:, r0:r1], b[n0:n1, r0:r1].t())
        for bias, (n0, n1) in zip(self.biases, self.columns, strict=True):
            if bias is not None:
                y[:, n0:n1] += bias.to(y.dtype)
        return y

    def input_gradient(self, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dy [T,N] to the input's gradient [T,K] and to dy through s B, [T,R]."""
        a, b = self.low(dy.dtype)
        dx, g = self.base.gradient(dy), torch.mm(dy, b)
        dx.addmm_(g, a)
        return dx, g

    def weight_gradients(
        self, dy: torch.Tensor, g: torch.Tensor, x: torch.Tensor, low: torch.Tensor
    ) -> list[torch.Tensor]:
        """Gradients of all of a, then of all of b."""
        of_a = torch.mm(g.t(), x)
        found = [of_a[r0:r1].to(p.dtype) for p, (r0, r1) in zip(self.a, self.ranks, strict=True)]
        for p, s, (n0, n1), (r0, r1) in zip(self.b, self.scalings, self.columns, self.ranks, strict=True):
            found.append(torch.mm(dy[:, n0:n1].t(), low[:, r0:r1]).to(p.dtype) * s)
        return found


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    found, start = [], 0
    for size in sizes:
        found.append((start, start + size))
        start += size
    return found


def plain_lora(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The twin of one layer of `lora_linears`, by plain torch: x [...,K] to [...,N]."""
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * scaling


def lora_linears(x: torch.Tensor, group: LoraGroup) -> tuple[torch.Tensor, ...]:
    """x [...,K] through all layers of the group: one [...,N_i] for each. Gradients for x, a and b; once."""
    dtype = compute_dtype(x)
    y = _Linears.apply(x.to(dtype).reshape(-1, group.K), group, *group.parameters)
    return tuple(y[:, n0:n1].unflatten(0, x.shape[:-1]) for n0, n1 in group.columns)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: LoraGroup, *parameters: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            buffer = group.room(x.shape[0], x)
            buffer[:, : group.K] = x
            y = group.product(buffer)
        ctx.group = group
        # Where the product read the buffer, it is the only copy of the input; else the input itself is kept.
        kept = (buffer, buffer) if group.folds else (x, buffer[:, group.K :].clone())
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        group: LoraGroup = ctx.group
        x, low = ctx.saved_tensors
        x, low = x[:, : group.K], low[:, -group.R :]
        with torch.autocast(x.device.type, enabled=False):
            dy = grads[0].contiguous()
            dx, g = group.input_gradient(dy)
            of_weights = group.weight_gradients(dy, g, x, low)
        return (dx if ctx.needs_input_grad[0] else None, None, *of_weights)


def plain_lora_mlp(
    x: torch.Tensor, layers: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]], act: str
) -> torch.Tensor:
    """The twin of `lora_mlp`: layers are (weight, a, b, scaling) of gate, up and down."""
    gate, up, down = layers
    return plain_lora(plain_gated(plain_lora(x, *gate), plain_lora(x, *up), act), *down)


def lora_mlp(x: torch.Tensor, gate_up: LoraGroup, down: LoraGroup, act: str) -> torch.Tensor:
    """A gated feed-forward layer, x [...,K] to [...,N of down]: `down(act(gate(x)) * up(x))`, all three with LoRA.

    The first half of the outputs of `gate_up` are the gate. Gradients for x and the adapters; once.
    """
    dtype = compute_dtype(x)
    parameters = [*gate_up.parameters, *down.parameters]
    y: torch.Tensor = _Mlp.apply(x.to(dtype).reshape(-1, gate_up.K), gate_up, down, act, *parameters)
    return y.unflatten(0, x.shape[:-1])


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gate_up: LoraGroup, down: LoraGroup, act: str, *parameters: torch.Tensor
    ) -> torch.Tensor:
        T, M = x.shape[0], down.K
        with torch.autocast(x.device.type, enabled=False):
            buffer = gate_up.room(T, x)
            buffer[:, : gate_up.K] = x
            both = gate_up.product(buffer)
            inner = down.room(T, x)
            gated_into(both[:, :M], both[:, M:], act, inner[:, :M])
            y = down.product(inner)
        kept = (buffer, buffer) if gate_up.folds else (x, buffer[:, gate_up.K :].clone())
        ctx.save_for_backward(*kept, both, inner[:, M:].clone())
        ctx.parts = gate_up, down, act
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, both, inner_low = ctx.saved_tensors
        gate_up, down, act = ctx.parts
        x, low, M = x[:, : gate_up.K], low[:, -gate_up.R :], down.K
        with torch.autocast(x.device.type, enabled=False):
            dy = grads[0].contiguous()
            d_inner, g = down.input_gradient(dy)
            d_both = torch.empty_like(both)
            gated_backward(d_inner, both[:, :M], both[:, M:], act, d_both[:, :M], d_both[:, M:], d_inner)
            # The gradient of the gated value has become the gated value.
            of_down = down.weight_gradients(dy, g, d_inner, inner_low)
            dx, g = gate_up.input_gradient(d_both)
            of_gate_up = gate_up.weight_gradients(d_both, g, x, low)
        return (dx if ctx.needs_input_grad[0] else None, None, None, None, *of_gate_up, *of_down)
