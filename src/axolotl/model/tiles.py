"""Feed-forward layers in tiles of tokens: what is as wide as the layer's inside exists for one tile at a time.

A feed-forward layer sees each token by itself, so its tokens can go through in pieces. Kept for the backward pass is
its input alone; there each tile is computed again, and its gradient taken (as in Arctic's long-sequence training, arXiv
2506.13996). Gradients of 16-bit weights are summed over the tiles in float32, as one product over all tokens sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from axolotl.kernels.gates import plain_gated
from axolotl.model.decoder_layers import TILE as HALVES
from axolotl.model.frames import autocast_of, drawing_again, draws, known, random_state
from axolotl.model.replace import Replacements
from axolotl.model.shapes import mlp_of

TILE = 4096
"""Tokens of a tile where no number of tiles is asked for: enough for the products to be as fast as whole ones."""
SMALL_TILE = 1024
"""The same where layer inputs wait elsewhere: a tile is then a large part of what is on the device."""
NAMES = ("mlp", "feed_forward", "ffn")


def tile_feed_forward(
    model: nn.Module,
    made: Replacements,
    tiles: int | None = None,
    *,
    original: bool = True,
    replaced_only: bool = False,
    tokens: int = TILE,
) -> int:
    """Gives each feed-forward layer a forward that works in `tiles` pieces, by default of `tokens` tokens.

    `original`: the pieces go through the layer's present code; else through the formula of a gated layer.
    `replaced_only`: only layers that have a kernel. Returns how many layers were tiled; those that route tokens cannot be.
    """
    count = 0

    def length(of: int) -> int:
        return max(1, -(-of // tiles) if tiles else tokens)

    for layer in list(model.modules()):
        if HALVES in layer.__dict__:
            _tile_half(layer, length, made)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] not in NAMES or not _token_by_token(module):
            continue
        if replaced_only and "forward" not in module.__dict__:
            continue
        inner = module.forward if original else _formula(module)
        if inner is not None:
            made.forward(module, tiled_forward(module, inner, tiles, tokens), "tiled feed-forward layer")
            count += 1
    return count


def _tile_half(layer: nn.Module, length: Callable[[int], int], made: Replacements) -> None:
    """Has the fused half of a layer behind its attention work in tiles; its feed-forward layer is not called then."""
    setattr(layer, HALVES, length)

    def undo() -> None:
        if HALVES in layer.__dict__:
            setattr(layer, HALVES, None)

    made.undoing(undo)


def _token_by_token(module: nn.Module) -> bool:
    """Whether a module is made of linear layers and functions of single numbers."""
    holders = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
    return bool(holders) and all(
        isinstance(getattr(m, "in_features", None), int) or isinstance(m, nn.ParameterDict) for m in holders
    )


def _formula(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    mlp = mlp_of(module)
    if mlp is None:
        return None

    def run(x: torch.Tensor) -> torch.Tensor:
        gate = mlp.gate(x)
        gate, up = gate.chunk(2, dim=-1) if mlp.up is None else (gate, mlp.up(x))
        out: torch.Tensor = mlp.down(plain_gated(gate, up, mlp.act))
        return out

    return run


def tiled_forward(
    module: nn.Module, inner: Callable[..., torch.Tensor], tiles: int | None, most: int = TILE
) -> Callable[..., torch.Tensor]:
    """A forward for `module` that sends tiles of its input [...,H] through `inner`."""
    random = draws(module)

    def forward(self: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
        length = -(-tokens // tiles) if tiles else most
        trained = [p for p in self.parameters() if p.requires_grad]
        if (
            args
            or kwargs
            or tokens <= length
            or not (torch.is_grad_enabled() and (x.requires_grad or trained))
        ):
            return inner(x, *args, **kwargs)

        def run(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = _Tiles.apply(x, inner, length, random, *trained)
            return out

        return known(run, x, keeps=False)

    return forward


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        inner: Callable[..., torch.Tensor],
        length: int,
        random: bool,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.inner, ctx.length, ctx.weights = inner, length, weights
        ctx.autocast = autocast_of(x.device.type)
        ctx.random = random_state(x.device.type) if random else None
        out: torch.Tensor | None = None
        for start, part in _parts(x, length):
            y = inner(part)
            if out is None:
                out = torch.empty(x.numel() // x.shape[-1], y.shape[-1], dtype=y.dtype, device=y.device)
            out[start : start + part.shape[1]] = y[0]
        assert out is not None
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        wants_x, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        weights = [w for w, on in zip(ctx.weights, wanted, strict=True) if on]
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wants_x else None
        rows = None if dx is None else dx.view(-1, x.shape[-1])
        sums: list[torch.Tensor | None] = [None] * len(weights)
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        with contextlib.ExitStack() as stack:
            for each in ctx.autocast:
                stack.enter_context(torch.autocast(**each))
            if ctx.random is not None:
                stack.enter_context(drawing_again(ctx.random, x.device.type))
            for start, part in _parts(x, ctx.length):
                stop = start + part.shape[1]
                part = part.detach().requires_grad_(wants_x)
                with torch.enable_grad():
                    y = ctx.inner(part)
                found = list(_gradients(y, [part, *weights] if wants_x else weights, dy[None, start:stop]))
                if rows is not None:
                    first = found.pop(0)
                    rows[start:stop] = 0 if first is None else first[0]
                for i, g in enumerate(found):
                    sums[i] = _added(sums[i], g)
                del y, found
        of_weights = iter(None if s is None else s.to(w.dtype) for s, w in zip(sums, weights, strict=True))
        return (dx, None, None, None, *(next(of_weights) if on else None for on in wanted))


def _parts(x: torch.Tensor, length: int) -> list[tuple[int, torch.Tensor]]:
    """Tiles [1,n,H] of x [...,H], with where they begin."""
    rows = x.reshape(1, -1, x.shape[-1])
    return [(start, rows[:, start : start + length]) for start in range(0, rows.shape[1], length)]


def _gradients(y: torch.Tensor, of: Sequence[torch.Tensor], dy: torch.Tensor) -> tuple[Any, ...]:
    return torch.autograd.grad(y, of, dy.to(y.dtype), allow_unused=True)


def _added(total: torch.Tensor | None, gradient: torch.Tensor | None) -> torch.Tensor | None:
    if gradient is None:
        return total
    if total is None:
        return gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
    return total.add_(gradient)
