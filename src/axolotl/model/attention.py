"""Attention: which implementation a run uses, and our own that keeps the documents of a packed row apart.

`axolotl_packed` takes the borders of the documents as model arguments (`cu_seq_lens_q`, `max_length_q`), computed once
per batch on the host, and attends within each document only. It runs everywhere: flash-attn where installed, else
torch's variable-length kernel on CUDA, else one scaled_dot_product_attention per document.

Shapes: B batch, H heads, G key/value heads, T tokens, D width of a head.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from axolotl.config.attention import BACKENDS, PACKED, SHORT, backend_of
from axolotl.config.model import ModelSection
from axolotl.config.resolve import Hardware
from axolotl.errors import ConfigError, ModelError, Problem
from axolotl.model.context import shared_rows
from axolotl.model.varlen import UNMEASURED, Remembered, Run, kernel, on_host, unusable


@dataclass(frozen=True)
class AttentionChoice:
    """An implementation and why it was chosen. `name` is what `from_pretrained(attn_implementation=)` takes."""

    name: str
    reason: str
    joined: bool = False
    """The rows of a packed batch are joined into one long row; otherwise they stay rows of their own."""


def choose_attention(
    model: ModelSection, packing: bool, hardware: Hardware, shared: bool = False
) -> AttentionChoice:
    """The implementation for a run. Every flash spelling works on every platform.

    `shared`: several processes share each row, which only our own attention does.
    Raises ConfigError for an implementation that is unknown or that this machine cannot train with.
    """
    asked = model.attn_implementation
    if shared and (asked is None or ((own := backend_of(asked)) is not None and own.packed == PACKED)):
        return AttentionChoice(PACKED, "rows are shared by several processes", packing)
    if asked is None:
        name = PACKED if packing else "sdpa"
        return AttentionChoice(name, "packed rows" if packing else "the default", packing)
    backend = backend_of(asked)
    if backend is None:
        near = SHORT.get(asked) or next(iter(difflib.get_close_matches(asked, BACKENDS, n=1)), "")
        remedy = f"Did you mean `{near}`? " if near else ""
        remedy += f"Known: {', '.join(sorted(BACKENDS))}."
        raise ConfigError(_problem(f"`attn_implementation: {asked}` is not available.", remedy))
    if backend.cuda_only and hardware.device != "cuda":
        message = f"`attn_implementation: {asked}` needs a GPU: {backend.cuda_only}."
        raise ConfigError(_problem(message, "Leave attn_implementation out, or set it to sdpa."))
    name = backend.packed if packing else backend.unpacked
    reason = "asked for" if name == asked else f"takes the place of {asked}"
    return AttentionChoice(name, reason, packing and name == PACKED)


def check(model: ModelSection, packing: bool, hardware: Hardware) -> list[Problem]:
    """Why the attention that was asked for cannot train on this machine."""
    try:
        choose_attention(model, packing, hardware)
    except ConfigError as error:
        return list(error.problems)
    return []


def missing_backend(asked: str | None, hardware: Hardware) -> str | None:
    """Why the attention that was asked for by name is not what will run; None where it is."""
    backend = backend_of(asked or "")
    if backend is None or not backend.package:
        return None
    package = backend.package
    if hardware.device != "cuda":
        return "there is no NVIDIA GPU here"
    try:
        here = importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        here = False
    return None if here else f"the package `{package.partition('.')[0]}` is not installed"


def _problem(message: str, remedy: str) -> Problem:
    return Problem(message, remedy, "invalid_value", ("attn_implementation",), code="AX1406")


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within documents: query [B,H,T,D], key and value [B,G,T,D] to [B,T,H,D].

    `cu_seq_lens_q` holds the borders of the documents over the B*T tokens (int32, first 0, last B*T). Without it
    every row is one document; the padding must then stand at the right, where causal attention never looks.
    Where rows are shared (`axolotl.model.context`), T are the tokens of this process, and the borders those of the whole
    row. Raises ModelError for arguments that would need a mask, such as a key/value cache.
    """
    shared = shared_rows()
    if shared is not None:
        if shared.packed and cu_seq_lens_q is None:
            raise ModelError(
                "This model's code does not hand the borders of packed documents on to its attention.",
                "Set `sample_packing: false`, or delete `context_parallel_size`.",
            )
        heads = query.shape[1]
        query, key, value = (shared.whole_rows(x, heads) for x in (query, key, value))
        if extra.get("s_aux") is not None:
            extra["s_aux"] = shared.own_heads(extra["s_aux"])
        # They are those of a part, and have done their work.
        extra.pop("position_ids", None)
    out, _ = _attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling,
        dropout,
        cu_seq_lens_q,
        max_length_q,
        sliding_window,
        **extra,
    )
    return (out if shared is None else shared.own_part(out)), None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    cu_seq_lens_q: torch.Tensor | None,
    max_length_q: int | None,
    sliding_window: int | None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """`packed_attention` over whole rows."""
    B, H, T, D = query.shape
    if attention_mask is not None or key.shape[2] != T:
        raise ModelError(
            "Training attention was called with a mask or a key/value cache.",
            "Generate inside `axolotl.model.attention.generating(model)`.",
        )
    causal = extra.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    softcap, sinks = extra.get("softcap"), extra.get("s_aux")
    if extra.get("position_bias") is not None:
        raise ModelError("This model's position bias cannot be packed.", "Set `attn_implementation: sdpa`.")
    if cu_seq_lens_q is None and B == 1:
        cu_seq_lens_q, max_length_q = _borders(extra.get("position_ids"), T)
    plain = causal and softcap is None and sinks is None
    if plain and sliding_window is None and cu_seq_lens_q is None:
        out = _sdpa(query, key, value, scaling, dropout)
        return out.transpose(1, 2).contiguous(), None
    run = (
        _kernel(query.device.type, query.dtype, D, dropout > 0, sliding_window)
        if plain and cu_seq_lens_q is not None
        else None
    )
    if run is not None:
        longest = max_length_q or T
        q, k, v = (x.transpose(1, 2).reshape(B * T, x.shape[1], D) for x in (query, key, value))
        out = run(q, k, v, cu_seq_lens_q, longest, scaling, sliding_window)
        return out.reshape(B, T, H, D), None
    one = functools.partial(
        _document,
        scaling=scaling,
        dropout=dropout,
        causal=causal,
        window=sliding_window,
        softcap=softcap,
        sinks=sinks,
    )
    if cu_seq_lens_q is None:
        return one(query, key, value).transpose(1, 2).contiguous(), None
    if B > 1:
        query, key, value = (x.transpose(0, 1).reshape(1, x.shape[1], B * T, D) for x in (query, key, value))
    borders = on_host(cu_seq_lens_q)
    outs = [
        one(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b])
        for a, b in itertools.pairwise(borders)
        if b > a
    ]
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
    return out.transpose(1, 2).reshape(B, T, H, D), None


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, dropout: float
) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped
    )


