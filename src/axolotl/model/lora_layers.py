"""PEFT's LoRA layers with our products: which layers fit, and how their frozen weights are reached.

A layer that does not fit keeps PEFT's own code, with a line that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from axolotl.kernels import lora
from axolotl.kernels.fp8 import EightBit, EightBitStack
from axolotl.kernels.frozen import Dense, Frozen
from axolotl.kernels.lora import LoraGroup, lora_linears, lora_mlp, padded
from axolotl.kernels.nf4 import FourBitStack, from_bitsandbytes
from axolotl.model.replace import Replacements, own_forward
from axolotl.model.shapes import GatedMlp

EIGHT_BIT = "_axolotl_eight_bit"
"""Attribute of a linear layer whose weight is held in 8-bit floats."""


def misfit(layer: nn.Module, frozen: Callable[[Any], bool] | None = None) -> str:
    """Why a layer keeps PEFT's code; empty where it can take ours. `frozen` says which frozen layers can."""
    if not isinstance(layer, LoraLayer):
        return "not every layer of the group has an adapter"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return f"{len(active)} adapters are active"
    (name,) = active
    base: Any = layer.get_base_layer()
    if getattr(layer, "lora_variant", {}).get(name) is not None:
        return "it is DoRA, or another variant"
    if (
        not isinstance(layer.lora_dropout[name], nn.Identity)
        and getattr(layer.lora_dropout[name], "p", 1) > 0
    ):
        return "`lora_dropout` is not 0"
    if getattr(layer.lora_B[name], "bias", None) is not None or layer.fan_in_fan_out:
        return "its adapter has a bias or transposed weights"
    if base.weight.requires_grad or (getattr(base, "bias", None) is not None and base.bias.requires_grad):
        return "its own weights are trained"
    return "" if (frozen or _reached)(base) else f"its frozen layer is a {type(base).__name__}"


def _reached(base: Any) -> bool:
    """Whether the numbers of a frozen layer can be reached by our products."""
    if type(base) is nn.Linear:
        return True
    try:
        from_bitsandbytes(base.weight)
    except (AttributeError, ValueError, RuntimeError):
        return False
    return True


class Group:
    """LoRA layers that share their input, and whether our products may stand for them at this moment."""

    def __init__(self, layers: Sequence[nn.Module], made: Replacements, *, fold: bool) -> None:
        self.layers: list[Any] = list(layers)
        self.name = next(n for n in self.layers[0].active_adapters if n in self.layers[0].lora_A)
        bases = [each.get_base_layer() for each in self.layers]
        self.weights: list[torch.Tensor] = [each.weight for each in bases]
        a = [each.lora_A[self.name].weight for each in self.layers]
        room = padded(sum(each.shape[0] for each in a)) if fold else 0
        self.lora = LoraGroup(
            self._frozen(bases, room, made),
            a,
            [each.lora_B[self.name].weight for each in self.layers],
            [each.scaling[self.name] for each in self.layers],
            [getattr(each, "bias", None) for each in bases],
        )
        self._places = [lora.place(w) for w in self.weights]

    def _frozen(self, bases: list[Any], room: int, made: Replacements) -> Frozen:
        if all(hasattr(each, EIGHT_BIT) for each in bases):
            matrices = [getattr(each, EIGHT_BIT) for each in bases]
            stack = EightBitStack(matrices)
            for weight, matrix in zip(self.weights, matrices, strict=True):
                weight.data = matrix.values
            return stack
        if all(type(each) is nn.Linear for each in bases):
            made.undoing(self._release)
            return Dense(self.weights, room)
        return FourBitStack([from_bitsandbytes(each.weight) for each in bases])

    def _release(self) -> None:
        # The copy of B may be a part of the weights' buffer, and would keep all of it.
        self.lora.forget()
        self.lora.base.release()  # type: ignore[attr-defined]

    def ready(self) -> bool:
        """False while the adapter is off or merged, another one is active, or the weights have moved."""
        for layer, before, weight in zip(self.layers, self._places, self.weights, strict=True):
            if layer.disable_adapters or layer.merged or list(layer.active_adapters) != [self.name]:
                return False
            if lora.place(weight) != before:
                return False
        return True


Waiting = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Outputs that wait for the call of their layer, by its place in the group: (the input they were made of, output)."""


def fuse_linears(group: Group, made: Replacements, what: str) -> Waiting:
    """Gives the layers one product. The first that is called makes the outputs of all; the others take theirs.

    What is put into the mapping that it gives is taken by the layer that is called with that very input.
    """
    waiting: Waiting = {}

    def forward_of(index: int) -> Any:
        def forward(self: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            given, y = waiting.pop(index, (None, None))
            if given is x and y is not None and not args and not kwargs:
                return y
            waiting.clear()
            if args or kwargs or not group.ready():
                out: torch.Tensor = own_forward(self)(x, *args, **kwargs)
                return out
            outs = lora_linears(x, group.lora)
            waiting.update({i: (x, y) for i, y in enumerate(outs) if i != index})
            return outs[index]

        return forward

    for i, layer in enumerate(group.layers):
        made.forward(layer, forward_of(i))
    made.counts[what] += 1
    return waiting


def fuse_mlp(
    module: nn.Module, mlp: GatedMlp, gate_up: Group, down: Group, made: Replacements, what: str
) -> None:
    """Gives a gated feed-forward layer one pass that keeps the least."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if gate_up.ready() and down.ready():
            return lora_mlp(x, gate_up.lora, down.lora, mlp.act)
        out: torch.Tensor = own_forward(self)(x)
        return out

    made.forward(module, forward, what)


def hold_in_eight_bits(layer: nn.Linear, made: Replacements) -> None:
    """Replaces the frozen weight of a linear layer by 8-bit floats, in place; undone, it is what they stand for."""
    matrix = EightBit(layer.weight)
    setattr(layer, EIGHT_BIT, matrix)
    layer.weight.data = matrix.values

    def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, matrix.whole(x.dtype), bias)

    def undo() -> None:
        layer.weight.data = matrix.whole(matrix.dtype)
        delattr(layer, EIGHT_BIT)

    made.undoing(undo)
    made.forward(layer, forward, "8-bit weights")
