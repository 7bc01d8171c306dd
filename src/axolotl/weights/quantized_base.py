"""The values that quantised base weights stand for, for merging into exactly what an adapter was trained on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from axolotl.errors import ModelError
from axolotl.model.quantize import quantization_config, wants_quantized_load
from axolotl.registry import require_extra

if TYPE_CHECKING:
    from axolotl.config.adapter import AdapterSection
    from axolotl.config.model import ModelSection


def round_trip(model: ModelSection, adapter: AdapterSection) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that rounds a linear layer's weights as loading them in 4 bits does.

    Raises ModelError where the config does not load the base in 4 bits, EnvironmentProblem without bitsandbytes.
    """
    if wants_quantized_load(model, adapter) != 4:
        raise ModelError(
            "Merging into the quantised base is for adapters that were trained on 4-bit weights.",
            "Set `load_in_4bit: true` as in training, or merge into the full-precision base.",
        )
    functional = require_extra("bitsandbytes.functional", "bitsandbytes", "Merging into the quantised base")
    dtype = torch.bfloat16 if model.bf16 in (True, "auto", "full") else torch.float32
    config = quantization_config(model, adapter, dtype)
    assert config is not None

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        packed, state = functional.quantize_4bit(
            weight.to(dtype).contiguous(),
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
        )
        return functional.dequantize_4bit(packed, state).float()

    return rounded


def rounding_of_training(
    model: ModelSection, adapter: AdapterSection
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What loading the base as in training does to its weights: None for full precision, or where it cannot be told."""
    if wants_quantized_load(model, adapter) != 4 or importlib.util.find_spec("bitsandbytes") is None:
        return None
    return round_trip(model, adapter)
