"""Tensor parallelism: the processes of a group hold a part of each matrix, and share its products.

Which matrix is divided by rows and which by columns is the plan that transformers has for the model's class; how a layer
computes with its part are transformers' own styles (Shoeybi et al., Megatron-LM, 2019). Ours are the plan for adapters, the
care for tied weights, and gradients of small weights that each process sees a share of.

What is divided is a DTensor on the mesh's axis `tp`; what is not (norms, one half of each adapter) is held by every
process of the group, with the same numbers and the same gradients.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from axolotl.errors import ModelError, Problem

COLUMNS, ROWS = ("colwise",), ("rowwise",)
WHOLE_OUTSIDE = ("colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep")
"""Divided inside, whole before and after: what stands beside such a layer needs no care."""
SUMMED, EMBEDDING, NOTHING = "replicated_with_grad_allreduce", "embedding_rowwise", "replicate"
STYLES = (*COLUMNS, *ROWS, *WHOLE_OUTSIDE, SUMMED, EMBEDDING, NOTHING)
"""What of transformers' plans is divided here; the others are about experts and fused matrices."""
_NUMBER = re.compile(r"\.\d+(?=\.|$)")

# What is divided along two axes is put together, and summed, in two exchanges; every process does both in the same order.
logging.getLogger("torch.distributed.tensor._redistribute").addFilter(
    lambda record: "sequential all_" not in record.getMessage()
)


@dataclass(frozen=True)
class Products:
    """How the products of a model were divided."""

    divided: int
    """Matrices of which each process holds a part, adapters not counted."""
    whole: str = ""
    """Why embedding and head are held whole by every process; empty where they are divided."""


def styles_of(plan: Mapping[str, str] | None, model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Name, module and style of each module or parameter's owner that a plan is about."""
    found = []
    for name, module in model.named_modules():
        style = (plan or {}).get(_NUMBER.sub(".*", name))
        if style is not None:
            found.append((name, module, style))
        for own, _ in module.named_parameters(recurse=False):
            style = (plan or {}).get(_NUMBER.sub(".*", f"{name}.{own}"))
            if style is not None:
                found.append((f"{name}.{own}", module, style))
    return found


def plan_problem(plan: Mapping[str, str] | None, name: str) -> Problem | None:
    """Why the plan of a model's class does not do; None where it does."""
    if not plan:
        why = "transformers has no plan that says how its matrices are divided"
    elif other := next((style for style in plan.values() if style not in STYLES), None):
        why = f"its plan in transformers divides some layers as `{other}` (experts, or matrices that are several in one)"
    else:
        return None
    return Problem(
        f"`tensor_parallel_size`: {name} cannot be divided: {why}.",
        "Delete the line; `fsdp_config` (with `fsdp_version: 2`) divides any model.",
        "model",
        ("tensor_parallel_size",),
    )


def uneven_problem(facts: Mapping[str, Any], size: int) -> Problem | None:
    """The number of a model's `config.json` that so many processes cannot share evenly; None where all can be."""
    heads = facts.get("num_attention_heads")
    counts = {
        "attention heads": heads,
        "key/value heads": facts.get("num_key_value_heads", heads),
        "rows in its feed-forward layers": facts.get("intermediate_size"),
    }
    counts = {what: count for what, count in counts.items() if isinstance(count, int) and count > 0}
    for what, count in counts.items():
        if count % size:
            fits = [n for n in range(2, max(counts.values()) + 1) if not any(c % n for c in counts.values())]
            choose = f"Choose {' or '.join(map(str, fits))}, or delete" if fits else "Delete"
            return Problem(
                f"`tensor_parallel_size: {size}`: the model has {count} {what}, which {size} processes cannot share evenly.",
                f"{choose} the line.",
                "conflict",
                ("tensor_parallel_size",),
            )
    return None


def divide_products(model: Any, mesh: DeviceMesh) -> Products:
    """Divides the matrices of `model` over `mesh` (one axis), in place; parameters may lie on the meta device.

    `model` is the base model, with LoRA in it or without. Every process has to call it, and those of the mesh have to
    hold the same numbers. Raises ModelError for a model without a plan, or with one that asks for more than is there.
    """
    size = mesh.size()
    plan: dict[str, str] = dict(model.tp_plan or {})
    found = styles_of(plan, model)
    problem = plan_problem({name: style for name, _, style in found}, type(model).__name__)
    problem = problem or uneven_problem(model.config.get_text_config().to_dict(), size)
    if problem is not None:
        raise ModelError(problem)
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module]
    tied = len(ends) == 2 and ends[0].weight is ends[1].weight
    why = _why_whole(ends, size)
    divided = 0
    for _, module, style in found:
        if (module in ends and why) or style == NOTHING:
            continue
        base: Any = module.base_layer if isinstance(module, LoraLayer) else module
        if style == SUMMED:
            _sum_gradients(base, mesh.get_group())
            continue
        _divide(base, style, mesh)
        divided += 1
        if isinstance(module, LoraLayer):
            for half in _divided_halves(module, style):
                _divide(half, style, mesh)
    if tied and not why:
        ends[1].weight = ends[0].weight
        divided -= 1
    return Products(divided, why)


def _why_whole(ends: list[nn.Module], size: int) -> str:
    if any(type(m) is not nn.Linear and not isinstance(m, nn.Embedding) for m in ends):
        return "an adapter trains them"
    rows = {m.get_parameter("weight").shape[0] for m in ends}
    if any(count % size for count in rows):
        return f"{max(rows):,} rows cannot be shared evenly"
    return ""


def _divided_halves(layer: Any, style: str) -> Iterator[nn.Module]:
    """The half of each adapter that is divided as its frozen matrix: B gives columns, A takes rows."""
    if style in COLUMNS:
        yield from layer.lora_B.values()
    elif style in ROWS:
        yield from layer.lora_A.values()


def _divide(module: nn.Module, style: str, mesh: DeviceMesh) -> None:
    way = ALL_PARALLEL_STYLES[style]
    for name, _ in list(module.named_parameters(recurse=False)):
        way.shard_param(module, name, mesh)
        part = module._parameters[name]
        if isinstance(part, DTensor) and not part.is_meta:
            # A view would keep the whole.
            mine = DTensor.from_local(
                part.to_local().detach().clone(),
                part.device_mesh,
                part.placements,
                run_check=False,
                shape=part.shape,
                stride=part.stride(),
            )
            module._parameters[name] = nn.Parameter(mine, requires_grad=part.requires_grad)
    way.install_forward(module, mesh)


def _sum_gradients(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Weights that every process holds, and uses for its own heads alone: their gradients are sums over the group.

    transformers' style sums what has gathered in `grad`, which is wrong from the second micro batch of a step on.
    """
    hooked = WeakTensorKeyDictionary()

    def total(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=group)
        return gradient

    def look(module: nn.Module, inputs: Any) -> None:
        # FSDP puts others in their place while the layer computes.
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and torch.is_grad_enabled() and parameter not in hooked:
                hooked[parameter] = True
                parameter.register_hook(total)

    module.register_forward_pre_hook(look)
