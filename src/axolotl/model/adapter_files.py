"""What an adapter folder holds, and whether it fits a model: read from the file's header, before anything is loaded."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from axolotl.console import note, warn
from axolotl.errors import ModelError, Problem
from axolotl.model.base_identity import identify, recorded_identity
from axolotl.model.embeddings import embedding_rows
from axolotl.model.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TensorEntry,
    could_be_hub_id,
    local_folder,
    missing_folder,
    read_header,
    read_json,
)
from axolotl.model.tokenizer import explain_load_failure

PREFIX = "base_model.model."
_LORA = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight|\.bias)?$"
)


def adapter_folder(name: str) -> Path:
    """The folder of an adapter; one of the Hub is fetched into the cache. Raises ModelError where it cannot be had."""
    folder = local_folder(name)
    if folder is not None:
        return folder
    if not could_be_hub_id(name):
        raise ModelError(missing_folder("lora_model_dir", name))
    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pt", "optimizer*", "checkpoint-*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(explain_load_failure(error, "lora_model_dir", name, "adapter")) from error


def adapter_config(folder: Path) -> PeftConfig:
    """The adapter's PEFT configuration. Keys of a newer PEFT are left out, which is told.

    Raises ModelError for a folder without a readable one, and for a kind of adapter that this PEFT does not have.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        what = "a whole model" if (folder / "config.json").is_file() else "no adapter"
        remedy = (
            "Give it as `base_model`, without an adapter."
            if what == "a whole model"
            else "Name the folder that training wrote, or train first."
        )
        raise ModelError(f"`{folder}` holds {what}: there is no `{ADAPTER_CONFIG}`.", remedy)
    plain = read_json(file)
    kind: Any = plain.get("peft_type")
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if cls is None:
        raise ModelError(
            f"`{file}` is of the kind `{kind}`, which this PEFT does not have.", "Install a newer peft."
        )
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = {k: v for k, v in plain.items() if k not in known and k != "peft_version"}
    if any(v not in (None, False, {}, []) for v in unknown.values()):
        note(f"`{file}` comes from a newer PEFT; left out: {', '.join(f'`{k}`' for k in sorted(unknown))}.")
    try:
        return cls(**{k: v for k, v in plain.items() if k in known})
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"`{file}` cannot be used: {error}", "Copy it again from where the adapter was saved."
        ) from None


def adapter_tensors(folder: Path, *, allow_pickle: bool = False) -> dict[str, TensorEntry] | None:
    """Names and shapes of the adapter's tensors; None where they are in an (allowed) pickle file.

    Raises ModelError for missing or damaged weights and for pickle files that are not allowed.
    """
    if (folder / ADAPTER_WEIGHTS).is_file():
        return read_header(folder / ADAPTER_WEIGHTS)[0]
    if (folder / "adapter_model.bin").is_file():
        if allow_pickle:
            return None
        raise ModelError(
            f"`{folder}` has its weights only as a pickle file (`adapter_model.bin`), which can run any code.",
            "Convert it to safetensors, or set `trust_remote_code: true` if you trust where it comes from.",
        )
    raise ModelError(
        f"`{folder}` has no `{ADAPTER_WEIGHTS}`.",
        "The adapter was not saved to its end: use an earlier checkpoint.",
    )


def unreadable_pickle(folder: Path, error: Exception) -> Problem:
    """What is wrong with an `adapter_model.bin` that is allowed, but holds other things than weights, or is damaged."""
    return Problem(
        f"`{folder / 'adapter_model.bin'}` cannot be read as weights and nothing else: "
        f"{str(error).strip().splitlines()[0]}",
        "Have it saved as safetensors by whom it comes from. What it would run was not run.",
        "model",
        ("lora_model_dir",),
    )


def check_adapter_fits(
    model: PreTrainedModel, folder: Path, config: PeftConfig, *, allow_pickle: bool = False
) -> None:
    """Raises ModelError where the adapter was trained on another model: layers, shapes and vocabulary are named."""
    tensors = adapter_tensors(folder, allow_pickle=allow_pickle)
    if tensors is None:
        return
    if not tensors:
        raise ModelError(
            f"`{folder / ADAPTER_WEIGHTS}` holds no tensors.", "Train again, or use an earlier checkpoint."
        )
    modules = dict(model.named_modules())
    absent, wrong = [], []
    for name, entry in tensors.items():
        match = _LORA.match(name.removeprefix(PREFIX))
        if not match:
            wrong += _embedding_mismatch(name.removeprefix(PREFIX), entry, modules, model)
            continue
        module = modules.get(match.group(1))
        if module is None:
            absent.append(match.group(1))
            continue
        wrong += _lora_mismatch(match.group(1), match.group(2), entry, module)
    if not absent and not wrong:
        return
    base = config.base_model_name_or_path
    remedy = f"Set `base_model` to the model it was trained on{f', `{base}`' if base else ''}."
    if wrong:
        raise ModelError(
            f"The adapter `{folder}` was trained on another base model: {'; '.join(wrong[:3])}.",
            remedy,
            code="AX1202",
        )
    parts = sorted(set(absent))
    convertible = getattr(config, "target_parameters", None) or _is_fused(modules, parts)
    if not convertible:
        raise ModelError(
            f"The adapter `{folder}` was trained on another base model: it has weights for {len(parts)} layers that "
            f"this one lacks, such as `{parts[0]}`.",
            remedy,
            code="AX1202",
        )


