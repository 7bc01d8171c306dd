"""Loads the base model that a config asks for: class, precision, quantisation, size of the vocabulary, frozen parts."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.logging import disable_progress_bar

from axolotl.console import note, warn
from axolotl.distributed.deepspeed import divided, shape_of
from axolotl.distributed.world import world
from axolotl.errors import EnvironmentProblem, ModelError, Place, Problem
from axolotl.model.embeddings import (
    embedding_rows,
    fix_untrained_tokens,
    resize_embeddings,
    wanted_rows,
)
from axolotl.model.empty import empty_model
from axolotl.model.files import check_base_model, local_folder
from axolotl.model.freeze import freeze_except
from axolotl.model.quantize import (
    check_prequantized,
    keep_layout,
    pack_in_place,
    quantization_config,
    unpacking,
    unpacks,
)
from axolotl.model.ram import room_for_weights
from axolotl.model.tokenizer import explain_load_failure

if TYPE_CHECKING:
    from axolotl.config.adapter import AdapterSection
    from axolotl.config.model import ModelSection
    from axolotl.config.resolve import Hardware


def load_model(
    model: ModelSection,
    adapter: AdapterSection,
    tokenizer: PreTrainedTokenizerBase,
    hardware: Hardware,
    *,
    training: bool,
    attn_implementation: str | None = None,
    device: str | None = None,
    seed: int | None = None,
    stop_tokens: Sequence[str] = (),
    adapter_dir: Path | None = None,
    place: Place | None = None,
    in_parts: bool = False,
) -> PreTrainedModel:
    """The base model, resized to the tokenizer, quantised and frozen as the config says, without its adapter.

    `device`: where the weights go; None takes `device` of the config, else this process's GPU where there is one, else
    the CPU. `stop_tokens` are texts at which generation shall stop besides EOS. `adapter_dir`: an adapter that will be
    put on it, whose vocabulary counts. `in_parts`: the model will be divided among processes, and gets its weights after
    that (see `axolotl.model.empty`), as far as it can be loaded so. Raises ModelError for a model that is missing, damaged, unknown or does not
    fit, and EnvironmentProblem where a package or memory is lacking (see `axolotl.model.ram`).
    """
    problems = check_base_model(model, place)
    if problems:
        raise ModelError(problems)
    bars_only_at_a_terminal()
    device = device or _device(model, hardware)
    config = load_model_config(model, place)
    check_prequantized(config, model.base_model, adapter, hardware.device, training, model)
    dtype = weight_dtype(model, adapter, hardware, training)
    cls = model_class(model, config)
    if seed is not None:
        set_seed(seed)
    empty = None
    if in_parts and quantization_config(model, adapter, dtype) is None and unpacking(config, model) is None:
        device = "cpu"  # parts go to the device later
        empty = empty_model(
            cls,
            config,
            model,
            adapter,
            tokenizer,
            dtype,
            attn_implementation,
            adapter_dir=adapter_dir,
            seed=seed,
        )
    own = empty is None or (empty.from_first and world().is_main)
    whole = own and not divided()
    with room_for_weights(model, adapter, dtype, device=device, unpack=unpacks(config), whole=whole):
        if empty is not None and not own:
            loaded = empty.model
        elif model.reinit_weights:
            loaded = _from_nothing(cls, config, model, adapter, tokenizer, dtype, attn_implementation, device)
        else:
            loaded = _from_files(cls, config, model, adapter, dtype, attn_implementation, device, place)
        _fit_vocabulary(loaded, model, adapter, tokenizer, training, adapter_dir)
    if empty is not None:
        empty.ready(loaded)
    align_special_tokens(loaded, tokenizer, stop_tokens)
    if training:
        if model.fix_untrained_tokens is not None and (empty is None or loaded is not empty.model):
            fix_untrained_tokens(loaded, model.fix_untrained_tokens)
        loaded.config.use_cache = False
        if model.unfrozen_parameters and adapter.adapter is None:
            freeze_except(loaded, model.unfrozen_parameters)
    else:
        loaded.eval()
    return loaded


def bars_only_at_a_terminal() -> None:
    """Keeps the bars of transformers out of logs and pipes."""
    if not sys.stderr.isatty():
        disable_progress_bar()


def _device(model: ModelSection, hardware: Hardware) -> str:
    if model.device is not None:
        return str(model.device)
    if hardware.device == "cuda":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return hardware.device


def weight_dtype(
    model: ModelSection, adapter: AdapterSection, hardware: Hardware, training: bool = True
) -> torch.dtype:
    """Number type of the base weights.

    bfloat16 wherever bf16 was chosen; float16 only for weights that stay frozen, since loss scaling needs float32
    weights to update; else float32.
    """
    bf16 = hardware.bf16 if model.bf16 == "auto" and not model.fp16 else model.bf16 in (True, "full")
    if model.float32:
        return torch.float32
    if bf16 or model.bfloat16:
        return torch.bfloat16
    frozen = adapter.adapter is not None or not training
    return torch.float16 if model.float16 or (model.fp16 and frozen) else torch.float32


def load_model_config(model: ModelSection, place: Place | None = None) -> transformers.PretrainedConfig:
    """The architecture's configuration with `overrides_of_model_config`. Raises ModelError for an unknown one."""
    name = model.base_model_config or model.base_model
    key = "base_model_config" if model.base_model_config else "base_model"
    folder = local_folder(name)
    source = str(folder) if folder is not None else name
    options: dict[str, Any] = {}
    if model.trust_remote_code:
        options["trust_remote_code"] = True
    if folder is None and model.revision_of_model:
        options["revision"] = model.revision_of_model
    overrides = dict(model.overrides_of_model_config or {})
    reader = getattr(transformers, model.cls_model_config or "AutoConfig", None)
    if reader is None:
        raise ModelError(
            Problem(
                f"`cls_model_config: {model.cls_model_config}` is no class of transformers.",
                "Leave it out.",
                keys=("cls_model_config",),
            )
        )
    try:
        config = reader.from_pretrained(source, **options)
        if overrides:
            _warn_unknown_overrides(config, overrides)
            # Built anew, so that the class derives what depends on the overridden values.
            plain = config.to_dict() | overrides
            known = type(config).model_type in CONFIG_MAPPING and not getattr(config, "auto_map", None)
            config = (
                type(config).from_dict(plain)
                if known
                else AutoConfig.from_pretrained(source, **options, **overrides)
            )
            config._name_or_path = source
        return config
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        text = str(error)
        if "does not recognize this architecture" in text or (
            "model_type" in text and "CONFIG_MAPPING" not in text
        ):
            kind = text.split("`")[1] if text.count("`") > 1 else "?"
            near = difflib.get_close_matches(kind, list(CONFIG_MAPPING.keys()), n=1)
            hint = f" Did its `config.json` mean `{near[0]}`?" if near else ""
            raise ModelError(
                Problem(
                    f"`{key}: {name}` is of an architecture (`{kind}`) that transformers {transformers.__version__} "
                    "does not know.",
                    f"Install a newer transformers, or set `trust_remote_code: true` if it brings its own code.{hint}",
                    "model",
                    (key,),
                    (place,) if place else (),
                )
            ) from None
        raise ModelError(explain_load_failure(error, key, name, "configuration", place)) from error


