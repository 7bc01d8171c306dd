"""Puts an adapter on a model through PEFT: a new one from the config's keys, or a trained one from a folder."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel, set_seed

from axolotl.console import note
from axolotl.errors import EnvironmentProblem, ModelError, Problem
from axolotl.model.adapter_files import adapter_config, check_adapter_fits, unreadable_pickle
from axolotl.model.embeddings import embedding_rows, resize_embeddings, rows_in_adapter
from axolotl.model.files import ADAPTER_WEIGHTS
from axolotl.model.targets import check_names, target_modules

if TYPE_CHECKING:
    from axolotl.config.adapter import AdapterSection

_EMBEDDING_NAMES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
# Key of the config -> names that PEFT's config classes have for it.
_FIELDS: dict[str, tuple[str, ...]] = {
    "lora_r": ("r", "rank"),
    "lora_alpha": ("lora_alpha", "alpha"),
    "lora_dropout": (
        "lora_dropout",
        "vera_dropout",
        "module_dropout",
        "hada_dropout",
        "dropout",
        "fourier_dropout",
    ),
    "lora_fan_in_fan_out": ("fan_in_fan_out",),
    "lora_rank_pattern": ("rank_pattern",),
    "lora_alpha_pattern": ("alpha_pattern",),
    "lora_modules_to_save": ("modules_to_save",),
    "lora_exclude_modules": ("exclude_modules",),
    "lora_target_parameters": ("target_parameters",),
    "peft_layers_to_transform": ("layers_to_transform",),
    "peft_layers_pattern": ("layers_pattern",),
    "peft_use_dora": ("use_dora",),
    "peft_use_rslora": ("use_rslora",),
    "peft_layer_replication": ("layer_replication",),
    "peft_init_lora_weights": ("init_lora_weights", "init_weights"),
    "peft_trainable_token_indices": ("trainable_token_indices",),
    "peft_ensure_weight_tying": ("ensure_weight_tying",),
}


def add_adapter(
    model: PreTrainedModel,
    adapter: AdapterSection,
    *,
    new_tokens: Sequence[int] = (),
    resume_from: Path | None = None,
    seed: int | None = None,
    upcast_embeddings: bool = True,
) -> PeftModel:
    """The model with the adapter that the config describes, everything else frozen.

    `new_tokens`: ids that the base model was never trained on; under LoRA their embedding rows are trained and saved
    as well, unless the config trains embeddings in another way. `resume_from`: a folder whose adapter is continued
    instead. `upcast_embeddings`: embeddings that are trained whole are held in float32. Raises ModelError for targets
    that the model does not have and for keys that this kind of adapter does not know.
    """
    if resume_from is not None:
        peft_model = load_adapter(model, resume_from, trainable=True)
        _say_trainable(peft_model, f"The adapter of `{resume_from}` is continued")
        return peft_model
    _check_trained_tokens(model, adapter)
    config = build_config(model, adapter, new_tokens)
    if seed is not None:
        set_seed(seed)
    _freeze(model)
    autocast = adapter.peft_autocast_adapter_dtype is not False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            peft_model = get_peft_model(model, config, autocast_adapter_dtype=autocast)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ModelError(
            f"The adapter cannot be put on this model: {str(error).splitlines()[0]}",
            "Correct the lora_* or peft_* key that it speaks of.",
        ) from error
    if upcast_embeddings and autocast:
        _upcast_trained_embeddings(peft_model)
    _save_small(peft_model, config)
    _say_trainable(peft_model, f"{_kind(adapter).upper()} adapter")
    return peft_model


def _check_trained_tokens(model: PreTrainedModel, adapter: AdapterSection) -> None:
    """Raises ModelError where `peft_trainable_token_indices` names tokens that the embedding has no row for."""
    given, rows = adapter.peft_trainable_token_indices or [], embedding_rows(model)
    named = given if isinstance(given, list) else [each for some in given.values() for each in some]
    beyond = [each for each in named if each >= rows]
    if beyond:
        raise ModelError(
            Problem(
                f"`peft_trainable_token_indices` names token {beyond[0]}, and the embedding has {rows:,} rows.",
                f"Write ids from 0 to {rows - 1}.",
                keys=("peft_trainable_token_indices",),
            )
        )


def _kind(adapter: AdapterSection) -> str:
    return "lora" if adapter.adapter in ("lora", "qlora", None) else str(adapter.adapter).lower()


def build_config(
    model: PreTrainedModel, adapter: AdapterSection, new_tokens: Sequence[int] = ()
) -> PeftConfig:
    """PEFT's configuration from the config's keys, for LoRA and for any other kind that PEFT knows by name."""
    kind: Any = _kind(adapter).upper()
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if cls is None:
        known = ", ".join(sorted(str(getattr(k, "value", k)).lower() for k in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ModelError(
            Problem(
                f"`adapter: {adapter.adapter}` is no adapter of PEFT.",
                f"Known: qlora, {known}.",
                keys=("adapter",),
            )
        )
    fields = {f.name for f in dataclasses.fields(cls)}
    missing = [k for k in ("lora_r", "lora_alpha") if "lora_alpha" in fields and getattr(adapter, k) is None]
    if missing:
        raise ModelError(
            Problem(
                f"`adapter: {adapter.adapter}` needs `{k}`.",
                "16 is a usual rank, 32 a usual alpha.",
                keys=(k,),
            )
            for k in missing
        )
    options: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM}
    refused = []
    for key, names in _FIELDS.items():
        value = getattr(adapter, key)
        name = next((n for n in names if n in fields), None)
        if value is None or (value is False and key != "peft_init_lora_weights"):
            continue
        if name is not None:
            options[name] = value
        elif key in ("lora_r", "lora_alpha"):
            note(f"`{key}` means nothing to `adapter: {adapter.adapter}`; it is left out.")
        elif key in adapter.model_fields_set and value:
            refused.append(key)
    if refused:
        raise ModelError(
            Problem(
                f"`{key}` means nothing to `adapter: {adapter.adapter}`.", "Remove it.", keys=(key, "adapter")
            )
            for key in refused
        )
    if "r" in options and "oft_block_size" in fields:
        options["oft_block_size"] = 0  # a block size and a rank say the same thing
    if isinstance(options.get("target_parameters"), str):
        options["target_parameters"] = [options["target_parameters"]]
    if adapter.peft is not None and adapter.peft.loftq_config is not None:
        options["loftq_config"] = adapter.peft.loftq_config.model_dump()
        options.setdefault("init_lora_weights", "loftq")
    if "target_modules" in fields:
        targets = target_modules(model, adapter)
        if targets or not options.get("target_parameters"):
            options["target_modules"] = targets
            if "feedforward_modules" in fields and isinstance(targets, list):
                inner = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(
                    model.config.model_type, []
                )
                options["feedforward_modules"] = [t for t in targets if t in inner]
    check_names(model, adapter)
    if new_tokens and "trainable_token_indices" in fields and "trainable_token_indices" not in options:
        rows = _rows_to_train(model, adapter, new_tokens)
        if rows:
            options["trainable_token_indices"] = rows
            count = len(next(iter(rows.values())))
            note(
                f"{count} new tokens: their rows of {' and '.join(f'`{n}`' for n in rows)} are trained and saved."
            )
    try:
        return cls(**options)
    except ImportError as error:
        raise EnvironmentProblem(
            f"PEFT needs a package for the adapter's options: {error}", "Install it, or remove the option."
        ) from error
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"PEFT refuses the adapter's options: {error}", "Correct the key that it names."
        ) from error


def _rows_to_train(
    model: PreTrainedModel, adapter: AdapterSection, new_tokens: Sequence[int]
) -> dict[str, list[int]] | None:
    """Rows of the embeddings that have to be trained for new tokens, by module; None where the config does it itself."""
    written = {*(adapter.lora_modules_to_save or ())}
    targets = adapter.lora_target_modules
    written |= {targets} if isinstance(targets, str) else {*(targets or ())}
    if any(w.endswith(_EMBEDDING_NAMES) for w in written):
        return None
    modules = {id(m): n for n, m in model.named_modules()}
    first, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = sorted({*new_tokens})
    chosen = {modules[id(first)].rsplit(".", 1)[-1]: rows}
    if head is not None and head.weight is not first.weight:
        chosen[modules[id(head)].rsplit(".", 1)[-1]] = rows
    return chosen


def _freeze(model: nn.Module) -> None:
    """Freezes the base as it is. Norms and embeddings keep their number type: what is trained is what will be served."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _upcast_trained_embeddings(model: PeftModel) -> None:
    """Holds modules that are trained whole in float32; what they pass on keeps the model's number type."""
    for module in model.modules():
        if not isinstance(module, peft.utils.ModulesToSaveWrapper):
            continue
        for copy in module.modules_to_save.values():
            dtype = next((p.dtype for p in copy.parameters() if p.is_floating_point()), torch.float32)
            if dtype in (torch.bfloat16, torch.float16):
                copy.float()
                copy.register_forward_pre_hook(_cast_inputs(torch.float32))
                copy.register_forward_hook(_cast_output(dtype))