def _document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None,
    dropout: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One document by plain torch, [1,H,N,D]. A window is worked through in blocks, so that no N*N mask is built."""
    N = query.shape[2]
    if causal and softcap is None and sinks is None and (window is None or window >= N):
        return _sdpa(query, key, value, scaling, dropout)
    block = N if window is None or not causal else max(window, 64)
    groups = query.shape[1] // key.shape[1]
    outs = []
    for start in range(0, N, block):
        stop = min(start + block, N)
        first = max(0, start - window + 1) if window is not None and causal else 0
        last = stop if causal else N
        k, v = (x[:, :, first:last].repeat_interleave(groups, dim=1) for x in (key, value))
        q_at = torch.arange(start, stop, device=query.device)[:, None]
        k_at = torch.arange(first, last, device=query.device)[None, :]
        seen = torch.ones(stop - start, last - first, dtype=torch.bool, device=query.device)
        if causal:
            seen &= k_at <= q_at
        if window is not None:
            seen &= k_at > q_at - window if causal else (k_at - q_at).abs() < window
        q = query[:, :, start:stop]
        if softcap is None and sinks is None:
            outs.append(
                F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, dropout_p=dropout)
            )
        else:
            outs.append(_scores(q, k, v, seen, scaling, dropout, softcap, sinks))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with its scores written out, for capped scores and for attention sinks (one extra score per head)."""
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float().masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights.to(q.dtype), dropout) @ v


_CHOSEN: dict[tuple[str, torch.dtype, int], str] = {}


def use_kernel(name: str | None, device: str, dtype: torch.dtype, head_dim: int) -> None:
    """Has packed rows of such tensors computed in one way of `axolotl.model.varlen`; None: as if nothing was chosen."""
    if name is None:
        _CHOSEN.pop((device, dtype, head_dim), None)
    else:
        _CHOSEN[device, dtype, head_dim] = name
    _kernel.cache_clear()


@functools.cache
def _kernel(
    device: str, dtype: torch.dtype, head_dim: int, dropout: bool, window: int | None = None
) -> Run | None:
    """The variable-length kernel for these tensors, or None where documents are done one by one."""
    if dropout:
        return None
    chosen = _CHOSEN.get((device, dtype, head_dim))
    for name in (chosen,) if chosen else UNMEASURED:
        if name != "documents" and not unusable(name, device, dtype, head_dim, window):
            return kernel(name)
    return None


def _read_restarts(position_ids: torch.Tensor) -> tuple[torch.Tensor | None, int | None]:
    starts = ((position_ids[0, 1:] != position_ids[0, :-1] + 1).nonzero()[:, 0] + 1).tolist()
    if not starts:
        return None, None
    borders = [0, *starts, position_ids.shape[1]]
    cu = torch.tensor(borders, dtype=torch.int32, device=position_ids.device)
    return cu, max(b - a for a, b in itertools.pairwise(borders))


_restarts: Callable[[torch.Tensor], tuple[torch.Tensor | None, int | None]] = Remembered(_read_restarts)


def _borders(position_ids: torch.Tensor | None, T: int) -> tuple[torch.Tensor | None, int | None]:
    """Document borders read from restarting positions, for models that do not hand the borders on."""
    if position_ids is None or position_ids.shape != (1, T):
        return None, None
    return _restarts(position_ids)


# No mask function is registered beside it: transformers then builds no mask at all.
AttentionInterface.register(PACKED, packed_attention)


def set_attention(model: PreTrainedModel, name: str) -> bool:
    """Switches a loaded model to another implementation; False where its code does not allow it."""
    if model.config._attn_implementation == name:
        return True
    try:
        model.set_attn_implementation(name)
    except (ValueError, KeyError, ImportError, NotImplementedError):
        return False
    return bool(model.config._attn_implementation == name)


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Lends a model that is in training an attention that can use a cache and padding on the left."""
    before = model.config._attn_implementation
    if before == PACKED:
        set_attention(model, "sdpa")
    try:
        yield
    finally:
        if before == PACKED:
            set_attention(model, PACKED)
