"""From the config to transformers' TrainingArguments: one table, a line for each key."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.utils.checkpoint
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from axolotl.config import Config
from axolotl.config.keys import did_you_mean, nearest
from axolotl.config.resolve import Hardware
from axolotl.config.train import TrainSection
from axolotl.console import warn_once
from axolotl.data.packing import Volume
from axolotl.distributed.world import world
from axolotl.distributed.zero import completed, read_zero
from axolotl.errors import Problem
from axolotl.train.cadence import Cadence, cadence
from axolotl.train.tracking import trackers


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Row:
    """A config key and the argument it becomes. A key that is None leaves the argument at transformers' default."""

    key: str
    arguments: tuple[str, ...]
    """Names that versions of transformers give it; the first that exists is taken."""
    turn: Callable[[Any], Any] = _same


TABLE: tuple[Row, ...] = (
    Row("output_dir", ("output_dir",)),
    Row("micro_batch_size", ("per_device_train_batch_size",)),
    Row("eval_batch_size", ("per_device_eval_batch_size",)),
    Row("gradient_accumulation_steps", ("gradient_accumulation_steps",)),
    Row("num_epochs", ("num_train_epochs",)),
    Row("seed", ("seed",)),
    Row("seed", ("data_seed",)),
    Row("learning_rate", ("learning_rate",)),
    Row("weight_decay", ("weight_decay",)),
    Row("max_grad_norm", ("max_grad_norm",)),
    Row("neftune_noise_alpha", ("neftune_noise_alpha",)),
    Row("fp16", ("fp16",)),
    Row("torch_empty_cache_steps", ("torch_empty_cache_steps",)),
    Row("logging_steps", ("logging_steps",)),
    Row("save_only_model", ("save_only_model",)),
    Row("load_best_model_at_end", ("load_best_model_at_end",)),
    Row("metric_for_best_model", ("metric_for_best_model",)),
    Row("greater_is_better", ("greater_is_better",)),
    Row("dataloader_num_workers", ("dataloader_num_workers",)),
    Row("dataloader_prefetch_factor", ("dataloader_prefetch_factor",)),
    Row("dataloader_drop_last", ("dataloader_drop_last",)),
    Row("accelerator_config", ("accelerator_config",)),
    Row("ddp_timeout", ("ddp_timeout",)),
    Row("ddp_bucket_cap_mb", ("ddp_bucket_cap_mb",)),
    Row("ddp_broadcast_buffers", ("ddp_broadcast_buffers",)),
    Row("ddp_find_unused_parameters", ("ddp_find_unused_parameters",)),
)

FIXED: dict[str, Any] = {
    "logging_steps": 1,
    "logging_strategy": "steps",
    # The check would wait for the device at every step; the trainer watches the loss where it is logged anyway.
    "logging_nan_inf_filter": False,
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "average_tokens_across_devices": True,
    "ddp_find_unused_parameters": False,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "use_cache": False,
    "save_safetensors": True,
    "save_strategy": "no",
    "eval_strategy": "no",
    "label_names": ["labels"],
}
"""What does not depend on a key, or stands until a key says otherwise."""


def argument_names(arguments_class: type[TrainingArguments] = TrainingArguments) -> frozenset[str]:
    """The arguments that this version of transformers knows."""
    return frozenset(f.name for f in dataclasses.fields(arguments_class) if f.init)


METRICS = ("loss", "ppl")
"""The figures of an evaluation, which `metric_for_best_model` chooses from."""


def check(train: TrainSection) -> Iterator[Problem]:
    """Names inside options that the libraries behind them do not know."""
    for key, known in (
        ("accelerator_config", [f.name for f in dataclasses.fields(AcceleratorConfig)]),
        ("gradient_checkpointing_kwargs", _checkpoint_options()),
    ):
        for name in getattr(train, key) or {}:
            if name not in known:
                yield Problem(
                    f"`{key}` has no option `{name}`.",
                    did_you_mean(nearest(str(name), known))
                    or f"It takes {', '.join(f'`{k}`' for k in known)}.",
                    "invalid_value",
                    (f"{key}.{name}",),
                )
    choices = (
        ("torch_compile_backend", [each.value.lower() for each in DynamoBackend if each.value != "NO"]),
        ("metric_for_best_model", [*METRICS, *(f"eval_{name}" for name in METRICS)]),
    )
    for key, known in choices:
        value = getattr(train, key)
        if value is not None and value.lower() not in known:
            yield Problem(
                f"`{key}` is `{value}`; it takes {', '.join(f'`{k}`' for k in known)}.",
                did_you_mean(nearest(value, known)) or "Delete the line to have the usual one.",
                "invalid_value",
                (key,),
            )