def _cast_inputs(dtype: torch.dtype) -> Any:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(i.to(dtype) if torch.is_tensor(i) and i.is_floating_point() else i for i in inputs)

    return hook


def _cast_output(dtype: torch.dtype) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return output.to(dtype) if torch.is_tensor(output) else output

    return hook


def _save_small(model: PeftModel, config: PeftConfig) -> None:
    """Keeps PEFT from saving whole embeddings only because the vocabulary grew.

    Rows that are trained are saved by themselves; the other new ones come out the same wherever the base is resized.
    """
    targets = getattr(config, "target_modules", None) or ()
    whole = {
        *(getattr(config, "modules_to_save", None) or ()),
        *([targets] if isinstance(targets, str) else targets),
    }
    if any(name.endswith(_EMBEDDING_NAMES) for name in whole):
        return
    save = model.save_pretrained

    def save_pretrained(directory: str, **options: Any) -> Any:
        options.setdefault("save_embedding_layers", False)
        return save(directory, **options)

    model.save_pretrained = save_pretrained  # type: ignore[method-assign,assignment]


def _say_trainable(model: PeftModel, what: str) -> None:
    trainable, total = model.get_nb_trainable_parameters()
    share = 100 * trainable / total if total else 0.0
    note(f"{what}: {trainable:,} of {total:,} parameters are trained ({share:.2f} %).")


