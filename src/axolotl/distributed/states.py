"""Weights and optimizer states of a sharded model on disk: each process writes and reads its own parts.

The files are those of torch.distributed.checkpoint: a tensor is described by its whole shape and the places of its parts, so
that any number of processes can read it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.optim import Optimizer

from axolotl.distributed.fsdp import give_back
from axolotl.errors import CheckpointError

WEIGHTS, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
"""The folders of a checkpoint, under the names that other programs know."""
_PLAIN = "described"
_STATE = "state/"


def save_state(values: Mapping[str, Any], folder: Path) -> None:
    """Writes tensors and plain values; every process has to call it. Raises OSError where one could not write."""
    try:
        dcp.save(dict(values), storage_writer=dcp.FileSystemWriter(folder, overwrite=True))
    except CheckpointException as error:
        raise _written_in_vain(error) from error


def _written_in_vain(error: CheckpointException) -> Exception:
    """What went wrong in the first process that failed: its own error where it is the disk's."""
    cause: Any = next(iter(error.failures.values()))[0] if error.failures else error
    return cause if isinstance(cause, Exception) else RuntimeError(str(error))


def load_state(values: dict[str, Any], folder: Path) -> None:
    """Fills the tensors of `values` in place, and replaces the plain values. Every process has to call it.

    Raises CheckpointError where something is missing or damaged.
    """
    try:
        dcp.load(values, storage_reader=dcp.FileSystemReader(folder))
    except (CheckpointException, OSError, ValueError) as error:
        cause: Any = error
        if isinstance(error, CheckpointException) and error.failures:
            cause = next(iter(error.failures.values()))[0]
        said = str(cause).strip().splitlines()
        raise CheckpointError(
            f"`{folder}` cannot be read: {said[0] if said else type(cause).__name__}.",
            "Use an earlier checkpoint.",
        ) from error


def weights_of(model: nn.Module, *, trained_only: bool) -> dict[str, torch.Tensor]:
    """The model's tensors by name, each once: its parameters (or those that are trained) and what its state holds else."""
    give_back(model)
    found: dict[str, torch.Tensor] = {
        name: p.detach() for name, p in model.named_parameters() if p.requires_grad or not trained_only
    }
    if not trained_only:
        kept = model.state_dict(keep_vars=True)
        found |= {
            name: b
            for name, b in model.named_buffers()
            if name in kept and isinstance(b, torch.Tensor) and name not in found
        }
    return found


def save_weights(model: nn.Module, folder: Path, *, trained_only: bool) -> None:
    """Writes the weights, each process its parts."""
    save_state(weights_of(model, trained_only=trained_only), folder)


def load_weights(model: nn.Module, folder: Path, *, trained_only: bool) -> None:
    """Reads weights that any number of processes have written into the model as it is sharded now."""
    load_state(dict(weights_of(model, trained_only=trained_only)), folder)


# Optimizers


def _bare(optimizer: Any) -> Any:
    """The optimizer behind accelerate's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _parts(optimizer: Any) -> list[Optimizer]:
    """The optimizers behind one that acts for several; else the one itself."""
    inner = _bare(optimizer)
    return list(getattr(inner, "parts", ())) or [inner]


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in the order in which its state counts them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def save_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Writes the optimizer's state, each process its parts. Raises OSError where one could not write."""
    values: dict[str, Any] = {}
    for number, part in enumerate(_parts(optimizer)):
        values |= _described(_names(model, part), part, f"{number}/")
    save_state(values, folder)


