"""What would make a run fit, or use the memory that it leaves free: changes of a few keys, ranked by the time they cost.

Every change keeps the rows of a step (micro_batch_size × gradient_accumulation_steps). A candidate is judged by small
rehearsals, two depths and two batches, between which memory and time are straight lines; what is proposed has been
rehearsed in full.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from axolotl.config import Config
from axolotl.plan.estimate import Requirement
from axolotl.plan.rehearsal import Batch

SHALLOW, DEEP = 2, 4
"""Layers of the two rehearsals by which others are judged."""
MOST = 5
"""Proposals that are shown."""
_EIGHT_BIT = {
    **dict.fromkeys(("adamw_torch_fused", "adamw_torch", "adamw_hf"), "adamw_8bit"),
    "ademamix": "ademamix_8bit",
    "rmsprop": "rmsprop_bnb_8bit",
}
ALIKE = 1.02
"""Times within this factor count as equal: then the change of fewer keys is the better one."""
SHORTEST = 512
"""Tokens below which `sequence_len` is not halved."""


@dataclass(frozen=True)
class Change:
    """Keys with new values, what they need of a GPU, and the seconds of a step."""

    values: dict[str, Any]
    needed: int
    seconds: float
    step_now: float
    """Seconds of a step as the config stands; 0 where that cannot be told."""

    @property
    def cost(self) -> float:
        """Time of a step beside that of the config as it stands, less one."""
        return self.seconds / self.step_now - 1 if self.step_now else 0.0

    @property
    def shortens(self) -> bool:
        return "sequence_len" in self.values


Judge = Callable[[Config, int, int], Requirement]
"""(config, rows of a micro batch, layers or 0 for all) → what it needs."""


@dataclass(frozen=True)
class Line:
    """Bytes (by phase) and seconds at two depths and two batches, as a plane through them."""

    at: Mapping[tuple[int, int], Requirement]
    rows: tuple[int, int]
    depths: tuple[int, int]

    def needed(self, rows: int, depth: int) -> int:
        """Bytes of the GPU that a batch of so many rows needs at this depth."""
        one = self.at[self.rows[0], self.depths[0]]
        overhead = one.training.needed - one.training.allocated

        def phase(name: str) -> float:
            return self._plane(lambda r: float(r.phases.get(name, 0)), rows, depth)

        worst = max(map(phase, one.phases))
        if one.training.allocated != max(one.phases.values()):
            # Several GPUs share the model: what one of them holds less is a straight line too.
            worst = self._plane(lambda r: float(r.training.allocated), rows, depth)
        evaluation = 0.0
        if one.evaluation is not None:
            evaluation = self._plane(
                lambda r: float(r.evaluation.allocated if r.evaluation else 0), rows, depth
            )
        return int(max(worst, evaluation) + overhead)

    def seconds(self, rows: int, depth: int) -> float:
        """Seconds of one micro batch."""
        return self._plane(lambda r: r.step.total, rows, depth)

    def _plane(self, value: Callable[[Requirement], float], rows: int, depth: int) -> float:
        (r0, r1), (d0, d1) = self.rows, self.depths

        def deep(row: int) -> float:
            low = value(self.at[row, d0])
            return low if d0 == d1 else low + (value(self.at[row, d1]) - low) * (depth - d0) / (d1 - d0)

        low = deep(r0)
        return low if r0 == r1 else low + (deep(r1) - low) * (rows - r0) / (r1 - r0)


def candidates(cfg: Config, *, faster: bool) -> Iterator[dict[str, Any]]:
    """Values to try, without those of the batch: recomputation, 8-bit states, 4-bit weights."""
    train, model = cfg.train, cfg.model
    recompute: list[dict[str, Any]] = [{}]
    if not train.gradient_checkpointing:
        recompute.append({"gradient_checkpointing": True})
    elif faster:
        recompute.append({"gradient_checkpointing": False})
    states: list[dict[str, Any]] = [{}]
    if not faster and cfg.optim.optimizer in _EIGHT_BIT and not cfg.distributed.fsdp_config:
        states.append({"optimizer": _EIGHT_BIT[cfg.optim.optimizer]})
    packed: list[dict[str, Any]] = [{}]
    if not faster and cfg.adapter.adapter == "lora" and not (model.load_in_4bit or model.load_in_8bit):
        packed.append({"adapter": "qlora", "load_in_4bit": True})
    for a, b, c in itertools.product(recompute, states, packed):
        yield {**a, **b, **c}


def batches(cfg: Config) -> Iterator[tuple[int, int]]:
    """(micro_batch_size, gradient_accumulation_steps) that give a step as many rows as now."""
    rows = cfg.train.rows_at_once * cfg.train.gradient_accumulation_steps
    for micro in range(1, rows + 1):
        if rows % micro == 0:
            yield micro, rows // micro


def changed(cfg: Config, values: Mapping[str, Any]) -> Config:
    """The config with these values in place of its own."""
    more = dict(values)
    if more.get("gradient_checkpointing"):
        more.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    if "micro_batch_size" in more and not cfg.is_set("eval_batch_size"):
        more.setdefault("eval_batch_size", more["micro_batch_size"])
    return cfg.with_values(more, {})


def propose(
    cfg: Config,
    judge: Judge,
    memory: int,
    depth: int | None,
    now: Requirement | None,
    *,
    faster: bool = False,
) -> list[Change]:
    """Changes under which the run fits into `memory` bytes, each rehearsed in full; the cheapest first.

    `judge` rehearses; `depth` is the model's number of layers where they are all alike. `faster`: among changes that
    use free memory, those that save time. Shorter rows come last, and only where nothing else fits.
    """
    seconds = now.step.total if now else 0.0
    found = list(_found(cfg, judge, memory, depth, seconds, faster))
    if faster:
        found = [c for c in found if c.seconds < 0.98 * seconds]
    found = _least(found)
    if not found and not faster:
        length = cfg.data.sequence_len // 2
        while length >= SHORTEST and not found:
            shorter = {"sequence_len": length}
            found = _least(
                [
                    replace(c, values={**c.values, **shorter})
                    for c in _found(changed(cfg, shorter), judge, memory, depth, seconds, False)
                ]
            )
            length //= 2
    confirmed = []
    for change in found[: MOST if not faster else 2]:
        trial = changed(cfg, change.values)
        full = judge(trial, trial.train.rows_at_once, 0)
        if full.needed <= memory:
            confirmed.append(replace(change, needed=full.needed, seconds=full.step.total))
    return sorted(
        confirmed, key=lambda c: (round(c.seconds / (seconds or c.seconds), 1), len(c.values), c.seconds)
    )


def _found(
    cfg: Config, judge: Judge, memory: int, depth: int | None, seconds: float, faster: bool
) -> Iterator[Change]:
    rows_now, steps_now = cfg.train.rows_at_once, cfg.train.gradient_accumulation_steps
    for values in candidates(cfg, faster=faster):
        drawn = line(changed(cfg, {**values, "gradient_accumulation_steps": 2}), judge, depth)
        for micro, accumulation in batches(cfg):
            more = dict(values)
            if (micro, accumulation) != (rows_now, steps_now):
                more |= {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
            if not more or (micro > rows_now and not faster):
                continue
            layers = depth or drawn.depths[0]
            if drawn.needed(micro, layers) <= memory:
                # The lines were drawn for two micro batches with one update.
                step = drawn.seconds(micro, layers) / 2 * accumulation
                yield Change(more, drawn.needed(micro, layers), step, seconds)


def line(cfg: Config, judge: Judge, depth: int | None) -> Line:
    """The small rehearsals by which the batches of a config are judged."""
    most = cfg.train.rows_at_once * cfg.train.gradient_accumulation_steps
    rows = (1, 2) if most > 1 else (1, 1)
    depths = (SHALLOW, DEEP) if depth and depth > DEEP else (0, 0)
    at = {(r, d): judge(cfg, r, d) for r in dict.fromkeys(rows) for d in dict.fromkeys(depths)}
    return Line(at, rows, depths)


def _least(found: list[Change]) -> list[Change]:
    """The fastest change of each set of keys, without those that do more than another one that fits."""
    best: dict[frozenset[str], Change] = {}
    for change in found:
        keys = frozenset(change.values)
        if keys not in best or change.seconds < best[keys].seconds:
            best[keys] = change
    kept = [
        change
        for keys, change in best.items()
        if not any(other < keys and best[other].seconds <= ALIKE * change.seconds for other in best)
    ]
    return sorted(kept, key=lambda c: (c.seconds, len(c.values)))


def remembered(judge: Judge) -> Judge:
    """The judge, asked once for each question."""

    @lru_cache(maxsize=256)
    def ask(key: str, rows: int, depth: int) -> Requirement:
        return judge(pending[key], rows, depth)

    pending: dict[str, Config] = {}

    def remember(cfg: Config, rows: int, depth: int) -> Requirement:
        key = repr((cfg.model, cfg.adapter, cfg.train, cfg.optim, cfg.data.sequence_len))
        pending[key] = cfg
        return ask(key, rows, depth)

    return remember


def scaled(batch: Batch, rows: int) -> Batch:
    """A micro batch of the same rows, more or fewer of them."""
    return replace(batch, rows=rows, attended=batch.attended / batch.rows * rows)
