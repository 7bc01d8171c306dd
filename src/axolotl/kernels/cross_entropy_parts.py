"""Output head and cross-entropy in one, where each process of a group holds a part of the words (Megatron-LM's way).

As `axolotl.kernels.cross_entropy`, chunk by chunk; of each chunk the processes exchange three numbers a token: the greatest
logit, the sum of exponentials, the logit of the target. Nobody sees the logits of all words.

Shapes: T tokens, D width of the model, v words of this process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from axolotl.kernels.cross_entropy import CHUNK_LOGITS
from axolotl.kernels.triton_language import compute_dtype


def divided_linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    items: torch.Tensor | float | None,
    *,
    group: dist.ProcessGroup,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
    chunks: int | None = None,
) -> torch.Tensor:
    """Mean cross-entropy over all words, a float32 scalar; the same in every process, like the gradient of `x`.

    x [T,D] and targets [T] are those of all processes, weight [v,D] and bias [v] this process's, in the order of ranks and of
    equal size. Every process of the group has to call it. Differentiable once. See `linear_cross_entropy` for the rest.
    """
    if items is None:
        items = (targets != ignore_index).sum()
    divisor = torch.as_tensor(items, dtype=torch.float32, device=x.device)
    T, v = x.shape[0], weight.shape[0]
    most = CHUNK_LOGITS.get(x.device.type, CHUNK_LOGITS["cuda"])
    count = chunks or -(-T * v // max(most, v)) or 1
    options = (ignore_index, softcap, scale, max(1, -(-T // count)), compute_dtype(x), group)
    loss: torch.Tensor = _Divided.apply(x, weight, bias, targets, divisor, options)
    return loss


class _Divided(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        divisor: torch.Tensor,
        options: tuple[int, float | None, float, int, torch.dtype, dist.ProcessGroup],
    ) -> torch.Tensor:
        ignore, softcap, scale, length, dtype, group = options
        wants_x, wants_w, wants_b = ctx.needs_input_grad[:3]
        inverse = divisor.reciprocal()
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        w, first = weight.to(dtype), group.rank() * weight.shape[0]
        dx = torch.empty_like(x) if wants_x else None
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if wants_w else None
        db = torch.zeros(weight.shape[0], dtype=torch.float32, device=x.device) if wants_b else None
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, x.shape[0], length):
                part, y = x[start : start + length].to(dtype), targets[start : start + length]
                logits = torch.mm(part, w.t())
                if bias is not None:
                    logits += bias.to(dtype)
                loss, slope = _chunk(logits, y, y != ignore, first, softcap, scale, group)
                total += loss
                slope = (slope * inverse).to(dtype)
                if dx is not None:
                    dx[start : start + length] = torch.mm(slope, w)
                if dw is not None:
                    dw += torch.mm(slope.t(), part)
                if db is not None:
                    db += slope.sum(0, dtype=torch.float32)
        if dx is not None:
            dist.all_reduce(dx, group=group)
        ctx.save_for_backward(
            dx,
            None if dw is None else dw.to(weight.dtype),
            None if db is None or bias is None else db.to(bias.dtype),
        )
        return total * inverse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = (None if g is None else g * grads[0].to(g.dtype) for g in ctx.saved_tensors)
        return (*found, None, None, None)


def _chunk(
    logits: torch.Tensor,
    targets: torch.Tensor,
    counts: torch.Tensor,
    first: int,
    softcap: float | None,
    scale: float,
    group: dist.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of a chunk, and the gradient of that sum with respect to this process's raw logits, in float32."""
    z = logits.float()
    if scale != 1.0:
        z = z * scale
    bent = None
    if softcap is not None:
        bent = torch.tanh(z / softcap)
        z = bent * softcap
    top = z.amax(1)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    powers = torch.exp(z - top[:, None])
    own = targets - first
    mine = counts & (own >= 0) & (own < z.shape[1])
    own = own.clamp(0, z.shape[1] - 1)
    wanted = torch.where(mine, z.gather(1, own[:, None])[:, 0], 0.0)
    sums = torch.stack((powers.sum(1), wanted))
    dist.all_reduce(sums, group=group)
    loss = torch.where(counts, sums[0].log() + top - sums[1], 0.0).sum()
    slope = powers.div_(sums[0][:, None])
    slope.scatter_add_(1, own[:, None], -mine.to(slope.dtype)[:, None])
    slope *= counts[:, None]
    if bent is not None:
        slope *= 1 - bent * bent
    return loss, slope * scale if scale != 1.0 else slope
