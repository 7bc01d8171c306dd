"""FSDP2: every process holds a part of each weight, and layers are put together when they compute (`fully_shard` of torch)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from axolotl.config.axes import axes_of
from axolotl.config.distributed import DistributedSection, FsdpConfig
from axolotl.distributed.mesh import Mesh, build_mesh
from axolotl.distributed.tensor import Products, divide_products
from axolotl.distributed.world import world
from axolotl.errors import ModelError, Problem

PRECISIONS = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
"""Values of `mixed_precision_policy`."""
DEFERRED_BYTES = 1 << 30
"""Gradients up to this size wait whole for the last micro batch of a step; larger ones are divided after each."""


@dataclass(frozen=True)
class Sharding:
    """How a model has been sharded."""

    root: nn.Module
    """The module whose forward pass begins everything (the base model, without PEFT's wrapper)."""
    mesh: Mesh
    units: tuple[str, ...]
    """Classes of the layers that are gathered one at a time."""
    defers: bool
    """Gradients are reduced once a step, not after each micro batch."""
    products: Products | None = None
    """How matrix products are divided; None without a tensor axis."""

    @contextlib.contextmanager
    def not_the_last(self) -> Iterator[None]:
        """Around a micro batch that others of its step follow: what may wait of the reduction waits."""
        root: Any = self.root
        if not isinstance(root, FSDPModule):
            yield
            return
        if self.defers:
            root.set_requires_gradient_sync(False)
        elif self.mesh.axes.replicate > 1:
            # Gradients are divided after each micro batch, so that they never stand whole; copies agree at the end.
            root.set_requires_all_reduce(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)
            root.set_requires_all_reduce(True)


def mesh_for(distributed: DistributedSection, device: str) -> Mesh:
    """The mesh of this run. Its sizes have been looked at before."""
    axes = axes_of(distributed, world().size)
    if axes is None:
        raise AssertionError("the sizes of the axes are checked before a run")
    return build_mesh(axes, device)


def loads_in_parts(distributed: DistributedSection) -> bool:
    """Whether processes shall read their own parts of the weights alone."""
    options = distributed.fsdp_config
    if world().size <= 1:
        return False
    if (distributed.tensor_parallel_size or 1) > 1:
        return True
    return options is not None and options.cpu_ram_efficient_loading is not False


def unit_classes(model: nn.Module, options: FsdpConfig) -> tuple[str, ...]:
    """Classes of the modules that become units: those that the config names, else the model's own layers.

    Raises ModelError for a class that no module of the model has, with those that are there.
    """
    present = {type(m).__name__ for m in model.modules()}
    if options.auto_wrap_policy == "NO_WRAP":
        return ()
    asked = options.transformer_layer_cls_to_wrap
    if asked and options.auto_wrap_policy != "SIZE_BASED_WRAP":
        names = [n.strip() for n in asked.split(",")] if isinstance(asked, str) else list(asked)
        unknown = [name for name in names if name not in present]
        if unknown:
            found = ", ".join(f"`{n}`" for n in layer_classes(model)) or "none that repeat"
            raise ModelError(
                Problem(
                    f"`transformer_layer_cls_to_wrap: {unknown[0]}`: no module of the model is of this class; its "
                    f"layers are {found}.",
                    "Delete the line: the layers are found without it.",
                    keys=("fsdp_config.transformer_layer_cls_to_wrap",),
                )
            )
        return tuple(names)
    return layer_classes(model)


def layer_classes(model: nn.Module) -> tuple[str, ...]:
    """Classes of the model's repeating layers: what stands in its lists of at least two modules, outermost lists alone."""
    found: dict[str, None] = {}

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) > 1 and any(True for _ in child.parameters()):
                found.update(dict.fromkeys(type(each).__name__ for each in child))
            else:
                look(child)

    look(model)
    return tuple(found)


def _units(model: nn.Module, options: FsdpConfig, classes: tuple[str, ...]) -> list[nn.Module]:
    """Modules that become units, inner ones first."""
    if options.auto_wrap_policy != "SIZE_BASED_WRAP":
        found = [m for m in model.modules() if type(m).__name__ in classes and m is not model]
        return found[::-1]
    least, units = options.min_num_params or 1, []

    def look(module: nn.Module) -> int:
        """Parameters below a module that no unit has yet."""
        free = sum(p.numel() for p in module.parameters(recurse=False)) + sum(map(look, module.children()))
        if free >= least and module is not model and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            units.append(module)
            return 0
        return free

    look(model)
    return units


