"""Full fine-tuning whose matrix products are made of 8-bit floats (torchao; formats: arXiv 2209.05433).

Weights, their gradients and the optimizer keep their number type. For each product input, weight and incoming gradient
are rounded to e4m3 with a scale for each row, as the products of Hopper and newer take them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from axolotl.config.model import ModelSection
from axolotl.config.resolve import Hardware
from axolotl.console import note
from axolotl.errors import ModelError, Problem
from axolotl.model.recompute import layers_of
from axolotl.model.replace import Replacements
from axolotl.registry import missing_extra, require_extra

MULTIPLE = 16
"""What both sizes of a weight have to be a multiple of."""


def check(model: ModelSection, hardware: Hardware) -> Iterator[Problem]:
    """Why the machine cannot train in 8-bit floats."""
    if not model.fp8:
        return
    if hardware.device != "cuda":
        yield Problem(
            "`fp8: true` needs a GPU that multiplies 8-bit floats; there is no NVIDIA GPU here.",
            "Delete the line, or run it on a Hopper GPU (H100, H200) or a newer one.",
            "environment",
            ("fp8",),
        )
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        yield Problem(
            f"`fp8: true` needs a GPU that multiplies 8-bit floats; {torch.cuda.get_device_name()} does not.",
            "Delete the line; `bf16: true` is what this GPU does fast.",
            "environment",
            ("fp8",),
        )
    yield from missing_extra("torchao", "torchao", "`fp8: true`", "fp8")


def train_in_float8(model: PreTrainedModel, made: Replacements, *, emulate: bool = False) -> int:
    """Gives the linear layers of a model 8-bit products; the head keeps its own. Undone with `made`.

    `emulate`: round to the same numbers and multiply in float32, which runs everywhere. Returns how many layers there
    are. Raises EnvironmentProblem without torchao, ModelError for a model without such layers.
    """
    float8 = require_extra("torchao.float8", "torchao", "`fp8: true`", "fp8")
    config: Any = float8.Float8LinearConfig.from_recipe_name("rowwise")
    if emulate:
        object.__setattr__(config, "emulate", True)
    found: list[tuple[nn.Module, str, nn.Linear]] = []
    odd = 0
    for layer in layers_of(model):
        for parent in list(layer.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    fits = child.in_features % MULTIPLE == 0 and child.out_features % MULTIPLE == 0
                    odd += not fits
                    if fits:
                        found.append((parent, name, child))
    if not found:
        raise ModelError(
            Problem(
                f"`fp8: true`: {type(model).__name__} has no linear layers that can be multiplied in 8-bit floats.",
                f"Both sizes of a weight have to be multiples of {MULTIPLE}. Delete the line.",
                "model",
                ("fp8",),
            )
        )
    linears = {id(child) for _, _, child in found}
    float8.convert_to_float8_training(model, config=config, module_filter_fn=lambda m, _: id(m) in linears)

    def undo() -> None:
        for parent, name, child in found:
            setattr(parent, name, child)

    made.undoing(undo)
    made.counts["8-bit product"] += len(found)
    more = f"; {odd} whose sizes are no multiples of {MULTIPLE} keep their products" if odd else ""
    note(f"fp8: {len(found)} linear layers multiply in 8-bit floats{more}.")
    return len(found)
