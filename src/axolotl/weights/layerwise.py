"""A model's logits with memory for one layer: weights are read as a layer begins and dropped as it ends.

The model's own forward runs, so that this holds for any architecture whose layers are modules. A weight that is asked
for outside its layer is on no device, which is an error and never a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from axolotl.weights.deferred import DeferredAdapter
from axolotl.weights.shell import Shell, is_placeholder
from axolotl.weights.skeleton import NotLayerwiseError
from axolotl.weights.stream import Source

# What PEFT puts between a module's name and its weights.
_OF_PEFT = frozenset({"base_layer", "original_module", "token_adapter"})


@dataclass(frozen=True)
class _Weight:
    """A placeholder: the module that has it, its name there, and its name in the files."""

    owner: nn.Module
    short: str
    name: str


def _blocks(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model whose weights are there together: its layers, and what stands before and after them."""
    for name, child in module.named_children():
        place = f"{path}.{name}" if path else name
        wraps = isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        if isinstance(module, nn.ModuleList) or wraps or child._parameters:
            yield place, child
        else:
            yield from _blocks(child, place)


def _weights(path: str, block: nn.Module) -> list[_Weight]:
    unused = {
        id(m.original_module)
        for m in block.modules()
        if isinstance(m, ModulesToSaveWrapper) and m.active_adapters
    }
    found = []
    for name, owner in block.named_modules(prefix=path):
        plain = ".".join(part for part in name.split(".") if part not in _OF_PEFT)
        for short, parameter in owner._parameters.items():
            if is_placeholder(parameter) and id(owner) not in unused:
                found.append(_Weight(owner, short, f"{plain}.{short}"))
    return found


def largest_part(shell: Shell) -> int:
    """Bytes in float32 of the largest part of a model that is held at once. Raises NotLayerwiseError."""
    own = sum(p.numel() for p in shell.model.parameters())
    sizes = [sum(p.numel() for p in block.parameters()) for _, block in _blocks(shell.model)]
    if not sizes or (len(sizes) < 3 and max(sizes) > own // 2):
        raise NotLayerwiseError("this architecture is not made of layers that are modules")
    return 4 * max(sizes)


@torch.inference_mode()
def logits_by_layers(
    shell: Shell, source: Source, rows: Sequence[Sequence[int]], deferred: DeferredAdapter | None = None
) -> list[torch.Tensor]:
    """Float32 logits [N_row, V] of each row; the model is of no use afterwards.

    `deferred`: the adapter of a skeleton. Raises NotLayerwiseError where a layer's weights are asked for outside it, or
    the files have no such tensor.
    """
    model = shell.model.eval()
    blocks = list(_blocks(model))
    weights = {path: _weights(path, block) for path, block in blocks}
    lost = [w.name for each in weights.values() for w in each if source.place(w.name) is None]
    if lost:
        raise NotLayerwiseError(f"the files have no tensor `{lost[0]}`")
    for name, buffer in model.named_buffers():
        stored = source.read(name) if name in shell.shapes and source.place(name) else None
        if stored is not None:
            buffer.copy_(stored)
    for each in weights.values():
        for weight in each:
            _leave(weight)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(list(row)) for row in rows], batch_first=True)
    try:
        with ExitStack() as around:
            for path, block in blocks:
                inside = ExitStack()
                block.register_forward_pre_hook(_entering(weights[path], block, source, deferred, inside))
                block.register_forward_hook(_leaving(weights[path], inside))
                if deferred is not None and not isinstance(_parent(model, path), nn.ModuleList):
                    # what a tied head takes from the input embedding has to be there too
                    around.enter_context(deferred.present(block))
            # What follows a row is not seen by it: layers look back only.
            logits = model(input_ids=ids, use_cache=False).logits
    except NotLayerwiseError:
        raise
    except (
        Exception
    ) as error:  # of the model's own code, whichever: the merge is written, and another check can follow
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotLayerwiseError(f"its layers do not run one by one: {reason}") from error
    if logits.is_meta:
        raise NotLayerwiseError("its layers use weights of one another")
    return [logits[i, : len(row)].float() for i, row in enumerate(rows)]


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def _leave(weight: _Weight) -> None:
    present = weight.owner._parameters[weight.short]
    assert present is not None
    empty = nn.Parameter(torch.empty(present.shape, device="meta"), requires_grad=False)
    weight.owner._parameters[weight.short] = empty


def _entering(
    weights: Sequence[_Weight],
    block: nn.Module,
    source: Source,
    deferred: DeferredAdapter | None,
    inside: ExitStack,
) -> Callable[..., None]:
    def enter(*_: Any) -> None:
        for weight in weights:
            value = source.read(weight.name)
            assert value is not None
            weight.owner._parameters[weight.short] = nn.Parameter(value, requires_grad=False)
        if deferred is not None:
            inside.enter_context(deferred.present(block))

    return enter


def _leaving(weights: Sequence[_Weight], inside: ExitStack) -> Callable[..., None]:
    def leave(*_: Any) -> None:
        inside.close()
        for weight in weights:
            _leave(weight)

    return leave
