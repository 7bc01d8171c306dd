"""Before a model is loaded: automatic batch and recomputation worked out, and a word where the run will not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from axolotl import console
from axolotl.config import Config, Hardware
from axolotl.config.host import ram
from axolotl.distributed.world import world
from axolotl.errors import EnvironmentProblem, ModelError, Problem
from axolotl.plan import auto
from axolotl.plan.estimate import CONTEXT, count_parameters
from axolotl.plan.gpus import GIB, Gpu, gpu, present_gpu
from axolotl.plan.layout import Layout
from axolotl.plan.rehearsal import ATTENTION
from axolotl.plan.show import table, told
from axolotl.plan.skeleton import build_skeleton
from axolotl.plan.whole import Question, changes, plan_run, question
from axolotl.run.ready import quiet_libraries

UNDOUBTED = 0.2
"""Share of the RAM below which weights and their state are not looked at more closely on a CPU."""


def free_memory(hardware: Hardware) -> int:
    """Bytes that this process may still use on its device: the GPU's, its CUDA context added back, or RAM.

    With several processes it is what the smallest GPU has in all, so that every one of them comes to the same result.
    """
    if hardware.device == "cuda" and world().size > 1:
        return min(hardware.gpu_memory_bytes)
    if hardware.device == "cuda":
        return int(torch.cuda.mem_get_info(world().local_rank)[0]) + CONTEXT
    return ram().free


def device_of(hardware: Hardware) -> Gpu:
    """The device as the plan sees it; one that is not in its table counts as a small H200, for ratios of time."""
    found = present_gpu(hardware)
    if found is None:
        title = hardware.gpu_names[0] if hardware.gpu_names else "this machine's CPU"
        memory = min(hardware.gpu_memory_bytes, default=ram().total)
        found = replace(gpu("h200"), name="here", title=title, memory=memory, measured=False)
    return found


def automatic(cfg: Config, hardware: Hardware) -> Config:
    """The config with `micro_batch_size: auto` and `gradient_checkpointing: auto` worked out for this machine.

    Raises EnvironmentProblem where nothing fits.
    """
    if not auto.asks(cfg):
        return cfg
    quiet_libraries()
    return auto.fitted(cfg, device_of(hardware), hardware, free_memory(hardware), world().size)


def tell_memory(cfg: Config, hardware: Hardware, tokenizer: Any) -> None:
    """Warns where the plan says that training will not fit, with what would help; before the model is loaded.

    Raises EnvironmentProblem where what stays in memory for the whole run (weights, gradients, optimizer) does not fit:
    no smaller batch can help then. Says nothing of a model that cannot be rehearsed.
    """
    memory = free_memory(hardware)
    if not memory or (hardware.device != "cuda" and _small(cfg, hardware, memory)):
        return
    try:
        asked, why = question(cfg, device_of(hardware), hardware, gpus=world().size, tokenizer=tokenizer)
        found = plan_run(asked, memory, why, propose=False)
    except ModelError as error:
        console.detail(error.problems[0].message)
        return
    _tell_ram(sum(found.needs.host.values()))
    if found.fits:
        console.detail(f"memory: needs {found.needs.needed / GIB:.1f} of {memory / GIB:.1f} GiB")
        return
    parts = found.needs.training.by_category
    static = sum(parts.get(k, 0) for k in ("weights", "adapter", "optimizer"))
    needed, free = found.needs.needed / GIB, memory / GIB
    what = "the GPU" if hardware.device == "cuda" else "RAM"
    problem = Problem(
        f"Training needs {needed:.1f} GiB of {what}, {free:.1f} are free"
        + (f": weights and optimizer alone are {static / GIB:.1f}." if static > memory else "."),
        _remedy(asked, memory, hardware.device == "cuda"),
        "environment" if static > memory else "warning",
        ("micro_batch_size",) if static <= memory else ("base_model",),
        code="AX1402",
    )
    if static > memory:
        raise EnvironmentProblem(problem)
    if world().is_main:
        console.show_problem(problem)


def _tell_ram(needed: int) -> None:
    """Warns where RAM is too small for what waits in it while the GPU works. Devices beside the CPU alone."""
    free = ram().free
    if not needed or not free or needed <= free or not world().is_main:
        return
    console.show_problem(
        Problem(
            f"The run holds {needed / GIB:.1f} GiB in RAM beside its programs (offloading, `save_async`), and "
            f"{free / GIB:.1f} are free.",
            "Set `save_async: false`, offload less, or give the machine more memory.",
            "warning",
            code="AX1405",
        )
    )


def show_memory(cfg: Config, hardware: Hardware, tokenizer: Any) -> None:
    """After memory has run out: what the plan says takes it. Nothing is said of a model that cannot be rehearsed."""
    device = device_of(hardware)
    try:
        asked, why = question(cfg, device, hardware, gpus=world().size, tokenizer=tokenizer)
        console.note(table(plan_run(asked, device.memory, why, propose=False)))
    except ModelError as error:
        console.detail(error.problems[0].message)


def _remedy(asked: Question, memory: int, on_gpu: bool) -> str:
    try:
        found = changes(asked, memory, None)
    except ModelError:
        found = []
    if not found:
        more = "a larger GPU, more of them" if on_gpu else "a machine with more RAM, or with a GPU"
        return f"Nothing that the plan knows makes it fit: take {more}, or a smaller model."
    more = "; `axolotl plan config.yml --fit` shows more" if len(found) > 1 else ""
    return f"Set {told(found[0], False)}{more}."


def _small(cfg: Config, hardware: Hardware, memory: int) -> bool:
    """Whether a model is so small beside the RAM that rehearsing it would only take time."""
    try:
        model = build_skeleton(cfg.model, cfg.adapter, hardware, ATTENTION)
        p = count_parameters(model, cfg, Layout("one device"))
    except ModelError:
        return True
    return p.weight_bytes + p.trained_bytes + p.state.device < UNDOUBTED * memory
