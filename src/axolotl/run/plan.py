"""`axolotl plan`: what a run will need and how long it will take, without a GPU and without the weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from axolotl import console
from axolotl.config import Config
from axolotl.config.edit import edited
from axolotl.config.rules.devices import several_devices_needed
from axolotl.distributed.world import detect_hardware
from axolotl.errors import ConfigError, EnvironmentProblem, Problem, UserError
from axolotl.model.files import check_base_model
from axolotl.model.hub import check_hub
from axolotl.model.tokenizer import load_tokenizer
from axolotl.plan.auto import fitted
from axolotl.plan.gpus import gpu as gpu_by_name
from axolotl.plan.gpus import gpu_names, hardware_of, present_gpu
from axolotl.plan.layout import layout_of
from axolotl.plan.show import change_lines, diff, plan_dict, table
from axolotl.plan.whole import Plan, plan_run, question
from axolotl.run.ready import quiet_libraries, ready, refuse, told_with_places

DOES_NOT_FIT = 1
"""The exit code of a plan that does not fit."""


@told_with_places
def plan(
    cfg: Config,
    *,
    gpu: str | None = None,
    gpus: int | None = None,
    fit: bool = False,
    write: bool = False,
    as_json: bool = False,
) -> Plan:
    """Shows the plan of a config for a GPU: the one named, else the one of this machine.

    `fit` also looks for faster settings where memory is left; `write` puts the first proposal into the config file.
    Raises a UserError for a model or a GPU that is not known.
    """
    quiet_libraries()
    present = detect_hardware()
    chosen = gpu_by_name(gpu) if gpu else present_gpu(present)
    if chosen is None:
        raise EnvironmentProblem(
            "This machine has no GPU that the plan knows, and none is named.",
            f"Name one, such as `--gpu h200`. Known: {', '.join(gpu_names())}.",
        )
    hardware = hardware_of(chosen, gpus or max(1, len(present.gpu_names) if not gpu else 1), present.cpus)
    place = cfg.place("base_model")
    # Its weights are not looked at: a folder without them will do.
    without_weights = cfg.model.model_copy(update={"reinit_weights": True})
    refuse([*check_base_model(without_weights, place), *check_hub(cfg.model.base_model, place=place)])
    count = layout_of(cfg.distributed, gpus, max(1, len(hardware.gpu_names))).gpus
    refuse([_for_several(problem) for problem in several_devices_needed(cfg, count)])
    cfg = fitted(cfg, chosen, hardware, chosen.memory, gpus)
    cfg = ready(cfg, hardware)
    tokenizer = _tokenizer(cfg)
    asked, why = question(cfg, chosen, hardware, gpus=gpus, tokenizer=tokenizer)
    found = plan_run(asked, chosen.memory, why, faster=fit)
    new = _changed_file(cfg, found) if write or fit else None
    if as_json:
        console.out(json.dumps(plan_dict(found), ensure_ascii=False))
    else:
        console.out(table(found))
        for line in change_lines(found):
            console.out(line)
        if new is not None:
            path, before, after = new
            console.out(diff(before, after, path.name))
    if write and new is not None:
        new[0].write_text(new[2], encoding="utf-8")
        console.success(f"Written to {new[0]}.")
    return found


def _for_several(problem: Problem) -> Problem:
    return dataclasses.replace(problem, remedy=f"{problem.remedy} Name their number with `--gpus`.")


def _tokenizer(cfg: Config) -> Any:
    try:
        with console.silenced():
            return load_tokenizer(cfg.model)
    except UserError as error:
        console.warn(f"{error.problems[0].message} The steps are not known without it.")
        return None


def _changed_file(cfg: Config, found: Plan) -> tuple[Path, str, str] | None:
    """The config file, its text, and its text with the first proposal."""
    if not found.changes:
        return None
    values = found.changes[0].values
    typed = [k for k in values if cfg.is_set(k) and cfg.place(k).line is None]
    if typed:
        raise ConfigError(
            f"`{typed[0]}` is set on the command line, so writing it to the file would change nothing.",
            "Leave the flag out.",
        )
    path = Path(cfg.sources[-1])
    try:
        before = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"`{path}` cannot be changed: {error.strerror}.", "Change the keys yourself."
        ) from error
    return path, before, edited(before, values)
