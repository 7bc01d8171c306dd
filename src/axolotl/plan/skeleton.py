"""The model of a config without its weights: built by the code that trains it, on torch's meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights

from axolotl import console
from axolotl.config.adapter import AdapterSection
from axolotl.config.model import ModelSection
from axolotl.config.resolve import Hardware
from axolotl.errors import ModelError, UserError
from axolotl.model.adapter import add_adapter
from axolotl.model.freeze import freeze_except
from axolotl.model.load import load_model_config, model_class, weight_dtype
from axolotl.model.quantize import scheme_of, wants_quantized_load

NF4_BLOCK, ABSMAX_BLOCK = 64, 256
"""Weights that share one scale in bitsandbytes' 4-bit formats, and scales that share one of their own."""


def packed_bytes(count: int, bits: int, rows: int = 1, double: bool = True) -> int:
    """Bytes of a weight of `count` numbers that bitsandbytes holds in `bits` bits, its scales included.

    4 bits: two numbers a byte, one scale for 64 numbers, held in a byte (and 4 bytes for 256 scales) with double
    quantisation and in 4 without. 8 bits: a byte each, and a float32 scale for each of `rows` rows.
    """
    if bits == 8:
        return count + 4 * rows
    blocks = -(-count // NF4_BLOCK)
    scales = blocks + 4 * -(-blocks // ABSMAX_BLOCK) if double else 4 * blocks
    return -(-count // 2) + scales + 64  # 16 float32 code values


class _PackedProduct(torch.autograd.Function):
    """x W of a frozen packed weight: unpacked for the product in each direction, never kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:  # type: ignore[override]
        ctx.layer = layer
        return x @ layer.unpacked(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad @ ctx.layer.unpacked(grad.dtype), None


class PackedLinear(nn.Linear):
    """A linear layer whose frozen weight lies in 4 or 8 bits, as bitsandbytes holds it; for rehearsals only."""

    bits = 4
    packed: torch.Tensor

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in], written anew from the packed bytes."""
        rows, columns = self.out_features, self.in_features
        whole = torch.empty(rows, columns, dtype=dtype, device=self.packed.device)
        whole.copy_(self.packed[:1].to(dtype))
        return whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        out = _PackedProduct.apply(x.to(dtype), self).clone()
        return out if self.bias is None else out + self.bias.to(out.dtype)


def build_skeleton(
    model: ModelSection,
    adapter: AdapterSection,
    hardware: Hardware,
    attention: str,
    vocabulary: int | None = None,
    depth: int | None = None,
) -> nn.Module:
    """The model that training would run, on the meta device: precision, quantised layers, adapter, frozen parts.

    `attention` is the implementation it calls; `vocabulary` the tokenizer's size where it is known; `depth` another
    number of layers (see `uniform_depth`). Raises ModelError
    for an architecture that cannot be built without its weights.
    """
    config = load_model_config(model)
    dtype = weight_dtype(model, adapter, hardware)
    cls = model_class(model, config)
    _fit_vocabulary(config, vocabulary)
    if depth is not None:
        _cut(config, depth)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if model.trust_remote_code:
        options["trust_remote_code"] = True
    bits = wants_quantized_load(model, adapter) or _bits_of(config)
    if scheme_of(config) is not None:
        # Its own loader is not needed for sizes, and would ask for packages and a GPU.
        del config.quantization_config
    build = getattr(cls, "from_config", None) or cls._from_config
    try:
        with torch.device("meta"), no_init_weights():
            built: nn.Module = build(config, **options)
        built.tie_weights()  # type: ignore[operator]
    except UserError:
        raise
    except Exception as error:
        raise ModelError(
            f"`{model.base_model}` cannot be built without its weights: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if bits:
        _pack(built, bits, model)
    with console.silenced(), torch.device("meta"):
        if adapter.adapter is not None:
            # How an adapter starts decides no size, and some ways need the weights.
            built = add_adapter(
                built,  # type: ignore[arg-type]
                adapter.model_copy(update={"peft_init_lora_weights": None, "peft": None}),
            )
        elif model.unfrozen_parameters:
            freeze_except(built, model.unfrozen_parameters)  # type: ignore[arg-type]
    if bits:
        for module in built.modules():
            # PEFT's layers over bitsandbytes leave the number type to autocast.
            if isinstance(getattr(module, "base_layer", None), PackedLinear):
                module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    built.train()
    return built


def _fit_vocabulary(config: PretrainedConfig, vocabulary: int | None) -> None:
    text = config.get_text_config()
    if vocabulary is not None and vocabulary > text.vocab_size:
        text.vocab_size = vocabulary


def uniform_depth(config: PretrainedConfig) -> int | None:
    """The number of layers where all are alike, so that memory and time grow evenly with it; else None."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    mixed = any(
        getattr(text, name, None) for name in ("first_k_dense_replace", "mlp_only_layers", "num_experts")
    )
    depth = getattr(text, "num_hidden_layers", None)
    return depth if isinstance(depth, int) and len(kinds) < 2 and not mixed else None


def _cut(config: PretrainedConfig, depth: int) -> None:
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    text.num_hidden_layers = depth


def _bits_of(config: PretrainedConfig) -> int:
    """Bits of a base model that comes quantised."""
    return {"gptq": 4, "awq": 4, "mxfp4": 4, "fp8": 8, "bitsandbytes": 4}.get(scheme_of(config) or "", 0)


def _pack(model: nn.Module, bits: int, section: ModelSection) -> None:
    """Turns the linear layers that bitsandbytes would pack (all but the output head) into packed ones."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    skipped = set((section.bnb_config_kwargs or {}).get("llm_int8_skip_modules") or ())
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head and name.rsplit(".", 1)[-1] not in skipped:
            module.__class__ = PackedLinear
            module.bits = bits  # type: ignore[assignment]


def packed_layers(model: nn.Module) -> list[PackedLinear]:
    """The layers whose weights are held in fewer bits."""
    return [m for m in model.modules() if isinstance(m, PackedLinear)]


def double_quantised(section: ModelSection) -> bool:
    """Whether the scales of 4-bit weights are quantised themselves."""
    return bool((section.bnb_config_kwargs or {}).get("bnb_4bit_use_double_quant", True))
