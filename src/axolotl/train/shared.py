"""Rows that several processes share (`context_parallel_size`): who shares with whom, and whether the model can."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedModel

from axolotl.config.axes import Axes
from axolotl.data.collate import PackedCollator, PaddedCollator, SharedCollator
from axolotl.distributed.group import over_all
from axolotl.distributed.mesh import build_mesh
from axolotl.errors import ModelError, Problem
from axolotl.model.attention import AttentionChoice
from axolotl.model.context import SharedRows, heads_problem, share_rows
from axolotl.train.batches import BatchSource
from axolotl.train.probe import LENGTHS, outputs_of, trial_rows
from axolotl.train.streamed import StreamSource


def shared_rows_of(axes: Axes, device: str, model: PreTrainedModel, packed: bool) -> SharedRows:
    """The processes with which this one shares its rows. Raises ModelError where heads cannot be divided."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, int) and (heads // axes.tensor) % axes.context:
        raise ModelError(heads_problem(heads // axes.tensor, axes.context))
    return SharedRows(build_mesh(axes, device).group("cp"), packed)


def with_parts(batches: Any, shared: SharedRows) -> Any:
    """A source of batches whose batches hold this process's part of each row."""
    assert isinstance(batches, BatchSource | StreamSource)
    return dataclasses.replace(batches, collator=SharedCollator(batches.collator, shared.place, shared.size))  # type: ignore[arg-type]


def check_sharing(
    model: PreTrainedModel,
    attention: AttentionChoice,
    shared: SharedRows,
    device: torch.device,
    *,
    own_loss: bool,
) -> None:
    """Compares a few tokens computed together with the same computed alone.

    Raises ModelError for a model whose layers see other tokens otherwise than by attention (convolutions, recurrent
    state), or whose loss is not told which token comes next.
    """
    if own_loss:
        raise ModelError(_problem(model, "does not take the targets of its tokens (`shift_labels`)"))
    if over_all(not _same(model, attention, shared, device)):
        raise ModelError(_problem(model, "has layers that see other tokens otherwise than by attention"))


def _same(
    model: PreTrainedModel, attention: AttentionChoice, shared: SharedRows, device: torch.device
) -> bool:
    rows = trial_rows(model)
    if not shared.packed:
        rows = rows[:1]
    total = -(-sum(LENGTHS[: len(rows)]) // shared.size) * shared.size
    collator = attention_collator(attention, shared)
    whole = collator([rows])
    part = SharedCollator(collator, shared.place, shared.size)([rows])
    for batch in (whole, part):
        batch.pop("token_counts")
        batch.pop("labels")
        batch.pop("shift_labels", None)
        batch.pop("attention_mask", None)
    alone = outputs_of(model, whole, device).logits
    share_rows(shared)
    try:
        together = outputs_of(model, part, device).logits
    finally:
        share_rows(None)
    count = total // shared.size
    wanted = alone[:, shared.place * count : (shared.place + 1) * count].float()
    found = together[:, : wanted.shape[1]].float()
    if not wanted.numel():
        return True
    # Kernels may sum in another order; tokens that are not seen change far more.
    return bool((wanted - found).abs().mean() <= 2e-2 * wanted.abs().mean())


def attention_collator(attention: AttentionChoice, shared: SharedRows) -> Any:
    """The collator of the trial: as the run's, without filling up."""
    return PackedCollator(0, attention.joined) if shared.packed else PaddedCollator(0)


def _problem(model: PreTrainedModel, why: str) -> Problem:
    return Problem(
        f"`context_parallel_size`: {type(model).__name__} {why}, so its rows cannot be shared.",
        "Delete the line. `gradient_checkpointing: true` and `fsdp_config` with `offload_params` make room for long rows.",
        "model",
        ("context_parallel_size",),
    )