def _checkpoint_options() -> list[str]:
    taken = inspect.signature(torch.utils.checkpoint.checkpoint).parameters.values()
    named = [each.name for each in taken if each.kind is each.KEYWORD_ONLY or each.name == "use_reentrant"]
    return [*named, "preserve_rng_state"]


def build_arguments(
    cfg: Config,
    volume: Volume,
    hardware: Hardware,
    *,
    has_eval_data: bool,
    resuming: bool = False,
    arguments_class: type[TrainingArguments] = TrainingArguments,
    more: Mapping[str, Any] | None = None,
) -> tuple[TrainingArguments, Cadence]:
    """TrainingArguments for a run of exactly `volume.total_steps`, and the steps at which it evaluates and saves.

    `arguments_class` and `more` come from the training method.

    bfloat16 is not among the arguments: the trainer runs the model under autocast itself, since accelerate would
    also turn all logits into float32.
    """
    known = argument_names(arguments_class)
    values: dict[str, Any] = dict(FIXED)
    for row in TABLE:
        value = cfg.get(row.key)
        if value is None:
            continue
        name = next((n for n in row.arguments if n in known), None)
        if name is None:
            if cfg.is_set(row.key):
                warn_once(
                    f"This version of transformers has no `{row.arguments[0]}`; `{row.key}` does nothing."
                )
            continue
        values[name] = row.turn(value)
    when = cadence(cfg.train, volume.steps_per_epoch, volume.total_steps, has_eval_data=has_eval_data)
    values |= _course(cfg, volume, when, has_eval_data, resuming) | _machine(cfg, hardware)
    values["report_to"] = trackers(cfg.tracking) if world().is_main else []
    values |= more or {}
    zero = read_zero(cfg)
    if zero is not None:
        values["deepspeed"] = completed(cfg, zero, hardware, world().size)
    arguments = arguments_class(**{k: v for k, v in values.items() if k in known})
    if zero is not None:
        _settle_precision(arguments, values["deepspeed"])
    return arguments, when


def _settle_precision(arguments: Any, asked: dict[str, Any]) -> None:
    """Number types are DeepSpeed's matter here: accelerate hears of none, and would call that a contradiction."""
    held = arguments.hf_deepspeed_config
    held.mismatches.clear()
    held._dtype = torch.float32
    for block, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if asked[block]["enabled"]:
            held._dtype = dtype


def _course(
    cfg: Config, volume: Volume, when: Cadence, has_eval_data: bool, resuming: bool
) -> dict[str, Any]:
    """Length of the run, evaluation and saving. The steps themselves are ours: see `Cadence` and its callback."""
    train = cfg.train
    # A checkpoint keeps it, and a later run may have more steps than this one.
    never = 2**31 - 1
    values: dict[str, Any] = {"max_steps": volume.total_steps}
    if when.evaluate:
        values |= {"eval_strategy": "steps", "eval_steps": never}
        values["eval_on_start"] = not resuming and train.eval_on_start is not False
    if train.save_strategy == "best":
        values["save_strategy"] = "best"
    elif when.save:
        values |= {"save_strategy": "steps", "save_steps": never}
    if train.load_best_model_at_end or train.early_stopping_patience or train.save_strategy == "best":
        metric = best_metric(train)
        values["metric_for_best_model"], values["greater_is_better"] = metric
    if train.load_best_model_at_end and not (when.evaluate and values.get("save_strategy", "no") != "no"):
        values["load_best_model_at_end"] = False
    return values


def best_metric(train: TrainSection) -> tuple[str, bool]:
    """The figure by which evaluations are compared, and whether more of it is better."""
    name = train.metric_for_best_model or "eval_loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    less = name.endswith(("loss", "ppl"))
    return name, (not less if train.greater_is_better is None else train.greater_is_better)


def _machine(cfg: Config, hardware: Hardware) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if hardware.device == "cpu":
        values["use_cpu"] = True
        if world().size > 1:
            values["ddp_backend"] = "gloo"
    if hardware.device == "cuda" and isinstance(cfg.model.tf32, bool):
        values["tf32"] = cfg.model.tf32
    return values
