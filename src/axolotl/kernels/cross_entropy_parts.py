"""Output head and cross-entropy in one, where each process of a group holds a part of the words (Megatron-LM's way).

As `axolotl.kernels.cross_entropy`, chunk by chunk; of each chunk the processes exchange three numbers a token: the greatest
logit, the sum of exponentials, the logit of the target. Nobody sees the logits of all words.

Shapes: T tokens, D width of the model, v words of this process.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist

from axolotl.kernels.cross_entropy import mean_by_chunks


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
    loss_of = partial(_chunk, group, group.rank() * weight.shape[0])
    return mean_by_chunks(
        x, weight, bias, targets, items, loss_of, ignore_index, softcap, scale, chunks, group=group
    )


def _chunk(
    group: dist.ProcessGroup,
    first: int,
    logits: torch.Tensor,
    targets: torch.Tensor,
    inverse: torch.Tensor,
    ignore: int,
    softcap: float | None,
    scale: float,
    slopes: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `ChunkLoss` over the words of all processes; `first` is the first of this one's, whose slopes it gives."""
    counts = targets != ignore
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
    if not slopes:
        return loss, logits
    slope = powers.div_(sums[0][:, None])
    slope.scatter_add_(1, own[:, None], -mine.to(slope.dtype)[:, None])
    slope *= counts[:, None]
    if bent is not None:
        slope *= 1 - bent * bent
    if scale != 1.0:
        slope = slope * scale
    return loss, (slope * inverse).to(logits.dtype)
