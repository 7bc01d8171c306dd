"""Finds and loads what was trained: base and adapter, a merged or fully trained model, or a checkpoint of a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from axolotl.console import note, warn
from axolotl.errors import ModelError, Problem
from axolotl.inference.generate import Stops, find_stops
from axolotl.inference.prompting import Prompter
from axolotl.model.adapter import load_adapter
from axolotl.model.adapter_files import adapter_folder, is_untrained, same_base, tell_other_base
from axolotl.model.files import (
    ADAPTER_CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
    check_adapter_dir,
    local_folder,
    read_json,
)
from axolotl.model.hub import check_hub
from axolotl.model.load import check, load_model, stop_ids
from axolotl.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from axolotl.config.adapter import AdapterSection
    from axolotl.config.data import DataSection
    from axolotl.config.model import ModelSection
    from axolotl.config.resolve import Hardware

_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


@dataclass(frozen=True)
class Trained:
    """Where trained weights are: an adapter for the base model, or a whole model; neither means the bare base."""

    adapter: Path | None = None
    model: Path | None = None
    alone: bool = False
    """The base model is meant as it is: it is another than the adapter's, such as a merged one."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer: with its tokenizer, the maker of its prompts, and what ends an answer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    prompter: Prompter
    stops: Stops
    source: str
    trained: Trained = Trained()
    """Which weights were put on the base model, or in its place."""


def find_trained(model: ModelSection, adapter: AdapterSection, output_dir: str | Path) -> Trained:
    """What a run left: `lora_model_dir` where it is set, else the finished result in `output_dir`, else its newest
    checkpoint. A base model that is not the one of the adapter found there (a merged one, say) is taken alone.

    Raises ModelError for a `lora_model_dir` without an adapter.
    """
    problems = check_adapter_dir(adapter)
    if problems:
        raise ModelError(problems)
    if adapter.lora_model_dir:
        named = adapter_folder(adapter.lora_model_dir)
        tell_other_base(named, model.base_model)
        return Trained(adapter=named)
    output = Path(output_dir).expanduser()
    checkpoints = sorted(
        (p for p in output.glob("checkpoint-*") if _CHECKPOINT.search(p.name)),
        key=lambda p: int(_CHECKPOINT.search(p.name).group(1)),  # type: ignore[union-attr]
        reverse=True,
    )
    for folder in (output, *checkpoints):
        if (folder / ADAPTER_CONFIG).is_file():
            recorded = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
            if recorded and not same_base(recorded, model.base_model, folder):
                note(
                    f"`{model.base_model}` is used alone: the adapter in `{folder}` belongs to `{recorded}`."
                )
                return Trained(alone=True)
            return Trained(adapter=folder)
        whole = any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))
        if adapter.adapter is None and whole and (folder / "config.json").is_file():
            return Trained(model=folder)
    return Trained()


def load_trained(
    model: ModelSection,
    adapter: AdapterSection,
    data: DataSection,
    hardware: Hardware,
    output_dir: str | Path,
    *,
    attn_implementation: str | None = None,
    require_training: bool = False,
    untrained: bool = False,
    before_weights: Callable[[Prompter], None] | None = None,
) -> Loaded:
    """The trained model of a config, ready to answer.

    `require_training`: without trained weights this is an error, and so is an adapter that was never trained.
    `untrained`: the base model is meant, whatever was trained. `before_weights` is called once prompts can be laid out,
    before any weights are loaded. Raises ModelError for whatever cannot be found or does
    not fit together.
    """
    if problems := check(model):
        raise ModelError(problems)
    trained = Trained(alone=True) if untrained else find_trained(model, adapter, output_dir)
    if trained == Trained():
        nothing = nothing_trained(model, adapter, output_dir)
        if nothing and require_training:
            raise ModelError(nothing)
        if nothing and adapter.adapter is not None:
            warn(f"{nothing.message} The base model answers alone.")
    if trained.model is None and (problems := check_hub(model.base_model)):
        raise ModelError(problems)
    if trained.model is not None:
        model = model.model_copy(
            update={
                "base_model": str(trained.model),
                "reinit_weights": False,
                "base_model_config": None,
                "tokenizer_config": None,
                "revision_of_model": None,
            }
        )
    if trained.adapter is not None and is_untrained(trained.adapter):
        text = f"The adapter `{trained.adapter}` was never trained: it changes nothing."
        if require_training:
            raise ModelError(text, "Train first; `--untrained` takes the base model alone.")
        warn(text)
    tokenizer = load_tokenizer(model, trained.adapter or trained.model)
    prompter = Prompter(tokenizer, data)
    if before_weights is not None:
        before_weights(prompter)
    base = load_model(
        model,
        adapter,
        tokenizer,
        hardware,
        training=False,
        attn_implementation=attn_implementation,
        stop_tokens=prompter.stop_tokens(),
        adapter_dir=trained.adapter,
    )
    loaded: Any = base
    if trained.adapter is not None:
        loaded = load_adapter(base, trained.adapter, allow_pickle=bool(model.trust_remote_code))
    stops = find_stops(tokenizer, stop_ids(base, tokenizer), prompter.stop_tokens())
    source = f"{model.base_model} + {trained.adapter}" if trained.adapter is not None else model.base_model
    return Loaded(loaded.eval(), tokenizer, prompter, stops, source, trained)


def nothing_trained(model: ModelSection, adapter: AdapterSection, output_dir: str | Path) -> Problem | None:
    """The problem of a config without trained weights; None where the base model is itself a result of the run."""
    if _is_other_model(model, output_dir):
        return None
    if adapter.adapter is None:
        return Problem(
            f"`output_dir: {output_dir}` holds no trained weights.",
            "Train first, or name the model that is meant: --base-model MODEL.",
            "model",
            ("output_dir",),
        )
    return Problem(
        f"`adapter: {adapter.adapter}`, but there is no trained adapter in `{output_dir}`.",
        "Train first, or name the adapter: --lora-model-dir DIR. The base model alone, on purpose: "
        f"--base-model {model.base_model}",
        "model",
        ("adapter",),
    )


def _is_other_model(model: ModelSection, output_dir: str | Path) -> bool:
    """Whether the base model is itself a result, such as `output_dir/merged`."""
    folder = local_folder(model.base_model)
    return folder is not None and Path(output_dir).expanduser().resolve() in folder.resolve().parents
