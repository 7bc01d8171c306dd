"""Output head and cross-entropy in one: the logits of all tokens never exist at the same time.

The tokens go through in chunks. While a chunk's logits are there, its loss and its gradients are made, so that the
backward pass only multiplies by the incoming gradient. A frozen head gets no gradient and costs no product for one.
The idea of gradients in the forward pass is that of Liger-Kernel (arXiv 2410.10989); the code is ours.

Shapes: T tokens, D width of the model, V words of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from axolotl.kernels.triton_language import compute_dtype, power_of_2, programs, runs_on

CHUNK_LOGITS = {"cuda": 1 << 28, "cpu": 1 << 24}
"""Logits that one chunk holds, by kind of device."""

ChunkLoss = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, int, float | None, float, bool],
    tuple[torch.Tensor, torch.Tensor],
]
"""(logits, targets, one over the items, ignored target, softcap, scale, whether slopes are wanted) → the summed loss of a
chunk, and the gradient of the mean loss with respect to its raw logits, in their type."""


def plain_linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    items: torch.Tensor | float | None = None,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """The twin of `linear_cross_entropy`: all logits at once, gradients by autograd."""
    logits = F.linear(x, weight, bias)
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    total = F.cross_entropy(logits.float(), targets, ignore_index=ignore_index, reduction="sum")
    return total / ((targets != ignore_index).sum() if items is None else items)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    items: torch.Tensor | float | None = None,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
    chunks: int | None = None,
    triton: bool | None = None,
) -> torch.Tensor:
    """Mean cross-entropy of `softcap(scale * (x @ weight.T + bias))` with `targets`, a float32 scalar.

    x [T,D], weight [V,D], bias [V], targets [T] of word numbers or `ignore_index`. The sum over tokens is divided by
    `items` (a number or a scalar tensor), or by the tokens that are not ignored. `chunks`: into how many pieces the
    tokens are cut; by default as many as keep a chunk's logits near CHUNK_LOGITS. `triton`: use its program for the
    softmax; by default where it can run. Differentiable once, in x, weight and bias.
    Raises ValueError for shapes that do not belong together.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}")
    use_triton = runs_on(x) if triton is None else triton
    loss_of = _chunk_by_triton if use_triton else _chunk
    return mean_by_chunks(x, weight, bias, targets, items, loss_of, ignore_index, softcap, scale, chunks)


def mean_by_chunks(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    items: torch.Tensor | float | None,
    loss_of: ChunkLoss,
    ignore_index: int,
    softcap: float | None,
    scale: float,
    chunks: int | None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The mean loss by `loss_of` over chunks of the tokens, a float32 scalar; see `linear_cross_entropy` for the rest.

    `group`: processes that each hold a part of the words; the gradient of x is summed over them.
    """
    if items is None:
        items = (targets != ignore_index).sum()
    divisor = torch.as_tensor(items, dtype=torch.float32, device=x.device)
    T, V = x.shape[0], weight.shape[0]
    most = CHUNK_LOGITS.get(x.device.type, CHUNK_LOGITS["cuda"])
    # Of equal length, so that the last one is not a stub.
    count = chunks or -(-T * V // max(most, V)) or 1
    length = -(-T // count)
    options = (ignore_index, softcap, scale, max(1, min(length, T)), loss_of, compute_dtype(x), group)
    loss: torch.Tensor = _LinearCrossEntropy.apply(x, weight, bias, targets, divisor, options)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        divisor: torch.Tensor,
        options: tuple[int, float | None, float, int, ChunkLoss, torch.dtype, dist.ProcessGroup | None],
    ) -> torch.Tensor:
        ignore, softcap, scale, length, loss_of, dtype, group = options
        wants_x, wants_w, wants_b = ctx.needs_input_grad[:3]
        inverse = divisor.reciprocal()
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        # What is cast here is cast by the plain path too: F.linear under autocast, or a head of another type.
        w = weight.to(dtype)
        dx = torch.empty_like(x) if wants_x else None
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if wants_w else None
        db = torch.zeros(weight.shape[0], dtype=torch.float32, device=x.device) if wants_b else None
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, x.shape[0], length):
                part, y = x[start : start + length].to(dtype), targets[start : start + length]
                logits = torch.mm(part, w.t())
                if bias is not None:
                    logits += bias.to(dtype)
                loss, slope = loss_of(
                    logits, y, inverse, ignore, softcap, scale, any(ctx.needs_input_grad[:3])
                )
                total += loss
                if dx is not None:
                    dx[start : start + length] = torch.mm(slope, w)
                if dw is not None:
                    dw += torch.mm(slope.t(), part)
                if db is not None:
                    db += slope.sum(0, dtype=torch.float32)
                del logits, slope
        if dx is not None and group is not None:
            dist.all_reduce(dx, group=group)
        # Not as saved tensors: hooks that move those to the CPU (`activation_offloading`) would carry the head's gradient
        # there and back in each step. They are of this function's making, so nothing can change them meanwhile.
        ctx.gradients = (
            dx,
            None if dw is None else dw.to(weight.dtype),
            None if db is None or bias is None else db.to(bias.dtype),
        )
        return total * inverse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Raises RuntimeError where it is gone through a second time, as autograd does for freed tensors."""
        made, ctx.gradients = ctx.gradients, None
        if made is None:
            raise RuntimeError(
                "linear_cross_entropy keeps its gradients for one backward pass (retain_graph does not hold them)."
            )
        return (*(None if g is None else g.mul_(grads[0].to(g.dtype)) for g in made), None, None, None)


def _chunk(
    logits: torch.Tensor,
    targets: torch.Tensor,
    inverse: torch.Tensor,
    ignore: int,
    softcap: float | None,
    scale: float,
    slopes: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of a chunk, and the gradient of the mean loss with respect to its raw logits, in their type."""
    z = logits.float()
    if scale != 1.0:
        z = z * scale
    bent = None
    if softcap is not None:
        bent = torch.tanh(z / softcap)
        z = bent * softcap
    kept = targets != ignore
    at = targets.masked_fill(~kept, 0)[:, None]
    norm = torch.logsumexp(z, dim=1, keepdim=True)
    loss = (norm - z.gather(1, at)).masked_fill(~kept[:, None], 0.0).sum()
    if not slopes:
        return loss, logits
    p = (z - norm).exp_()
    p.scatter_add_(1, at, torch.full_like(at, -1.0, dtype=p.dtype))
    p *= (kept[:, None] * inverse).to(p.dtype)
    if bent is not None:
        p *= 1.0 - bent * bent
    if scale != 1.0:
        p *= scale
    return loss, p.to(logits.dtype)


def _chunk_by_triton(
    logits: torch.Tensor,
    targets: torch.Tensor,
    inverse: torch.Tensor,
    ignore: int,
    softcap: float | None,
    scale: float,
    slopes: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by one program per token, which writes the gradients over the logits."""
    T, V = logits.shape
    losses = torch.empty(T, dtype=torch.float32, device=logits.device)
    programs("cross_entropy").cross_entropy[(T,)](
        logits,
        targets,
        losses,
        inverse,
        logits.stride(0),
        softcap or 0.0,
        scale,
        V=V,
        IGNORE=ignore,
        CAPPED=softcap is not None,
        SLOPES=slopes,
        BLOCK=min(8192, power_of_2(V)),
        num_warps=16,
    )
    return losses.sum(), logits
