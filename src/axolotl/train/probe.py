"""A look before the run: does this model keep packed documents apart, and does its loss take the number of tokens?

Documents that see each other raise no error; the loss just comes out a little different. So it is tried, with a dozen
tokens, on the model that will be trained.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from axolotl.data.collate import Batch, PackedCollator
from axolotl.model.attention import AttentionChoice

LENGTHS = (7, 9)


def documents_stay_apart(model: PreTrainedModel, attention: AttentionChoice, device: torch.device) -> bool:
    """Whether changing one document of a packed row leaves the outputs of the next one as they were."""
    rows = trial_rows(model)
    changed = [(ids[::-1].copy(), labels[::-1].copy()) for ids, labels in rows[:1]] + rows[1:]
    before, after = (
        outputs_of(model, _unlabelled(each, attention), device).logits[0] for each in (rows, changed)
    )
    start, stop = LENGTHS[0], sum(LENGTHS)
    own = (before[:start] - after[:start]).abs().max()
    leaked = (before[start:stop] - after[start:stop]).abs().max()
    # Kernels may sum in another order, so a trace is allowed; a document that is seen changes far more.
    return bool(leaked <= 1e-3 * own)


def loss_takes_tokens(model: PreTrainedModel, attention: AttentionChoice, device: torch.device) -> bool:
    """Whether the model divides its loss by the number of tokens it is told."""
    batch = _batch(trial_rows(model), attention)
    one, two = (
        outputs_of(model, {**batch, "num_items_in_batch": torch.tensor(n)}, device).loss for n in (1, 2)
    )
    return one is not None and two is not None and bool((one / two - 2).abs() < 1e-2)


def trial_rows(model: PreTrainedModel) -> list[tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(0)
    embeddings: Any = model.get_input_embeddings()
    words = min(int(embeddings.weight.shape[0]), 1000)
    found = []
    for length in LENGTHS:
        ids = draw.integers(0, words, length)
        found.append((ids, ids))
    return found


def _batch(rows: list[tuple[np.ndarray, np.ndarray]], attention: AttentionChoice) -> Batch:
    batch = PackedCollator(0, attention.joined)([rows])
    batch.pop("token_counts")
    return batch


def _unlabelled(rows: list[tuple[np.ndarray, np.ndarray]], attention: AttentionChoice) -> Batch:
    # With labels, a model with a fused loss makes no logits.
    return {k: v for k, v in _batch(rows, attention).items() if k != "labels"}


def outputs_of(model: PreTrainedModel, batch: Batch, device: torch.device) -> Any:
    was_training = model.training
    model.eval()
    try:
        inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with torch.no_grad():
            return model(**inputs, use_cache=False)
    finally:
        model.train(was_training)
