"""What a run is, in run.json: its config with origins, its data, the machine; and what has changed when it is resumed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl.config import Config
from axolotl.config.keys import owners
from axolotl.config.resolve import Hardware
from axolotl.distributed.failure import launch_options
from axolotl.errors import CheckpointError, Problem
from axolotl.train.checkpoint import read_json

ASKED = "axolotl_config.json"
PACKAGES = (
    "axolotl",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "bitsandbytes",
    "trl",
)

RESUMING = frozenset({"resume_from_checkpoint", "auto_resume_from_checkpoints"})
_SHAPING = (
    "base_model adapter lora_r lora_target_modules lora_target_linear lora_target_parameters lora_modules_to_save "
    "lora_exclude_modules lora_rank_pattern lora_alpha_pattern peft_use_dora peft_layers_to_transform "
    "peft_layers_pattern peft_layer_replication peft_trainable_token_indices tokens special_tokens unfrozen_parameters "
    "resize_token_embeddings_to_32x optimizer optim_target_modules loraplus_lr_ratio lr_groups"
)
SHAPING = frozenset(_SHAPING.split())
"""Keys that decide which weights are trained, or what the optimizer keeps for them."""
_KEPT = (
    "learning_rate weight_decay adam_beta1 adam_beta2 adam_beta3 adam_epsilon adam_epsilon2 embedding_lr "
    "embedding_lr_scale optim_args"
)
KEPT = frozenset(_KEPT.split())
"""Keys whose values the optimizer has saved, and goes on with."""
_WITHOUT_EFFECT = (
    "output_dir logging_steps save_strategy save_steps saves_per_epoch save_total_limit save_first_step save_async eval_strategy "
    "eval_steps evals_per_epoch dataset_prepared_path dataset_num_proc dataset_processes dataloader_num_workers "
    "dataloader_pin_memory dataloader_prefetch_factor max_time hang_timeout on_oom spike_threshold spike_patience "
    "loss_watchdog_threshold loss_watchdog_patience merge_lora gc_collect_steps generate_samples "
    "num_generation_samples generation_max_new_tokens generation_temperature generation_top_p generation_top_k "
    "generation_prompt_ratio generation_do_sample "
    "profiler_steps profiler_steps_start dynamic_checkpoint torch_empty_cache_steps"
)
WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT.split())
"""Keys that change nothing about what is learnt; the sections tracking and output are others."""


def asked(cfg: Config) -> dict[str, Any]:
    """What the config asks for, apart from how to resume; plain data without secrets."""
    values = cfg.effective(defaults=False)
    return json.loads(json.dumps({k: v for k, v in values.items() if k not in RESUMING}, default=str))


def changes(
    saved: Mapping[str, Any], present: Mapping[str, Any], step: int
) -> tuple[list[str], list[Problem]]:
    """What differs between two configs and what that will do; and what cannot be resumed with."""
    told, fatal = [], []
    for key in sorted(saved.keys() | present.keys()):
        before, now = saved.get(key), present.get(key)
        section = owners().get(key, "")
        if before == now or key in WITHOUT_EFFECT or section in ("tracking", "output"):
            continue
        what = f"`{key}` was {_short(before)} and is {_short(now)}"
        if key in SHAPING:
            fatal.append(
                Problem(
                    f"{what}: the checkpoint of step {step} does not fit it.",
                    "Set it back, or start anew with another `output_dir`.",
                    "checkpoint",
                    (key,),
                )
            )
        elif key in KEPT:
            told.append(
                f"{what}; training goes on with the saved {_short(before)}, which the optimizer holds"
            )
        else:
            told.append(f"{what}; the new value holds from step {step + 1} on")
    return told, fatal


def changed_config(cfg: Config, folder: Path, step: int) -> list[str]:
    """What has changed in the config since a checkpoint was saved. Raises CheckpointError where it cannot go on."""
    saved = read_json(folder / ASKED)
    if not saved:
        return []
    told, fatal = changes(saved, asked(cfg), step)
    if fatal:
        raise CheckpointError(fatal)
    return told


def _short(value: Any) -> str:
    if value is None:
        return "unset"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def describe(cfg: Config, hardware: Hardware) -> dict[str, Any]:
    """Config with origins, command, machine and git state of the working folder, for run.json and the report."""
    values = asked(cfg)
    return {
        "asked": values,
        "origins": {key: str(cfg.origin(key)) for key in values},
        "sources": [str(source) for source in cfg.sources],
        "words": cfg.words(*RESUMING),
        "launch_options": launch_options(),
        "warnings": [str(problem) for problem in cfg.warnings],
        "environment": environment(hardware),
        "started": time.time(),
    }


def environment(hardware: Hardware) -> dict[str, str]:
    """Versions, devices and git state, as text."""
    found = {"python": platform.python_version(), "system": platform.platform(), "device": hardware.device}
    if hardware.gpu_names:
        found["GPUs"] = ", ".join(hardware.gpu_names)
    found["CPUs"] = str(os.cpu_count())
    for package in PACKAGES:
        if package in sys.modules or package == "axolotl":
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        state = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        state = ""
    if state:
        found["git"] = state
    return found
