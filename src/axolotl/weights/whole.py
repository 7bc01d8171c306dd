"""Weights of a sharded model as whole safetensors files, put together one layer at a time, written by all processes.

A process holds at most one file's tensors beside its own part of the model; no one holds the model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from axolotl.distributed.states import weights_of
from axolotl.model.files import WEIGHTS, WEIGHTS_INDEX
from axolotl.weights.tensors import make_index

MAX_FILE_BYTES = 5 * 10**9
_LAYER = re.compile(r"^(.*?\.\d+)\.")


def whole(tensor: torch.Tensor, *, keep: bool = True) -> torch.Tensor:
    """A tensor put together in CPU memory; one without content where this process does not keep it.

    Every process has to call it.
    """
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if not keep:
        return torch.empty(full.shape, dtype=full.dtype, device="meta")
    return full.detach().cpu().contiguous()


def write_whole(
    model: PreTrainedModel,
    folder: Path,
    *,
    limit: int = MAX_FILE_BYTES,
    flush: Callable[[Path], None] | None = None,
) -> None:
    """Writes `model.safetensors`, or numbered files of about `limit` bytes with their index, into `folder`.

    The names are those under which transformers loads the model. Every process has to call it, and the folder has to
    exist. Raises OSError (or what safetensors raises) in every process where one could not write.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    layout: list[tuple[str, dict[str, int]]] = []
    troubles: list[str] = []
    for number, (names, tensors) in enumerate(_files(model, limit, rank, size)):
        file = f".part-{number:05d}.safetensors"
        if number % size == rank and not troubles:
            try:
                save_file(tensors, folder / file, metadata={"format": "pt"})
                if flush is not None:
                    flush(folder / file)
            except (
                Exception
            ) as error:  # told below, in all processes: the others are in the midst of gathering
                troubles.append(str(error) or type(error).__name__)
        layout.append((file, names))
    said: list[list[str]] = [[] for _ in range(size)]
    dist.all_gather_object(said, troubles)
    first = next((each[0] for each in said if each), None)
    if first is not None:
        raise OSError(first)
    if rank == 0:
        _name_files(folder, layout, model)
    dist.barrier()


def _files(
    model: PreTrainedModel, limit: int, rank: int, size: int
) -> Iterator[tuple[dict[str, int], dict[str, torch.Tensor]]]:
    """For each file: names and bytes of its tensors, and the tensors themselves where this process writes it."""
    names: dict[str, int] = {}
    tensors: dict[str, torch.Tensor] = {}
    number = 0
    for group in _layers(model):
        if names and sum(names.values()) + sum(t.numel() * t.element_size() for t in group.values()) > limit:
            yield names, tensors
            number, names, tensors = number + 1, {}, {}
        mine = number % size == rank
        gathered = {name: whole(tensor, keep=mine) for name, tensor in group.items()}
        for name, tensor in revert_weight_conversion(model, gathered).items():
            names[name] = tensor.nbytes
            if mine:
                tensors[name] = tensor.contiguous()
    if names:
        yield names, tensors


def _layers(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors to save, those of a layer together: names of a file may be made of several in the model."""
    group: dict[str, torch.Tensor] = {}
    layer: str | None = None
    ignored = [re.compile(p) for p in (model._keys_to_ignore_on_save or ())]
    for name, tensor in weights_of(model, trained_only=False).items():
        if any(p.search(name) for p in ignored):
            continue
        match = _LAYER.match(name)
        here = match.group(1) if match else name
        if group and here != layer:
            yield group
            group = {}
        layer = here
        group[name] = tensor
    if group:
        yield group


def _name_files(folder: Path, layout: list[tuple[str, dict[str, int]]], model: Any) -> None:
    if len(layout) == 1:
        os.replace(folder / layout[0][0], folder / WEIGHTS)
        return
    count = len(layout)
    named = {}
    for number, (file, names) in enumerate(layout, 1):
        final = f"model-{number:05d}-of-{count:05d}.safetensors"
        os.replace(folder / file, folder / final)
        named[final] = list(names)
    total = sum(sum(names.values()) for _, names in layout)
    index = make_index(named, total, sum(p.numel() for p in model.parameters()))
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
