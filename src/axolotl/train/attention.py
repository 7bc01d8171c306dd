"""Which way of packed attention a run takes: the one asked for, or the fastest in a short measurement."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from axolotl.config import Config
from axolotl.config.resolve import Hardware
from axolotl.console import note
from axolotl.distributed.world import world
from axolotl.errors import EnvironmentProblem, Problem
from axolotl.model.attention import PACKED, AttentionChoice, use_kernel
from axolotl.model.attention_trial import Work, describe, fastest
from axolotl.model.varlen import VARLEN, unusable
from axolotl.train.batches import BatchSource

STREAMED = 8
"""Documents that a batch of a stream is taken to hold, for the measurement."""


def choose_kernel(
    model: PreTrainedModel, cfg: Config, attention: AttentionChoice, batches: Any, hardware: Hardware
) -> str | None:
    """Settles how packed rows are computed, and says why; the name, or None where nothing is packed by us.

    Raises EnvironmentProblem for a way that is asked for and cannot be taken here.
    """
    if attention.name != PACKED or not attention.joined:
        return None
    work = work_of(model, cfg, batches, hardware)
    if work is None:
        return None
    asked = cfg.model.attn_kernel
    place = (work.device, work.dtype, work.width)
    if asked is None and cfg.model.attn_implementation in VARLEN:
        # The word of old configs: taken where its package is there, else whatever is fastest.
        named = str(cfg.model.attn_implementation)
        asked = None if unusable(named, *place, work.window) else named  # type: ignore[assignment]
    if asked not in (None, "auto"):
        why = unusable(str(asked), *place, work.window)
        if why:
            raise EnvironmentProblem(
                Problem(
                    f"`attn_kernel: {asked}` cannot be taken here: {why}.",
                    "Leave it out to have the fastest one taken.",
                    "environment",
                    ("attn_kernel",),
                    code="AX1406",
                )
            )
        use_kernel(str(asked), *place)
        return str(asked)
    if asked is None and (hardware.device != "cuda" or world().size > 1):
        # Several processes would have to agree; on a CPU there is little to choose.
        use_kernel(None, *place)
        return None
    name, timings, known = fastest(work)
    use_kernel(name, *place)
    note(f"Packed attention: {name} ({describe(timings)}{', measured before' if known else ''}).")
    return name


def work_of(model: PreTrainedModel, cfg: Config, batches: Any, hardware: Hardware) -> Work | None:
    """The attention of the run's first batch; None for a model whose configuration does not say what its heads are."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return None
    grouped = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    dtype = torch.float32
    if cfg.model.bf16 in (True, "full") or cfg.model.bfloat16:
        dtype = torch.bfloat16
    elif cfg.model.fp16 or cfg.model.float16:
        dtype = torch.float16
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True) or getattr(config, "layer_types", None):
        # Layers differ: what is measured is the attention without a window, which costs most.
        window = None
    return Work(hardware.device, dtype, heads, grouped, width, _borders(cfg, batches), window)


def _borders(cfg: Config, batches: Any) -> tuple[int, ...]:
    tokens = cfg.data.sequence_len * cfg.train.rows_at_once
    if isinstance(batches, BatchSource):
        plan = batches.plan_of(0)
        bins = [plan[i] for i in range(min(batches.bins_per_batch, len(plan)))]
        lengths = [int(batches.rows.lengths[row]) for each in bins for row in each]
    else:
        lengths = [max(1, tokens // STREAMED)] * STREAMED
    borders = [0]
    for length in lengths:
        borders.append(borders[-1] + length)
    if cfg.data.pad_to_sequence_len and borders[-1] < tokens:
        borders.append(tokens)
    return tuple(borders)