def _is_fused(modules: dict[str, nn.Module], absent: list[str]) -> bool:
    """Whether the absent layers are experts, which this transformers may hold as one stacked parameter."""
    return all(".experts." in name and name.split(".experts.")[0] + ".experts" in modules for name in absent)


def _lora_mismatch(path: str, part: str, entry: TensorEntry, module: nn.Module) -> list[str]:
    inner, outer = _sizes(module)
    if inner is None or not entry.shape:
        return []
    if part == "lora_A" and len(entry.shape) == 2 and entry.shape[1] != inner:
        return [f"`{path}` has {inner} inputs here, {entry.shape[1]} in the adapter"]
    if part == "lora_B" and len(entry.shape) == 2 and entry.shape[0] != outer:
        return [f"`{path}` has {outer} outputs here, {entry.shape[0]} in the adapter"]
    return []


def _sizes(module: Any) -> tuple[int | None, int | None]:
    """Inputs and outputs of a linear layer; None for any other."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    if type(module).__name__ == "Conv1D":
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None, None


def _embedding_mismatch(
    name: str, entry: TensorEntry, modules: dict[str, nn.Module], model: PreTrainedModel
) -> list[str]:
    """For modules that the adapter saved whole: their shape against the model's."""
    path = name.removesuffix(".weight").removesuffix(".base_layer")
    weight: Any = getattr(modules.get(path), "weight", None)
    if weight is None or not name.endswith(".weight") or len(entry.shape) != weight.dim():
        return []
    if weight.dtype.is_floating_point and tuple(weight.shape) != entry.shape:
        rows = embedding_rows(model)
        if weight.shape[0] == rows and entry.shape[1:] == tuple(weight.shape[1:]):
            return [f"its vocabulary has {entry.shape[0]:,} rows, this model's {rows:,}"]
        return [f"`{path}` is {tuple(weight.shape)} here, {entry.shape} in the adapter"]
    return []


def is_untrained(folder: Path) -> bool:
    """Whether every LoRA matrix that starts at zero is still zero, so that the adapter changes nothing."""
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        return False
    names = list(read_header(file)[0])
    trained = [n for n in names if not re.search(r"\.(lora_A|lora_embedding_A|lora_magnitude_vector)\b", n)]
    if not trained or not any(".lora_" in n for n in names):
        return False
    with safe_open(str(file), framework="pt") as tensors:
        return not any(bool(tensors.get_tensor(n).any()) for n in trained)


def tell_other_base(folder: Path, base_model: str) -> None:
    """Warns where an adapter was trained on another base than the one it shall work on; raises ModelError where the
    two are of different architectures, though all shapes may fit."""
    recorded = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not recorded:
        return
    known, here = recorded_identity(folder, recorded), identify(base_model)
    if same_base(recorded, base_model, folder):
        if known and here and known.architecture != here.architecture:
            warn(f"`{base_model}/config.json` has changed since the adapter in `{folder}` was trained.")
        return
    message = f"The adapter in `{folder}` was trained on `{recorded}`, not on `{base_model}`"
    kinds = [known.model_type if known else _architecture(recorded), here.model_type if here else None]
    if None not in kinds and kinds[0] != kinds[1]:
        raise ModelError(
            Problem(
                f"{message}: one is a `{kinds[0]}` model, the other a `{kinds[1]}` model.",
                "Name the base model that it was trained on, or another adapter.",
                "model",
                ("lora_model_dir", "base_model"),
                code="AX1202",
            )
        )
    if known and here and known.architecture != here.architecture:
        warn(
            f"{message}: the two differ in their `config.json`. Its answers will not be those of the training."
        )
    elif known and here and None not in (known.weights, here.weights):
        warn(f"{message}: the two have different weights. Its answers will not be those of the training.")
    else:
        warn(f"{message}. That is right only where both are the same model under two names.")


def _architecture(name: str) -> str | None:
    found = identify(name)
    return None if found is None else found.model_type


def same_base(recorded: str, wanted: str, adapter_dir: Path | None = None) -> bool:
    """Whether two names mean the same base model: by its contents, where the run of the adapter wrote them down, else
    as far as names and folders tell."""
    known = recorded_identity(adapter_dir, recorded) if adapter_dir is not None else None
    if known is not None and known.weights is not None:
        here = identify(wanted)
        if here is not None and here.weights is not None:
            return (known.model_type, known.weights) == (here.model_type, here.weights)
    a, b = local_folder(recorded), local_folder(wanted)
    if a is not None and b is not None:
        return a.resolve() == b.resolve()
    return recorded == wanted or (a is None and b is not None and Path(recorded).name == b.name)