def _warn_unknown_overrides(config: transformers.PretrainedConfig, overrides: dict[str, Any]) -> None:
    optional = {"rope_scaling", "rope_parameters", "rope_theta", "sliding_window", "quantization_config"}
    for key in overrides:
        if not hasattr(config, key) and key not in optional:
            near = difflib.get_close_matches(key, list(config.to_dict()), n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            warn(f"`overrides_of_model_config.{key}` is no known value of this architecture.{hint}")


def _no_class(name: str) -> Problem:
    near = difflib.get_close_matches(name, [n for n in dir(transformers) if "For" in n], n=1)
    return Problem(
        f"`model_type: {name}` is no model class of transformers.",
        f"{f'Did you mean `{near[0]}`? ' if near else ''}`AutoModelForCausalLM` fits nearly always.",
        "model",
        ("model_type",),
    )


def check(model: ModelSection) -> list[Problem]:
    """What is wrong with the model's class, as far as it can be seen without its files."""
    name, device = model.model_type, model.device
    wrong = name and name not in dir(transformers) and not model.trust_remote_code
    problems = [_no_class(name)] if name and wrong else []
    if device is not None and (why := _no_device(str(device))):
        problems.append(
            Problem(
                f"`device: {device}` {why}.",
                "Delete the line: the best device is found by itself.",
                keys=("device",),
            )
        )
    return problems


def _no_device(name: str) -> str:
    """Why weights cannot go to a device on this machine; empty where they can."""
    try:
        kind = torch.device(int(name) if name.isdigit() else name)
    except (RuntimeError, ValueError):
        return "is no device of PyTorch"
    if kind.type == "cuda":
        here = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not here:
            return "needs an NVIDIA GPU, and there is none here"
        return f"is not among the {here} GPUs here" if (kind.index or 0) >= here else ""
    if kind.type == "mps" and not torch.backends.mps.is_available():
        return "needs an Apple GPU, and there is none here"
    return ""


def model_class(model: ModelSection, config: transformers.PretrainedConfig) -> Any:
    """The class that loads the model: the one the user wrote where it fits the architecture."""
    name = model.model_type
    if not name or name == "AutoModelForCausalLM":
        return AutoModelForCausalLM
    cls = getattr(transformers, name, None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        if model.trust_remote_code:
            return AutoModelForCausalLM
        raise ModelError(_no_class(name))
    own = getattr(getattr(cls, "config_class", None), "model_type", None)
    if own and own not in (config.model_type, getattr(config.get_text_config(), "model_type", None)):
        warn(
            f"`model_type: {name}` is made for `{own}` models, but `{model.base_model}` is a `{config.model_type}` "
            "model: AutoModelForCausalLM is used."
        )
        return AutoModelForCausalLM
    return cls


def _from_nothing(
    cls: Any,
    config: transformers.PretrainedConfig,
    model: ModelSection,
    adapter: AdapterSection,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    attn_implementation: str | None,
    device: str,
) -> PreTrainedModel:
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if hasattr(cls, "from_config") and model.trust_remote_code:
        options["trust_remote_code"] = True
    build = getattr(cls, "from_config", None) or cls._from_config
    packing = quantization_config(model, adapter, dtype)
    try:
        # On the device itself, numbers are drawn in a moment and RAM stays empty.
        with torch.device(device):
            built = build(config, **options)
        count = sum(shape_of(each).numel() for each in built.parameters())
        note(f"The weights start at random (`reinit_weights`): {count:,} parameters.")
        if packing is not None:
            pack_in_place(built, packing)
    except torch.OutOfMemoryError as error:
        raise _too_large(model, device, error) from None
    # As loading leaves it.
    built.eval()
    return built.to(device) if packing is None and not divided() else built


def _too_large(model: ModelSection, device: str, error: Exception) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"`base_model: {model.base_model}` does not fit into the memory of {device}: {str(error).splitlines()[0]}",
        "Hold it in fewer bits (`load_in_4bit: true` with `adapter: qlora`), or use a larger GPU.",
        code="AX1402",
    )


def _from_files(
    cls: Any,
    config: transformers.PretrainedConfig,
    model: ModelSection,
    adapter: AdapterSection,
    dtype: torch.dtype,
    attn_implementation: str | None,
    device: str,
    place: Place | None,
) -> PreTrainedModel:
    folder = local_folder(model.base_model)
    source = str(folder) if folder is not None else model.base_model
    options: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    if folder is None and model.revision_of_model:
        options["revision"] = model.revision_of_model
    if model.trust_remote_code:
        options["trust_remote_code"] = True
    elif folder is None:
        options["use_safetensors"] = True
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    quantization = quantization_config(model, adapter, dtype) or unpacking(config, model)
    if quantization is not None:
        options["quantization_config"] = quantization
    if model.device_map is not None:
        options["device_map"] = model.device_map
        limits = _memory_limits(model)
        if limits:
            options["max_memory"] = limits
    elif device != "cpu" and not divided():
        options["device_map"] = {"": device}
    options |= model.overrides_of_model_kwargs or {}
    try:
        loaded, info = cls.from_pretrained(source, **options)
    except torch.OutOfMemoryError as error:
        raise _too_large(model, device, error) from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:
        raise ModelError(
            explain_load_failure(error, "base_model", model.base_model, "weights", place)
        ) from error
    _check_complete(loaded, info, model, place)
    keep_layout(loaded)
    return loaded


def _memory_limits(model: ModelSection) -> dict[Any, Any] | None:
    if model.max_memory:
        return dict(model.max_memory)
    if model.gpu_memory_limit is None:
        return None
    limit = model.gpu_memory_limit
    text = f"{limit}GiB" if isinstance(limit, int) or str(limit).isdigit() else str(limit)
    return dict.fromkeys(range(torch.cuda.device_count()), text) | {"cpu": "256GiB"}


def _check_complete(
    loaded: PreTrainedModel, info: dict[str, Any], model: ModelSection, place: Place | None
) -> None:
    """Refuses a language model of which some weights were not in the files and would start at random."""
    missing = sorted(info.get("missing_keys") or ())
    wrong = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info.get("mismatched_keys") or ())
    if not (missing or wrong) or not type(loaded).__name__.endswith(
        ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    ):
        return
    names = ", ".join(f"`{k}`" for k in (missing + wrong)[:4])
    more = len(missing) + len(wrong) - 4
    raise ModelError(
        Problem(
            f"`base_model: {model.base_model}` lacks {len(missing) + len(wrong)} of the weights that its `config.json` "
            f"promises, such as {names}{f' and {more} more' if more > 0 else ''}.",
            "The files do not belong together, or `config.json` was changed. Copy or download the model again.",
            "model",
            ("base_model",),
            (place,) if place else (),
        )
    )


