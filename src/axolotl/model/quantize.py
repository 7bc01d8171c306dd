"""Loading weights in fewer bits: the bitsandbytes configuration, and what already quantised models need."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import torch
import transformers

from axolotl.errors import EnvironmentProblem, ModelError, Problem
from axolotl.registry import missing_extra, require_extra

if TYPE_CHECKING:
    from axolotl.config.adapter import AdapterSection
    from axolotl.config.model import ModelSection

# What must be importable to load a model that comes in this scheme, and what to install.
_PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "bitsandbytes": (("bitsandbytes",), "pip install 'axolotl[bitsandbytes]'"),
    "gptq": (("gptqmodel",), "pip install gptqmodel optimum"),
    "awq": (("gptqmodel", "awq"), "pip install gptqmodel"),
    "compressed-tensors": (("compressed_tensors",), "pip install compressed-tensors"),
    "aqlm": (("aqlm",), "pip install aqlm"),
    "hqq": (("hqq",), "pip install hqq"),
    "torchao": (("torchao",), "pip install torchao"),
}
_GPU_ONLY = frozenset({"gptq", "awq", "fp8", "fbgemm_fp8", "aqlm"})


def wants_quantized_load(model: ModelSection, adapter: AdapterSection) -> int:
    """Bits in which the frozen weights are held: 4, 8, or 0 for neither. `adapter: qlora` alone means 4."""
    if model.load_in_8bit:
        return 8
    return 4 if model.load_in_4bit or adapter.adapter == "qlora" else 0


def _asked_for(model: ModelSection, adapter: AdapterSection, bits: int) -> tuple[str, str]:
    """What asks for quantised weights, and its key."""
    key = f"load_in_{bits}bit"
    return (f"`{key}: true`", key) if getattr(model, key) else (f"`adapter: {adapter.adapter}`", "adapter")


def check(model: ModelSection, adapter: AdapterSection) -> list[Problem]:
    """What this machine lacks for weights in 4 or 8 bits."""
    bits = wants_quantized_load(model, adapter)
    return missing_extra("bitsandbytes", "bitsandbytes", *_asked_for(model, adapter, bits)) if bits else []


def quantization_config(
    model: ModelSection, adapter: AdapterSection, dtype: torch.dtype
) -> transformers.BitsAndBytesConfig | None:
    """The bitsandbytes configuration, or None. `dtype` is that of the matrix products.

    4 bits: nf4 with double quantisation unless `bnb_config_kwargs` says otherwise. Raises EnvironmentProblem where
    bitsandbytes is missing and ModelError for an argument that it does not know.
    """
    bits = wants_quantized_load(model, adapter)
    if not bits:
        return None
    require_extra("bitsandbytes", "bitsandbytes", *_asked_for(model, adapter, bits))
    if bits == 8:
        # It tells of every cast of every layer in every step.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        options: dict[str, Any] = {"load_in_8bit": True}
    else:
        options = {
            "load_in_4bit": True,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            # Shards of a distributed model have one number type: the packed weights take that of the others.
            "bnb_4bit_quant_storage": dtype,
        }
    options |= model.bnb_config_kwargs or {}
    config = transformers.BitsAndBytesConfig()
    unknown = [k for k in options if not hasattr(config, k)]
    if unknown:
        known = sorted(k for k in config.to_dict() if k.startswith(("bnb_", "llm_int8_")) and k[0] != "_")
        raise ModelError(
            Problem(
                f"`bnb_config_kwargs.{unknown[0]}` is not known to bitsandbytes.",
                f"Known: {', '.join(known)}.",
                keys=("bnb_config_kwargs",),
            )
        )
    try:
        return transformers.BitsAndBytesConfig(**options)
    except (TypeError, ValueError) as error:
        raise ModelError(
            Problem(
                f"`bnb_config_kwargs` is refused: {error}",
                "Correct or remove it.",
                keys=("bnb_config_kwargs",),
            )
        ) from None


def check_prequantized(
    config: transformers.PretrainedConfig, name: str, adapter: AdapterSection, device: str, training: bool
) -> None:
    """Refuses, before the long work, a base model that comes quantised and cannot be used so here.

    Raises ModelError where whole quantised weights would have to be trained, EnvironmentProblem for a missing
    package or GPU.
    """
    scheme = scheme_of(config)
    if scheme is None:
        return
    if training and adapter.adapter is None:
        raise ModelError(
            Problem(
                f"`base_model: {name}` holds {scheme} weights, which cannot be trained themselves.",
                "Train an adapter on them (`adapter: lora`), or start from the full-precision model.",
                "model",
                ("base_model", "adapter"),
            )
        )
    packages, remedy = _PACKAGES.get(scheme, ((), ""))
    if packages and not any(importlib.util.find_spec(p) for p in packages):
        raise EnvironmentProblem(
            f"`base_model: {name}` holds {scheme} weights; reading them needs the package `{packages[0]}`.",
            remedy,
        )
    if scheme in _GPU_ONLY and device == "cpu":
        raise EnvironmentProblem(
            f"`base_model: {name}` holds {scheme} weights, which need a GPU.",
            "Use the full-precision model here.",
        )


def scheme_of(config: transformers.PretrainedConfig) -> str | None:
    """The scheme in which a model comes quantised (gptq, awq, fp8, mxfp4, ...), or None."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    method = quantization.get("quant_method")
    return str(getattr(method, "value", method)) if method else None
