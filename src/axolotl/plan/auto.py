"""`micro_batch_size: auto` and `gradient_checkpointing: auto`: the fastest of what fits, by the engine of the plan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from axolotl import console
from axolotl.config import Config
from axolotl.config.resolve import Hardware, resolve
from axolotl.errors import EnvironmentProblem, Problem
from axolotl.model.load import load_model_config
from axolotl.plan import fit
from axolotl.plan.gpus import GIB, Gpu
from axolotl.plan.layout import layout_of
from axolotl.plan.skeleton import uniform_depth
from axolotl.plan.whole import Question
from axolotl.train.build import attention_for

TRIED = 6
"""Settings that are rehearsed in full before the search gives up."""


def asks(cfg: Config) -> bool:
    """Whether the config leaves one of these keys to the plan."""
    return cfg.train.micro_batch_size == "auto" or cfg.train.gradient_checkpointing == "auto"


def fitted(cfg: Config, gpu: Gpu, hardware: Hardware, memory: int, gpus: int | None = None) -> Config:
    """The config with these keys worked out for a GPU that can give `memory` bytes, each with its reason.

    The rows of a step stay: batch_size, else gradient_accumulation_steps of one row each. Rows count as long as
    sequence_len, so that no row can be too long for what is chosen. Raises EnvironmentProblem where nothing fits.
    """
    if not asks(cfg):
        return cfg
    train = cfg.train
    by_batch, by_recompute = train.micro_batch_size == "auto", train.gradient_checkpointing == "auto"
    rows = (train.batch_size or train.gradient_accumulation_steps) if by_batch else 0
    start: dict[str, Any] = {}
    if by_batch:
        start |= {"micro_batch_size": 1, "gradient_accumulation_steps": rows}
    if by_recompute:
        start["gradient_checkpointing"] = False
    resolved, _ = resolve(cfg.with_values(start, {}), hardware)
    layout = layout_of(cfg.distributed, gpus, max(1, len(hardware.gpu_names)))
    asked = Question(resolved, gpu, hardware, layout, attention_for(resolved.model, resolved.data, hardware))
    judge = fit.remembered(asked.judge)
    depth = uniform_depth(load_model_config(cfg.model))
    lines = [
        fit.line(fit.changed(resolved, {"gradient_checkpointing": way}), judge, depth)
        for way in ((False, True) if by_recompute else (resolved.train.gradient_checkpointing,))
    ]
    found: list[tuple[float, dict[str, Any]]] = []
    for micro, steps in (
        fit.batches(resolved) if by_batch else [(train.rows_at_once, train.gradient_accumulation_steps)]
    ):
        more = {"micro_batch_size": micro, "gradient_accumulation_steps": steps} if by_batch else {}
        for seconds, way in _ways(lines, micro, depth, memory):
            found.append((seconds * steps, ({"gradient_checkpointing": way} if by_recompute else {}) | more))
    for _, values in sorted(found, key=lambda each: each[0])[:TRIED]:
        confirmed = _confirmed(resolved, values, judge, memory, depth)
        if confirmed is not None:
            return _told(cfg, *confirmed, memory, rows)
    # Straight lines may say too much: the least is rehearsed before it is refused.
    least: dict[str, Any] = {"gradient_checkpointing": True} if by_recompute else {}
    smallest = fit.changed(resolved, least)
    needs = judge(smallest, smallest.train.rows_at_once, 0)
    if needs.needed <= memory:
        if by_batch:
            least |= {"micro_batch_size": 1, "gradient_accumulation_steps": rows}
        return _told(cfg, least, needs.needed, memory, rows)
    keys = [k for k, on in (("micro_batch_size", by_batch), ("gradient_checkpointing", by_recompute)) if on]
    raise EnvironmentProblem(
        Problem(
            f"`{keys[0]}: auto`: nothing fits into {memory / GIB:.1f} GiB; the least needs {needs.needed / GIB:.1f} GiB.",
            "`axolotl plan config.yml --fit` shows what else would help: 8-bit optimizers, QLoRA, a shorter `sequence_len`.",
            "environment",
            tuple(keys),
            code="AX1402",
        )
    )


def _ways(
    lines: list[fit.Line], micro: int, depth: int | None, memory: int
) -> Iterator[tuple[float, int | bool]]:
    """(seconds of a micro batch, `gradient_checkpointing`) of what fits by the small rehearsals.

    Between keeping everything and computing all layers again, memory and time are straight lines in the number of
    layers that are computed again.
    """
    needed = [line.needed(micro, depth or 0) for line in lines]
    seconds = [line.seconds(micro, depth or 0) for line in lines]
    for index, bytes_needed in enumerate(needed):
        if bytes_needed <= memory:
            yield seconds[index], bool(index)
    if len(lines) == 2 and depth and needed[1] <= memory < needed[0]:
        layers = math.ceil(depth * (needed[0] - memory) / (needed[0] - needed[1]))
        if layers < depth:
            yield seconds[0] + (seconds[1] - seconds[0]) * layers / depth, max(1, layers)


def _confirmed(
    cfg: Config, values: dict[str, Any], judge: fit.Judge, memory: int, depth: int | None
) -> tuple[dict[str, Any], int] | None:
    """The values with the bytes that they need by a whole rehearsal, if that fits; a few layers more may be needed."""
    for _ in range(TRIED):
        trial = fit.changed(cfg, values)
        needed = judge(trial, trial.train.rows_at_once, 0).needed
        if needed <= memory:
            return values, needed
        layers = values.get("gradient_checkpointing")
        if isinstance(layers, bool) or layers is None or depth is None:
            return None
        more = layers + max(1, depth // 16)
        values = values | {"gradient_checkpointing": True if more >= depth else more}
    return None


def _told(cfg: Config, values: dict[str, Any], needed: int, memory: int, rows: int) -> Config:
    fits = f"needs {needed / GIB:.1f} of {memory / GIB:.1f} GiB"
    recompute = values.get("gradient_checkpointing")
    why = "it would not fit without" if recompute is True else "there is room without"
    if not isinstance(recompute, bool):
        why = "it fits when so many layers are computed again"
    reasons = {
        "micro_batch_size": f"auto: the fastest that fits ({fits})",
        "gradient_accumulation_steps": f"auto: a step keeps its {rows} rows",
        "gradient_checkpointing": f"auto: {why} ({fits})",
    }
    for key, value in values.items():
        console.note(f"{key}: {str(value).lower()} ({reasons[key]})")
    more = dict(values)
    if "micro_batch_size" in more:
        # Said once by micro_batch_size; as a rule of its own it would be divided again.
        more["batch_size"] = None
    return cfg.with_values(more, {k: reasons.get(k, "auto") for k in more})