def _described(names: list[str], optimizer: Optimizer, prefix: str) -> dict[str, Any]:
    state = optimizer.state_dict()
    values: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            at = f"{_STATE}{names[index]}/{key}"
            if isinstance(value, DTensor) and any(isinstance(p, Partial) for p in value.placements):
                value = value.redistribute(placements=[Replicate()] * value.device_mesh.ndim)
            if isinstance(value, torch.Tensor):
                values[f"{prefix}{at}"] = value
                plain[at] = _division(value)
            else:
                plain[at] = ("value", value)
    groups = [group | {"params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    values[f"{prefix}{_PLAIN}"] = _packed({"groups": groups, "state": plain})
    return values


def _packed(value: Any) -> torch.Tensor:
    """A nested value as bytes: torch's writer would take it apart by itself, and forget empty parts."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)


def _unpacked(folder: Path, key: str, metadata: Mapping[str, Any]) -> Any:
    stored = metadata.get(key)
    if not isinstance(stored, TensorStorageMetadata):
        raise CheckpointError(
            f"`{folder}` holds no state of this optimizer.",
            "Resume with the config that the checkpoint was saved with, or use an earlier checkpoint.",
        )
    box = {key: torch.empty(stored.size, dtype=torch.uint8)}
    load_state(box, folder)
    return torch.load(io.BytesIO(box[key].numpy().tobytes()), weights_only=True)


def _division(value: torch.Tensor) -> tuple[str, Any]:
    """How a tensor is divided: ("whole", None), or ("shard", dimension)."""
    if isinstance(value, DTensor):
        shards = [p.dim for p in value.placements if isinstance(p, Shard)]
        return ("shard", shards[0]) if shards else ("same", None)
    return "whole", None


def load_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Reads an optimizer's state that any number of processes have written. Raises CheckpointError."""
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:
        raise CheckpointError(f"`{folder}` cannot be read: {error}.", "Use an earlier checkpoint.") from error
    parameters = dict(model.named_parameters())
    for number, part in enumerate(_parts(optimizer)):
        prefix = f"{number}/"
        described = _unpacked(folder, f"{prefix}{_PLAIN}", metadata)
        groups, plain = described["groups"], described["state"]
        names = _names(model, part)
        _refuse_others({n for group in groups for n in group["params"]}, set(names), folder)
        tensors: dict[str, Any] = {}
        for at, (kind, dim) in plain.items():
            stored = metadata.get(f"{prefix}{at}")
            if kind != "value" and isinstance(stored, TensorStorageMetadata):
                tensors[f"{prefix}{at}"] = _empty_like(stored, parameters[_parameter_of(at)], kind, dim)
        load_state(tensors, folder)
        numbers = {name: index for index, name in enumerate(names)}
        state: dict[int, dict[str, Any]] = {}
        for at, (kind, value) in plain.items():
            entry = state.setdefault(numbers[_parameter_of(at)], {})
            entry[at.rpartition("/")[2]] = value if kind == "value" else tensors[f"{prefix}{at}"]
        # The order of parameters is that of today's groups; what a group says comes from the checkpoint.
        saved = {n: group for group in groups for n in group["params"]}
        today = [[id(p) for p in group["params"]] for group in part.param_groups]
        at_name = iter(names)
        made = []
        for members in today:
            mine = [next(at_name) for _ in members]
            made.append({**saved[mine[0]], "params": [numbers[n] for n in mine]})
        part.load_state_dict({"state": state, "param_groups": made})
    if callable(getattr(_bare(optimizer), "share", None)):
        _bare(optimizer).share()


def _refuse_others(saved: set[str], present: set[str], folder: Path) -> None:
    if saved == present:
        return
    name = sorted(saved ^ present)[0]
    raise CheckpointError(
        f"`{folder}`: `{name}` is trained {'then, and not now' if name in saved else 'now, and was not then'}.",
        "Resume with the config that the checkpoint was saved with.",
    )


def _parameter_of(at: str) -> str:
    return at.removeprefix(_STATE).rpartition("/")[0]


def _empty_like(
    stored: TensorStorageMetadata, parameter: torch.Tensor, kind: str, dim: int | None
) -> torch.Tensor:
    """A tensor of the stored shape, divided as it was or as its parameter is now."""
    dtype = stored.properties.dtype
    if not isinstance(parameter, DTensor):
        return torch.empty(stored.size, dtype=dtype)
    if stored.size == parameter.shape:
        # Also where every process held the whole then.
        made = torch.empty_like(parameter, dtype=dtype)
        return made.detach()
    if kind == "whole":
        return torch.empty(stored.size, dtype=dtype)
    placements = [
        Shard(dim) if isinstance(p, Shard) and dim is not None else Replicate() for p in parameter.placements
    ]
    return torch.distributed.tensor.zeros(
        *stored.size, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements
    )