def load_adapter(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    trainable: bool = False,
    allow_pickle: bool = False,
    autocast_adapter_dtype: bool = True,
) -> PeftModel:
    """The model with the trained adapter of a folder.

    The vocabulary is grown to the adapter's where that is larger. Raises ModelError, before PEFT is asked, for an
    adapter of another base (shapes, layers and vocabulary are named), for missing weights, for an unknown kind and
    for pickle files unless they are allowed.
    """
    folder = Path(directory)
    config = adapter_config(folder)
    rows, _ = rows_in_adapter(folder)
    if rows > embedding_rows(model):
        resize_embeddings(model, rows)
    check_adapter_fits(model, folder, config, allow_pickle=allow_pickle)
    config.inference_mode = not trainable
    if trainable:
        _freeze(model)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            peft_model = PeftModel.from_pretrained(
                model,
                str(folder),
                config=config,
                is_trainable=trainable,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )
    except UnpicklingError as error:
        raise ModelError(unreadable_pickle(folder, error)) from None
    except (ValueError, KeyError, RuntimeError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"The adapter `{folder}` cannot be put on this base model: {str(error).strip().splitlines()[0]}",
            "Check that `base_model` is the one that the adapter was trained on.",
        ) from error
    missing = next((str(w.message) for w in said if "missing adapter keys" in str(w.message)), None)
    if missing:
        keys = re.findall(r"'([^']+)'", missing)
        raise ModelError(
            f"The adapter `{folder}` lacks {len(keys)} of its weights, such as `{keys[0] if keys else '?'}`.",
            f"`{ADAPTER_WEIGHTS}` and `adapter_config.json` do not belong together, or the file was not saved to its end.",
        )
    if trainable:
        _upcast_trained_embeddings(peft_model)
        _save_small(peft_model, config)
    else:
        peft_model.eval()
    return peft_model
