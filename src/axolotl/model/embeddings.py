"""Token embeddings: making room for new tokens, the value that new rows start from, rows that were never trained.

V rows (tokens), D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from axolotl.console import note
from axolotl.distributed.deepspeed import shape_of, whole
from axolotl.errors import ModelError, Problem
from axolotl.model.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_header, read_json

if TYPE_CHECKING:
    from axolotl.config.model import ModelSection


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the input embedding."""
    weight: Any = model.get_input_embeddings().weight
    return int(shape_of(weight)[0])


def wanted_rows(model: ModelSection, vocabulary: int, rows: int, adapter_dir: Path | None = None) -> int:
    """How many embedding rows a model of `rows` rows gets: as many as it has, more where tokens need them.

    `shrink_embeddings` cuts surplus rows, `resize_token_embeddings_to_32x` rounds up. An adapter that was trained with
    more rows than the tokenizer has tokens decides.
    """
    wanted = -(-vocabulary // 32) * 32 if model.resize_token_embeddings_to_32x else vocabulary
    if adapter_dir is not None:
        trained, exact = rows_in_adapter(adapter_dir)
        wanted = trained if exact else max(wanted, trained)
    return wanted if wanted > rows or model.shrink_embeddings else rows


def resize_embeddings(model: PreTrainedModel, rows: int, *, random: bool = False) -> list[int]:
    """Gives input and output embedding `rows` rows; returns the ids of the new ones.

    New rows start from the mean of the old, so that the same rows arise wherever the adapter is loaded again;
    `random`: from the model's own random start.
    """
    before = embedding_rows(model)
    if rows == before:
        return []
    model.resize_token_embeddings(rows, mean_resizing=False)
    if rows < before:
        note(f"The embeddings shrink from {before:,} to {rows:,} rows.")
        return []
    if not random:
        for parameter in _weights(model):
            with whole([parameter], write=True):
                weight = parameter.data
                weight[before:] = mean_row(weight[:before])
    note(f"The embeddings grow from {before:,} to {rows:,} rows.")
    return list(range(before, rows))


def mean_row(weight_VD: torch.Tensor) -> torch.Tensor:
    """The mean of the rows, computed in float64 so that it does not depend on how the sum is split."""
    return weight_VD.double().mean(dim=0).to(weight_VD.dtype)


def _weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """Input and output embedding, once each where they are tied."""
    found: list[torch.Tensor] = []
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(module, "weight", None)
        if weight is not None and all(weight is not w for w in found):
            found.append(weight)
    return found


def fix_untrained_tokens(model: PreTrainedModel, ids: int | Iterable[int]) -> None:
    """Sets the embeddings of the named tokens to the mean of all others. Raises ModelError for an id out of range."""
    wanted = [ids] if isinstance(ids, int) else list(ids)
    rows = embedding_rows(model)
    outside = [i for i in wanted if not 0 <= i < rows]
    if outside:
        raise ModelError(
            Problem(
                f"`fix_untrained_tokens` names token {outside[0]}, but the model has {rows:,}.",
                "Give ids of the tokenizer's vocabulary.",
                keys=("fix_untrained_tokens",),
            )
        )
    for parameter in _weights(model):
        weight = parameter.data
        keep = torch.ones(weight.shape[0], dtype=torch.bool, device=weight.device)
        keep[wanted] = False
        weight[wanted] = mean_row(weight[keep])


def rows_in_adapter(folder: Path) -> tuple[int, bool]:
    """Embedding rows that an adapter was trained with, and whether that is exact or only the least possible number.

    Whole embeddings in the adapter tell by their shape; single trained rows give at least the highest id; (0, False)
    where the files tell nothing.
    """
    weights, config = folder / ADAPTER_WEIGHTS, folder / ADAPTER_CONFIG
    exact = 0
    if weights.is_file():
        for name, entry in read_header(weights)[0].items():
            stem = name.removesuffix(".weight").removesuffix(".base_layer")
            if name.endswith(".weight") and stem.endswith(
                ("embed_tokens", "lm_head", ".wte", "embed_in", "embed_out")
            ):
                exact = max(exact, entry.shape[0])
            elif ".lora_embedding_A" in name:
                exact = max(exact, entry.shape[1])
    if exact or not config.is_file():
        return exact, bool(exact)
    indices = read_json(config).get("trainable_token_indices") or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return max((max(ids) + 1 for ids in lists if ids), default=0), False
