"""How many processes a training run gets, who starts them, and what is done once before they start."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from axolotl import console
from axolotl.config import Config
from axolotl.data.stream import streams
from axolotl.distributed.failure import OPTIONS, among_several, launch_options
from axolotl.distributed.launch import (
    MODULE,
    become,
    defaults_for_processes,
    launcher_command,
    run_processes,
)
from axolotl.distributed.world import detect_hardware
from axolotl.errors import ConfigError, EnvironmentProblem, Problem
from axolotl.registry import missing_extra
from axolotl.run import on_ray
from axolotl.run.beforehand import problems_beforehand
from axolotl.run.preprocess import prepare_data, tokenizer_of
from axolotl.run.ready import ready, refuse, told_with_places


@told_with_places
def launch(
    cfg: Config,
    arguments: Sequence[str],
    *,
    launcher: str | None = None,
    processes: int | None = None,
    own: Sequence[str] = (),
) -> int | None:
    """Trains in several processes and returns the exit code; None where this process has to train by itself.

    `arguments` are those of `axolotl train`, `own` the launcher's. Without a launcher, each GPU that is visible gets a
    process; on the CPU there is one unless `processes` says otherwise. The data is prepared here, before any process
    starts. Does not return for torchrun and accelerate: they take this process's place.
    """
    if among_several() or os.environ.get("LOCAL_RANK"):
        return None  # a launcher has started this process already
    if asked := _asked_of_accelerate():
        console.warn(
            f"accelerate was asked for {asked} processes and started this one alone (with `--cpu` or without "
            "`--multi_gpu` it may do that). `axolotl train` without a launcher starts one for each GPU; "
            f"`--num-processes {asked}` does on a CPU."
        )
        return None
    if cfg.distributed.use_ray:
        return _by_ray(cfg, launcher, processes)
    _remember(launcher, processes, own)
    count = process_count(cfg, launcher, processes)
    if launcher not in ("torchrun", "accelerate") and count == 1:
        return None
    _prepare_once(cfg, 0 if launcher in ("torchrun", "accelerate") else count)
    if launcher in ("torchrun", "accelerate"):
        command = launcher_command(launcher, own, arguments, count)
        become(command, defaults_for_processes() | dict(os.environ))
    return run_processes([*MODULE, *arguments], count)


def _remember(launcher: str | None, processes: int | None, own: Sequence[str]) -> None:
    """Leaves to the processes of the run how they were started, for the command that goes on where they stop."""
    words = ["--num-processes", str(processes)] if processes is not None else []
    words += ["--launcher", launcher] if launcher is not None else []
    words += ["--", *own] if own else []
    os.environ.pop(OPTIONS, None)
    if words:
        os.environ[OPTIONS] = json.dumps(words)


def _asked_of_accelerate() -> int:
    """How many processes accelerate was asked for, where it has started this one; 0 where it was not, or for one."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return 0  # accelerate sets it for every process
    words = [part for word in launch_options() for part in word.split("=", 1)]
    for name, value in itertools.pairwise(words):
        if name in ("--num_processes", "--num-processes", "-n") and value.isdigit():
            return int(value) if int(value) > 1 else 0
    return 0


def _by_ray(cfg: Config, launcher: str | None, processes: int | None) -> int:
    """Trains on Ray; returns the exit code. Raises ConfigError for options that speak of another way to start."""
    for option, given in (("--launcher", launcher), ("--num-processes", processes)):
        if given is not None:
            raise ConfigError(
                cfg.problem(
                    f"`{option} {given}`: with `use_ray: true`, Ray starts the workers.",
                    "Leave the option out; `ray_num_workers` is their number.",
                    "use_ray",
                    kind="conflict",
                )
            )
    workers, hardware = cfg.distributed.ray_num_workers, detect_hardware()
    refuse(missing_extra("ray", "ray", "`use_ray: true`", "use_ray"))
    if hardware.device == "cuda" or not on_ray.elsewhere():
        _prepare_once(cfg, workers)
    # Else this machine only hands the work on, and what it lacks says nothing about the workers'.
    return on_ray.run_on_ray(cfg)


def process_count(cfg: Config, launcher: str | None, asked: int | None) -> int:
    """Processes on this machine. Raises EnvironmentProblem for more than there are GPUs."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked is not None:
        if gpus and asked > gpus:
            raise EnvironmentProblem(
                Problem(
                    f"`--num-processes {asked}`: only {gpus} GPUs are visible here, and each process needs one.",
                    f"Write `--num-processes {gpus}` or less.",
                    "environment",
                )
            )
        return asked
    if launcher == "python":
        return 1
    model = cfg.model
    if gpus > 1 and (model.device_map or model.max_memory or model.gpu_memory_limit or model.device):
        console.note(
            "One process for all GPUs, because the config says itself where the model lies "
            "(`device_map`, `max_memory`, `gpu_memory_limit` or `device`)."
        )
        return 1
    return max(1, gpus)


def _prepare_once(cfg: Config, processes: int) -> None:
    """Tells every mistake that can be told now, and prepares the data: no process waits in a collective for it."""
    hardware = detect_hardware()
    refuse(problems_beforehand(cfg, hardware, data=False, processes=processes))
    cfg = ready(cfg, hardware)
    before = Path(cfg.adapter.lora_model_dir) if cfg.adapter.lora_model_dir else None
    tokenizer = tokenizer_of(cfg, before)
    if not streams(cfg.data) or cfg.data.test_datasets:
        prepare_data(cfg, tokenizer)
