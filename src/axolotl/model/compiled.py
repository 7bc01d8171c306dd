"""torch.compile layer by layer: one compilation serves all layers that are alike, and what cannot be compiled runs as it is.

Compiling the whole model takes as many times longer as it has layers, and breaks at the first thing in it that cannot
be traced. Shapes are taken as fixed, as packed rows have them; a second shape makes those that differ variable.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import torch
import torch._dynamo
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from axolotl.config.train import TrainSection
from axolotl.console import note, warn
from axolotl.errors import ModelError
from axolotl.model import frames
from axolotl.model.attention import PACKED, packed_attention
from axolotl.model.recompute import layers_of
from axolotl.model.replace import Replacements

VARIANTS = 32
"""Compilations of one layer's code before the rest runs uncompiled: shapes, kinds of layers, training and evaluation."""


@dataclass
class Compiling:
    """The compilation of a model's layers."""

    options: dict[str, Any]
    strict: bool = False
    failed: str = ""
    """Why nothing is compiled any more."""
    programs: dict[Any, Any] = field(default_factory=dict)
    """One compiled function for all layers of a class, which are its argument."""

    def give_up(self, error: Exception) -> None:
        """Tells why, once. Raises ModelError with `strict`."""
        lines = [line for line in str(error).splitlines() if line.strip()]
        self.failed = lines[0][:200] if lines else type(error).__name__
        if self.strict:
            raise ModelError(
                f"torch.compile failed: {self.failed}.", "Delete `torch_compile`, or set `strict: false`."
            ) from error
        warn(f"torch.compile failed, and the layers run as they are: {self.failed}")


def compile_layers(
    model: PreTrainedModel, train: TrainSection, made: Replacements, *, strict: bool = False
) -> Compiling | None:
    """Has the layers of a model compiled at their first call, as `torch_compile` and its options ask; None: they do not.

    To be called after kernels and tiles, which are not looked into, and before layers are recomputed, so that the
    second run is the compiled one too. Undone with `made`.
    """
    if train.torch_compile is not True:
        return None
    options: dict[str, Any] = {"dynamic": None, "fullgraph": False}
    options |= {"backend": train.torch_compile_backend} if train.torch_compile_backend else {}
    options |= {"mode": train.torch_compile_mode} if train.torch_compile_mode else {}
    options |= {"options": dict(train.torch_compile_options)} if train.torch_compile_options else {}
    compiling = Compiling(options, strict)
    layers = layers_of(model)
    if not layers:
        note(f"`torch_compile`: {type(model).__name__} has no repeated layers, and runs as it is.")
        return compiling
    config: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    before = getattr(config, name)
    setattr(config, name, max(before, VARIANTS))
    made.undoing(lambda: setattr(config, name, before))
    for module in (m for layer in layers for m in layer.modules() if m is not layer):
        replaced = getattr(module.__dict__.get("forward"), "__func__", None)
        if replaced is not None:
            made.forward(module, torch.compiler.disable(replaced))
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
    made.undoing(lambda: AttentionInterface.register(PACKED, packed_attention))
    for layer in layers:
        made.forward(layer, _compiled(layer, compiling), "compiled layer")
    return compiling


def _own_copy(function: Any) -> Any:
    """A copy with a code of its own: compiled functions are found again by their code, and another model's layers may
    hold other parts."""
    code: CodeType = function.__code__
    copy = FunctionType(
        code.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _compiled(layer: nn.Module, compiling: Compiling) -> Any:
    plain = layer.__dict__.get("forward")
    function = getattr(plain, "__func__", None) or type(layer).forward
    # The class's own code, without the wrapper of transformers that asks whether to checkpoint.
    function = getattr(function, "__wrapped__", function)
    program = compiling.programs.get(function)
    if program is None:
        program = torch.compile(_own_copy(function), **compiling.options)
        compiling.programs[function] = program

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not compiling.failed:
            try:
                return program(self, *args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                compiling.give_up(error)
                frames.begin_anew()
        return function(self, *args, **kwargs)

    return forward
