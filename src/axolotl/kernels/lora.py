"""LoRA (arXiv 2106.09685) on frozen linear layers: the low-rank product rides in the frozen GEMM, little is kept.

`y = x W' + s (x A') B'` is `[x, s x A'] @ [W, B]'`: one GEMM with a few more columns and no second pass over the
output. Layers with the same input (query, key, value; gate, up) are one GEMM. Of a feed-forward layer the backward pass
keeps input, gate and up; the gated value is made again.

Shapes: T tokens, K input features, N output features of all layers of a group, R ranks of all its adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from axolotl.kernels.fp8 import Quantized
from axolotl.kernels.frozen import Frozen
from axolotl.kernels.gates import gated_backward, gated_into, plain_gated
from axolotl.kernels.triton_language import compute_dtype


def place(tensor: torch.Tensor) -> int:
    """Where a tensor's numbers lie, by which it is seen that it was moved."""
    return tensor.data_ptr()


class LoraGroup:
    """Adapted linear layers that share their input: frozen weights, adapters and scalings.

    `a[i]` [R_i,K] and `b[i]` [N_i,R_i] are trained; `biases[i]` [N_i] is frozen, or None. Copies of a and b in the type
    of the products are made once per pass of the model, for all its groups together: see `refresh`. R is padded with
    zeros to a multiple of STEP, since the matrix units want rows that begin on 16 bytes.
    """

    STEP = 16

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
        self.N, self.R = self.columns[-1][1], padded(self.ranks[-1][1])
        self._made: tuple[Any, ...] = ()
        self._low: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [*self.a, *self.b]

    def _state(self, dtype: torch.dtype) -> tuple[Any, ...]:
        return (dtype, *((place(p), p._version) for p in self.parameters))

    def low(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """s A [R,K] of all layers, and B [N,R] with each layer's block in its place, in this type."""
        if self._low is None or self._state(dtype) != self._made:
            refresh([self], dtype)
        assert self._low is not None
        return self._low

    def _room_for(self, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """Where the copies stand: (copy, parameter, scaling) of each a and b."""
        if self._low is None or self._low[0].dtype is not dtype or self._low[0].device != self.a[0].device:
            options: Any = {"dtype": dtype, "device": self.a[0].device}
            wide = self.base.widened(dtype, self.R) if self.base.standing else None
            b = torch.zeros(self.N, self.R, **options) if wide is None else wide[:, self.K :]
            self._low = torch.zeros(self.R, self.K, **options), b
        a, b = self._low
        # The scaling is in a, and so in the low-rank image: the gradient of b needs no further pass.
        parts = zip(self.a, self.scalings, self.ranks, strict=True)
        found = [(a[r0:r1], p.detach(), s) for p, s, (r0, r1) in parts]
        blocks = zip(self.b, self.columns, self.ranks, strict=True)
        found += [(b[n0:n1, r0:r1], p.detach(), 1.0) for p, (n0, n1), (r0, r1) in blocks]
        self._made = self._state(dtype)
        return found

    def forget(self) -> None:
        """Drops the copies; they are made again when they are needed."""
        self._made, self._low = (), None

    @property
    def folds(self) -> bool:
        return self.base.folds

    def _wide(self, dtype: torch.dtype) -> torch.Tensor | None:
        """[W, B], [N,K+R], where the base folds."""
        _, b = self.low(dtype)
        wide = self.base.widened(dtype, self.R)
        if wide is not None and not self.base.standing:
            wide[:, self.K :] = b
        return wide

    def room(self, T: int, x: torch.Tensor) -> torch.Tensor:
        """An empty [T,K+R]: the input at the left, its low-rank image at the right."""
        return torch.empty(T, self.K + self.R, dtype=x.dtype, device=x.device)

    def product(
        self, buffer: torch.Tensor, q: Quantized | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T,K+R] whose left K columns are filled, to [T,N], plus `residual`; fills the right R columns.

        `q`: the left columns in 8 bits, where somebody has made them already.
        """
        a, _ = self.low(buffer.dtype)
        x, low = buffer[:, : self.K], buffer[:, self.K :]
        torch.mm(x, a.t(), out=low)
        wide = self._wide(buffer.dtype)
        if wide is None:
            return self.product_with(x, low, q, residual)
        y = torch.mm(buffer, wide.t()) if residual is None else torch.addmm(residual, buffer, wide.t())
        return self._biased(y)

    def product_with(
        self, x: torch.Tensor, low: torch.Tensor, q: Quantized | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """x [T,K] and its low-rank image [T,R] to [T,N], plus `residual`, without the fold."""
        _, b = self.low(x.dtype)
        if residual is not None:
            y = self.base.product_onto(torch.addmm(residual, low, b.t()), x, q)
        else:
            y = self.base.product(x, q)
            for (n0, n1), (r0, r1) in zip(self.columns, self.ranks, strict=True):
                y[:, n0:n1].addmm_(low[:, r0:r1], b[n0:n1, r0:r1].t())
        return self._biased(y)

    def _biased(self, y: torch.Tensor) -> torch.Tensor:
        for bias, (n0, n1) in zip(self.biases, self.columns, strict=True):
            if bias is not None:
                y[:, n0:n1] += bias.to(y.dtype)
        return y

    def input_gradient(
        self, dy: torch.Tensor, q: Quantized | None = None, *, wanted: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """dy [T,N] to the input's gradient [T,K], None unless `wanted`, and to dy through B, [T,R].

        `q`: dy in 8 bits, as the base's `incoming` makes it, where somebody has made it already.
        """
        a, b = self.low(dy.dtype)
        if not wanted:
            return None, torch.mm(dy, b)
        # Where the output is not much wider than the input, a few columns more cost less than a pass of their own.
        wide = self._wide(dy.dtype) if self.N <= 2 * self.K else None
        if wide is not None:
            both = torch.mm(dy, wide)
            dx, g = both[:, : self.K], both[:, self.K :]
        else:
            dx, g = self.base.gradient(dy, q), torch.mm(dy, b)
        dx.addmm_(g, a)
        return dx, g

    def weight_gradients(
        self, dy: torch.Tensor, g: torch.Tensor, x: torch.Tensor, low: torch.Tensor
    ) -> list[torch.Tensor]:
        """Gradients of all of a, then of all of b."""
        of_a = product_as(g.t(), x, self.a[0].dtype)
        if len(set(self.scalings)) == 1:
            of_a *= self.scalings[0]
        else:
            for s, (r0, r1) in zip(self.scalings, self.ranks, strict=True):
                of_a[r0:r1] *= s
        found = [of_a[r0:r1] for r0, r1 in self.ranks]
        for p, (n0, n1), (r0, r1) in zip(self.b, self.columns, self.ranks, strict=True):
            found.append(product_as(dy[:, n0:n1].t(), low[:, r0:r1], p.dtype))
        return found


def product_as(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b in another number type, without rounding to theirs in between where the GPU can."""
    if a.is_cuda and a.dtype is not dtype is torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def refresh(groups: Sequence[LoraGroup], dtype: torch.dtype) -> None:
    """Copies the adapters of all groups as they are now, in a few launches for the whole model.

    A pass of the model begins with it: fused optimizers change weights without a trace.
    """
    with torch.no_grad():
        pairs = [pair for group in groups for pair in group._room_for(dtype)]
        if not pairs:
            return
        # Apart, since copies into a part of a buffer are launched one by one, and would take the others with them.
        for whole in (True, False):
            these = [each for each in pairs if each[0].is_contiguous() is whole]
            scaled = [(c, p, s) for c, p, s in these if s != 1.0]
            plain = [(c, p) for c, p, s in these if s == 1.0]
            if scaled:
                products = torch._foreach_mul([p for _, p, _ in scaled], [s for _, _, s in scaled])
                torch._foreach_copy_([c for c, _, _ in scaled], list(products))
            if plain:
                torch._foreach_copy_([c for c, _ in plain], [p for _, p in plain])


def padded(ranks: int) -> int:
    """Ranks with the zeros that make their rows begin where the matrix units want them."""
    return -(-ranks // LoraGroup.STEP) * LoraGroup.STEP


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
    outs = _Linears.apply(x.to(dtype).reshape(-1, group.K), group, *group.parameters)
    return tuple(y.unflatten(0, x.shape[:-1]) for y in outs)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: LoraGroup, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        with torch.autocast(x.device.type, enabled=False):
            if group.folds:
                # The buffer is the only copy of the input that is kept.
                x_and_low = group.room(x.shape[0], x)
                x_and_low[:, : group.K] = x
                y = group.product(x_and_low)
                ctx.save_for_backward(x_and_low, x_and_low)
            else:
                low = torch.mm(x, group.low(x.dtype)[0].t())
                y = group.product_with(x, low, None, None)
                ctx.save_for_backward(x, low)
        ctx.group = group
        return outputs(y, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        group: LoraGroup = ctx.group
        x, low = ctx.saved_tensors
        x, low = x[:, : group.K], low[:, -group.R :]
        with torch.autocast(x.device.type, enabled=False):
            dy = incoming(grads)
            dx, g = group.input_gradient(dy, wanted=ctx.needs_input_grad[0])
            of_weights = group.weight_gradients(dy, g, x, low)
        return (dx, None, *of_weights)


def outputs(y: torch.Tensor, group: LoraGroup) -> tuple[torch.Tensor, ...]:
    """[T,N] as one tensor per layer. The last is a copy where there are several: of query, key and value only the value
    outlives the rotary embedding, and would keep all three."""
    parts = [y[:, n0:n1] for n0, n1 in group.columns]
    return (y,) if len(parts) == 1 else (*parts[:-1], parts[-1].contiguous())


def incoming(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """The gradients of `outputs`, side by side."""
    return grads[0].contiguous() if len(grads) == 1 else torch.cat(list(grads), dim=1)


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
        with torch.autocast(x.device.type, enabled=False):
            buffer = gate_up.room(x.shape[0], x)
            buffer[:, : gate_up.K] = x
            y, both, inner_low = mlp_forward(buffer, None, gate_up, down, act, None)
        kept = (buffer, buffer) if gate_up.folds else (x, buffer[:, gate_up.K :].clone())
        ctx.save_for_backward(*kept, both, inner_low)
        ctx.parts = gate_up, down, act
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, both, inner_low = ctx.saved_tensors
        gate_up, down, act = ctx.parts
        x, low = x[:, : gate_up.K], low[:, -gate_up.R :]
        wanted = ctx.needs_input_grad[0]
        with torch.autocast(x.device.type, enabled=False):
            dy = grads[0].contiguous()
            dx, found = mlp_backward(dy, None, x, low, both, inner_low, gate_up, down, act, wanted=wanted)
        return (dx, None, None, None, *found)


def mlp_forward(
    buffer: torch.Tensor,
    q: Quantized | None,
    gate_up: LoraGroup,
    down: LoraGroup,
    act: str,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A gated feed-forward layer on `buffer` [T,K+R] as `LoraGroup.product` takes it: its output [T,N] plus `residual`,
    gate and up [T,2M], and the gated value's low-rank image [T,R]."""
    T, M = buffer.shape[0], down.K
    both = gate_up.product(buffer, q)
    inner = down.room(T, buffer)
    q = gated_into(both[:, :M], both[:, M:], act, inner[:, :M], quantize=down.base.eight_bit)
    return down.product(inner, q, residual), both, inner[:, M:].clone()


def mlp_backward(
    dy: torch.Tensor,
    q: Quantized | None,
    x: torch.Tensor,
    low: torch.Tensor,
    both: torch.Tensor,
    inner_low: torch.Tensor,
    gate_up: LoraGroup,
    down: LoraGroup,
    act: str,
    *,
    wanted: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """dy [T,N] to the gradient of x [T,K], None unless `wanted`, and to those of `gate_up`'s and `down`'s adapters."""
    M = down.K
    d_inner, g = down.input_gradient(dy, q)
    assert d_inner is not None
    d_both = torch.empty_like(both)
    q = gated_backward(
        d_inner, both[:, :M], both[:, M:], act, d_both[:, :M], d_both[:, M:], d_inner,
        quantize=gate_up.base.eight_bit and wanted, scale=gate_up.base.column_scale,
    )  # fmt: skip
    # The gradient of the gated value has become the gated value.
    of_down = down.weight_gradients(dy, g, d_inner, inner_low)
    dx, g = gate_up.input_gradient(d_both, q, wanted=wanted)
    return dx, [*gate_up.weight_gradients(d_both, g, x, low), *of_down]