def _fit_vocabulary(
    loaded: PreTrainedModel,
    model: ModelSection,
    adapter: AdapterSection,
    tokenizer: PreTrainedTokenizerBase,
    training: bool,
    adapter_dir: Path | None,
) -> None:
    wanted = wanted_rows(model, len(tokenizer), embedding_rows(loaded), adapter_dir)
    # Weights that are trained and saved as a whole may start as the key says; rows under an adapter have to come out
    # the same wherever it is loaded.
    whole = training and adapter.adapter is None
    resize_embeddings(loaded, wanted, random=whole and not model.mean_resizing_embeddings)


def align_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[str] = ()
) -> None:
    """Makes BOS, EOS and pad of model and generation config those of the tokenizer.

    `generation_config` stops at every end that the base model knew, at the tokenizer's EOS and at `stop_tokens`.
    """
    stops = stop_ids(model, tokenizer, stop_tokens)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.bos_token_id = (
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
        )
        config.pad_token_id = tokenizer.pad_token_id
        present = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in present:
            config.eos_token_id = tokenizer.eos_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.bos_token_id = model.config.bos_token_id
        generation.pad_token_id = tokenizer.pad_token_id
        if stops:
            generation.eos_token_id = stops[0] if len(stops) == 1 else stops


def stop_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[str] = ()
) -> list[int]:
    """Ids at which generation ends: the tokenizer's EOS first, `stop_tokens` that are one token, the model's own ends."""
    generation = getattr(model, "generation_config", None)
    own = getattr(generation, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    named: list[int] = []
    for text in stop_tokens:
        ids = tokenizer.encode(text, add_special_tokens=False)
        named += ids if len(ids) == 1 else []
    rows = embedding_rows(model)
    found = [i for i in (tokenizer.eos_token_id, *named, *own) if i is not None and 0 <= i < rows]
    return list(dict.fromkeys(found))


def ready_to_serve(model: PreTrainedModel | PeftModel) -> None:
    """Undoes what only training needs, before the weights are saved: the cache is on again for generation."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base.config.use_cache = True
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.use_cache = True
