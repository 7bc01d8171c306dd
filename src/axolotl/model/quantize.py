"""Loading weights in fewer bits: the bitsandbytes configuration, and what already quantised models need."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.quantizers import AutoHfQuantizer

from axolotl.console import note
from axolotl.errors import EnvironmentProblem, ModelError, Problem
from axolotl.model.files import local_folder, read_json
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
_GPU_ONLY = frozenset({"gptq", "awq", "fbgemm_fp8", "aqlm"})
# Their products have no gradient: the weights are unpacked into plain ones as they are loaded.
_UNPACKED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}


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


def pack_in_place(model: transformers.PreTrainedModel, config: transformers.BitsAndBytesConfig) -> None:
    """Holds the linear layers of a model that was built, not loaded, in 4 or 8 bits, as loading would have.

    Raises EnvironmentProblem where transformers is too old to do so.
    """
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    if not hasattr(quantizer, "get_quantize_ops"):
        raise EnvironmentProblem(
            "`reinit_weights: true` in 4 or 8 bits needs transformers 5 or newer.",
            "Install it, or delete `load_in_4bit` and `load_in_8bit`.",
        )
    before = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantizer.preprocess_model(model, device_map=None)
    operation = quantizer.get_quantize_ops()
    for name in list(before):
        old, new = before.pop(name), model.get_submodule(name)
        if new is old:
            continue
        key = f"{name}.weight"
        packed = operation.convert({key: old.weight.detach()}, full_layer_name=key, model=model)
        for written, value in packed.items():
            setattr(new, written.rpartition(".")[2], value)
        if old.bias is not None:
            new.bias = old.bias
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    quantizer.postprocess_model(model)
    keep_layout(model)


def check_prequantized(
    config: transformers.PretrainedConfig,
    name: str,
    adapter: AdapterSection,
    device: str,
    training: bool,
    model: ModelSection | None = None,
) -> None:
    """Refuses, before the long work, a base model that comes quantised and cannot be used so here.

    Raises ModelError where whole quantised weights would have to be trained, EnvironmentProblem for a missing
    package or GPU.
    """
    scheme = scheme_of(config)
    if model is not None:
        _check_said_scheme(model, scheme)
    if scheme is None:
        return
    if model is not None and wants_quantized_load(model, adapter):
        raise ModelError(
            Problem(
                f"`base_model: {name}` holds {scheme} weights already; they cannot be quantised again.",
                "Remove `load_in_4bit` or `load_in_8bit` and write `adapter: lora`, or start from the full-precision model.",
                "model",
                ("base_model", "load_in_4bit" if model.load_in_4bit else "load_in_8bit"),
            )
        )
    if training and adapter.adapter is None:
        raise ModelError(
            Problem(
                f"`base_model: {name}` holds {scheme} weights, which cannot be trained themselves.",
                "Train an adapter on them (`adapter: lora`), or start from the full-precision model.",
                "model",
                ("base_model", "adapter"),
            )
        )
    if scheme in _GPU_ONLY and device == "cpu":
        raise EnvironmentProblem(
            Problem(
                f"`base_model: {name}` holds {scheme} weights, which need a GPU.",
                "Use the full-precision model here.",
                "environment",
                ("base_model",),
            )
        )
    packages, remedy = _PACKAGES.get(scheme, ((), ""))
    if packages and not any(importlib.util.find_spec(p) for p in packages):
        raise EnvironmentProblem(
            Problem(
                f"`base_model: {name}` holds {scheme} weights; reading them needs the package `{packages[0]}`.",
                remedy,
                "environment",
                ("base_model",),
            )
        )


def check_files(model: ModelSection, adapter: AdapterSection, device: str) -> list[Problem]:
    """What keeps a base model on this machine that comes quantised from being trained on, read from its `config.json`."""
    folder = local_folder(model.base_model_config or model.base_model)
    if folder is None:
        return []
    try:
        held = read_json(folder / "config.json").get("quantization_config")
        config: Any = SimpleNamespace(quantization_config=held if isinstance(held, dict) else None)
        check_prequantized(config, model.base_model, adapter, device, True, model)
    except ModelError as error:
        # A folder without a readable config.json is told elsewhere.
        return [problem for problem in error.problems if problem.keys]
    except EnvironmentProblem as error:
        return list(error.problems)
    return []


def _check_said_scheme(model: ModelSection, scheme: str | None) -> None:
    """Raises ModelError where the config's keys name another scheme than the model's files."""
    said = [("gptq", "gptq")] if model.gptq else []
    if model.model_quantization_config:
        named = next(k for k, v in _UNPACKED.items() if v == model.model_quantization_config)
        said.append(("model_quantization_config", named))
    wrong = [(key, wanted) for key, wanted in said if wanted != scheme]
    if wrong:
        raise ModelError(
            Problem(
                f"`{key}` says that `base_model: {model.base_model}` holds {wanted} weights, but it holds "
                f"{f'{scheme} weights' if scheme else 'plain ones'}.",
                f"Remove `{key}`, or name the model that was meant.",
                "model",
                (key, "base_model"),
            )
            for key, wanted in wrong
        )


def unpacks(config: transformers.PretrainedConfig) -> bool:
    """Whether the files hold packed weights that become plain ones as they are loaded."""
    return scheme_of(config) in _UNPACKED


def unpacking(config: transformers.PretrainedConfig, model: ModelSection) -> Any | None:
    """The configuration that loads fp8 or mxfp4 weights as plain ones, so that an adapter can be trained or merged.

    None for all other models. Raises ModelError for an argument that the scheme does not know.
    """
    scheme = scheme_of(config)
    if scheme not in _UNPACKED:
        return None
    cls = getattr(transformers, _UNPACKED[scheme])
    known = inspect.signature(cls.__init__).parameters
    own = config.quantization_config
    options = {k: v for k, v in (own if isinstance(own, dict) else own.to_dict()).items() if k in known}
    given = model.model_quantization_config_kwargs or {}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ModelError(
            Problem(
                f"`model_quantization_config_kwargs.{unknown[0]}` is not known to {cls.__name__}.",
                f"Known: {', '.join(k for k in known if k not in ('self', 'kwargs'))}.",
                keys=("model_quantization_config_kwargs",),
            )
        )
    options |= given
    if not options.get("dequantize"):
        note(f"The {scheme} weights are unpacked as they are loaded: their own products have no gradient.")
    return cls(**(options | {"dequantize": True}))


def keep_layout(model: Any) -> None:
    """Keeps bitsandbytes from packing 4-bit weights anew for inference on the CPU.

    It does so at the first pass without gradients, such as an evaluation. From then on a training pass would go
    through a product that has no gradient, and every layer below would learn nothing, with a warning at most.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def scheme_of(config: transformers.PretrainedConfig) -> str | None:
    """The scheme in which a model comes quantised (gptq, awq, fp8, mxfp4, ...), or None."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    method = quantization.get("quant_method")
    return str(getattr(method, "value", method)) if method else None