def norms_in_float32(model: nn.Module, classes: Sequence[str] = ()) -> list[str]:
    """Holds the norm layers (or modules of these classes) in float32; what they pass on keeps its number type.

    Returns the classes found. Raises ModelError for a class that no module of the model has.
    """
    found: dict[str, None] = {}
    for module in model.modules():
        name = type(module).__name__
        own = any(True for _ in module.parameters(recurse=False))
        if own and (name in classes if classes else "norm" in name.lower()):
            found[name] = None
            module.float()
            module.register_forward_hook(_as_its_input)
    unknown = [name for name in classes if name not in found]
    if unknown:
        raise ModelError(
            Problem(
                f"`fp32_norm_classes: [{unknown[0]}]`: no module of the model is of this class.",
                "Delete the line: modules whose class is called a norm are taken then.",
                keys=("fp32_norm_classes",),
            )
        )
    return list(found)


def _as_its_input(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    if torch.is_tensor(output) and inputs and torch.is_tensor(inputs[0]):
        return output.to(inputs[0].dtype)
    return output


def shard_model(model: nn.Module, options: FsdpConfig, mesh: Mesh) -> Sharding:
    """Divides every parameter of `model` (which may lie on the meta device) over the mesh, in place.

    `model` is the base model; adapters are already in it. What is frozen is divided like what is trained. Each unit is
    gathered before its forward pass, given back after it unless `reshard_after_forward: false`, and gathered again for
    its backward pass. Gradients are summed in float32. A tensor axis of the mesh divides matrices before that; where it
    is the only one, nothing is gathered. Raises ModelError for layer classes that are not there, and for a model whose
    products cannot be divided.
    """
    products = divide_products(model, mesh.tensor) if mesh.axes.tensor > 1 else None
    if products is not None and mesh.axes.processes == mesh.axes.tensor:
        return Sharding(model, mesh, (), True, products)
    classes = unit_classes(model, options)
    param = PRECISIONS.get((options.mixed_precision_policy or "").lower())
    policy = MixedPrecisionPolicy(param_dtype=param, reduce_dtype=torch.float32)
    offload: OffloadPolicy = OffloadPolicy()
    if options.offload_params:
        pinned = options.cpu_offload_pin_memory is not False and mesh.root.device_type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=pinned)
    common: dict[str, Any] = {"mesh": mesh.weights, "mp_policy": policy, "offload_policy": offload}
    reshard = options.reshard_after_forward is not False
    units = _units(model, options, classes)
    for unit in _of_one_number_type(model, units):
        fully_shard(unit, reshard_after_forward=reshard, **common)
    # Embeddings, last norm and head: their weights are read outside of their own forward passes too (tied weights, a
    # loss that never holds whole logits), so they belong to the model itself, which is never given back in between.
    fully_shard(model, reshard_after_forward=False, **common)
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    return Sharding(model, mesh, classes, trained <= DEFERRED_BYTES, products)


def _of_one_number_type(model: nn.Module, units: list[nn.Module]) -> list[nn.Module]:
    """The units, inner ones first, with one more for each module whose trained parameters are of another number type.

    The gradients of a unit travel together and have to be of one type; frozen parameters travel as they are.
    """
    members = {id(unit) for unit in units}
    apart: list[nn.Module] = []

    def owned(unit: nn.Module) -> Iterator[nn.Module]:
        yield unit
        for child in unit.children():
            if id(child) not in members:
                yield from owned(child)

    for unit in [*units, model]:
        found: dict[torch.dtype, list[nn.Module]] = {}
        sizes: dict[torch.dtype, int] = {}
        for module in owned(unit):
            for p in module.parameters(recurse=False):
                if p.requires_grad:
                    found.setdefault(p.dtype, []).append(module)
                    sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
        main = max(sizes, key=lambda dtype: sizes[dtype], default=None)
        apart += [m for dtype, modules in found.items() if dtype != main for m in modules]
    return [*dict.fromkeys(apart), *units]


def is_sharded(model: nn.Module) -> bool:
    """Whether a model, or the one inside PEFT's wrapper, is divided by FSDP2."""
    return any(isinstance(m, FSDPModule) for m in model.modules())


def give_back(model: nn.Module) -> None:
    """Ends what a forward pass without a backward pass leaves: layers that stay gathered go back to their parts.

    Before that, `parameters()` are whole tensors here and there, which no optimizer steps and nothing may save.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor; a tensor that is not divided itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
