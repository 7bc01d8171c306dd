"""Attention over the documents of a packed row: every way to compute it that may be there, in one table.

All of them take queries [N,H,D], keys and values [N,G,D] of N tokens on end, and the borders of the documents; none
builds a mask of all tokens against all.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Run = Callable[..., torch.Tensor]
"""run(q, k, v, cu, longest, scale, window) → [N,H,D]; `window` is the number of tokens seen, or None."""


@dataclass(frozen=True)
class Varlen:
    """One way: how it is had, and what it cannot do."""

    load: Callable[[], Run | None]
    """None where its package is missing."""
    cuda_only: bool = True
    windows: bool = True


def load_attribute(module: str, name: str) -> Any:
    """An attribute of an optional module, or None. A package that is half installed counts as absent."""
    try:
        if importlib.util.find_spec(module) is None:
            return None
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, OSError, RuntimeError, AttributeError, ValueError):
        return None


class Remembered:
    """What was made of a tensor last: making it may wait for the device, and all layers of a pass ask for the same."""

    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        self.make = make
        self.tensor: weakref.ref[torch.Tensor] | None = None
        self.value: Any = None

    def __call__(self, tensor: torch.Tensor) -> Any:
        if self.tensor is None or self.tensor() is not tensor:
            self.value = self.make(tensor)
            self.tensor = weakref.ref(tensor)
        return self.value


on_host: Callable[[torch.Tensor], list[int]] = Remembered(lambda cu: cu.tolist())
"""The borders as numbers."""


def _one(out: Any) -> torch.Tensor:
    first: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return first


def _flash(module: str) -> Run | None:
    flash = load_attribute(module, "flash_attn_varlen_func")
    if flash is None:
        return None

    def run(
        q: Any, k: Any, v: Any, cu: Any, longest: int, scale: float | None, window: int | None
    ) -> torch.Tensor:
        given = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
        if window:
            given["window_size"] = (window - 1, 0)
        return _one(flash(q, k, v, softmax_scale=scale, causal=True, **given))

    return run


def _torch_varlen() -> Run | None:
    varlen = load_attribute("torch.nn.attention.varlen", "varlen_attn")
    if varlen is None:
        return None
    # torch says "causal" by a window that is closed on the right; newer versions want grouped heads announced.
    announce = "enable_gqa" in inspect.signature(varlen).parameters

    def run(
        q: Any, k: Any, v: Any, cu: Any, longest: int, scale: float | None, window: int | None
    ) -> torch.Tensor:
        more = {"enable_gqa": True} if announce and q.shape[1] != k.shape[1] else {}
        sides = (window - 1 if window else -1, 0)
        return _one(varlen(q, k, v, cu, cu, longest, longest, scale=scale, window_size=sides, **more))

    return run


def _flex() -> Run | None:
    flex = load_attribute("torch.nn.attention.flex_attention", "flex_attention")
    block_mask = load_attribute("torch.nn.attention.flex_attention", "create_block_mask")
    if flex is None or block_mask is None:
        return None
    compiled = torch.compile(flex, dynamic=False)

    @functools.cache
    def masks(window: int | None) -> Remembered:
        def make(cu: torch.Tensor) -> Any:
            # Behind the documents stands one more, of what fills the row up.
            tokens = steady_length(on_host(cu)[-1])
            at = torch.arange(tokens, device=cu.device)
            document = torch.bucketize(at, cu[1:].long(), right=True)

            def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
                same = (document[i] == document[j]) & (i >= j)
                return same & (i - j < window) if window else same

            return block_mask(seen, None, None, tokens, tokens, device=cu.device)

        return Remembered(make)

    def run(
        q: Any, k: Any, v: Any, cu: Any, longest: int, scale: float | None, window: int | None
    ) -> torch.Tensor:
        tokens = q.shape[0]
        filled = steady_length(tokens) - tokens
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, filled)).transpose(0, 1)[None] for x in (q, k, v))
        out = compiled(
            q, k, v, block_mask=masks(window)(cu), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return _one(out)[0].transpose(0, 1)[:tokens]

    return run


def steady_length(tokens: int) -> int:
    """The length to which a row is filled up so that rows of about one length are of just one: what is compiled for a
    length would be compiled anew for each other. At most an eighth is added, beyond 128 tokens."""
    step = max(128, (1 << max(tokens - 1, 0).bit_length()) // 8)
    return -(-tokens // step) * step


def _places(cu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For documents side by side in rows of the longest one: which token stands where, and where each token went."""
    borders = on_host(cu)
    lengths = [b - a for a, b in itertools.pairwise(borders) if b > a]
    starts = [a for a, b in itertools.pairwise(borders) if b > a]
    longest = max(lengths, default=0)
    at = torch.arange(longest)
    # Behind a document's end stands its last token again, which no earlier token sees.
    take = torch.stack([a + at.clamp(max=n - 1) for a, n in zip(starts, lengths, strict=True)])
    back = torch.cat([i * longest + at[:n] for i, n in enumerate(lengths)])
    return take.to(cu.device), back.to(cu.device)


_side_by_side: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = Remembered(_places)


def _padded() -> Run:
    def run(
        q: Any, k: Any, v: Any, cu: Any, longest: int, scale: float | None, window: int | None
    ) -> torch.Tensor:
        take, back = _side_by_side(cu)
        grouped = q.shape[1] != k.shape[1]
        q, k, v = (x[take].transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)[back]

    return run


def _documents() -> Run:
    def run(
        q: Any, k: Any, v: Any, cu: Any, longest: int, scale: float | None, window: int | None
    ) -> torch.Tensor:
        grouped = q.shape[1] != k.shape[1]
        outs = []
        for a, b in itertools.pairwise(on_host(cu)):
            if b > a:
                q1, k1, v1 = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
                out = F.scaled_dot_product_attention(
                    q1, k1, v1, is_causal=True, scale=scale, enable_gqa=grouped
                )
                outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return run


VARLEN: dict[str, Varlen] = {
    "flash_attention_4": Varlen(lambda: _flash("flash_attn.cute")),
    "flash_attention_3": Varlen(lambda: _flash("flash_attn_interface")),
    "flash_attention_2": Varlen(lambda: _flash("flash_attn")),
    "torch_varlen": Varlen(_torch_varlen),
    "flex": Varlen(_flex),
    "padded": Varlen(_padded, cuda_only=False, windows=False),
    "documents": Varlen(_documents, cuda_only=False, windows=False),
}
"""`documents`: one call for each; `padded`: one call for all, filled up to the longest."""

UNMEASURED = ("flash_attention_2", "torch_varlen")
"""What is taken on a GPU where nothing was measured: the first that is there."""


@functools.cache
def kernel(name: str) -> Run | None:
    """One way of the table, loaded; None where its package is missing."""
    return VARLEN[name].load()


def unusable(name: str, device: str, dtype: torch.dtype, head_dim: int, window: int | None) -> str:
    """Why a way cannot be taken for such tensors; empty where it can."""
    way = VARLEN[name]
    if window and not way.windows:
        return "it knows no sliding window"
    if way.cuda_only:
        if device != "cuda":
            return "it needs a GPU"
        if dtype not in (torch.float16, torch.bfloat16):
            return "it computes in 16 bits"
        if head_dim > 256 or head_dim % 8:
            return f"it knows no heads of {head_dim}"
    return "" if kernel(name) is not None else "its package is not installed"
