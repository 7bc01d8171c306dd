"""A plan as a table for people and as plain data for machines."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import yaml

from axolotl.plan.estimate import CONTEXT, Memory, as_dict
from axolotl.plan.fit import Change
from axolotl.plan.gpus import GIB
from axolotl.plan.whole import Plan
from axolotl.train.progress import duration

_NAMES = {
    "weights": "weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "logits": "logits and loss",
    "temporary": "temporary",
}


def gib(count: float) -> str:
    """Bytes as GiB, or as MiB where that is less than a hundredth of one."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:,.2f} MiB"


def verdict(plan: Plan) -> str:
    """One line: whether it fits."""
    needed, memory = plan.needs.needed / GIB, plan.memory / GIB
    where = plan.gpu.title + (f" × {plan.layout.gpus}" if plan.layout.gpus > 1 else "")
    if plan.fits:
        return f"fits on {where}: needs {needed:.1f} of {memory:.1f} GiB, {memory - needed:.1f} GiB to spare"
    return f"does not fit on {where}: needs {needed:.1f} GiB, {memory:.1f} GiB are there"


def quality(plan: Plan) -> str:
    """How far the figures can be trusted."""
    if plan.gpu.measured and plan.layout.gpus == 1:
        return "compared with measured runs (docs/plan.md)"
    return "estimate"


def table(plan: Plan) -> str:
    """The plan for people."""
    needs, cfg, course = plan.needs, plan.cfg, plan.course
    p = needs.parameters
    lines = [
        f"Plan for {plan.gpu.title}, {plan.layout.title} ({quality(plan)})",
        "",
        f"  parameters        {p.trained:,} trained of {p.total:,} ({p.trained / max(p.total, 1):.2%})",
    ]
    batch = needs.batch
    shape = (
        f"{cfg.train.rows_at_once} × {batch.length} tokens, packed"
        if batch.packed
        else f"{batch.rows} × {batch.length} tokens"
    )
    lines.append(f"  micro batch       {shape}; {cfg.train.gradient_accumulation_steps} in a step")
    lines += ["", *_memory_rows("training", needs.training)]
    if needs.evaluation is not None:
        lines += ["", *_memory_rows("evaluation", needs.evaluation)]
    lines.append("")
    if course is None:
        lines.append(f"  steps             not known: {plan.why}")
    else:
        v = course.volume
        about = "" if course.exact else "about "
        lines += [
            f"  rows              {about}{course.rows:,}, {about}{v.tokens_per_epoch:,} tokens, "
            f"{course.trained_share:.1%} of them trained",
            f"  steps             {about}{v.total_steps:,} in {v.epochs:.4g} epochs ({about}{v.steps_per_epoch:,} each)",
        ]
        if plan.evaluations:
            lines.append(f"  evaluations       {plan.evaluations} of {plan.evaluation_batches:,} batches")
    step = needs.step
    parts = (
        f"matrix products {step.matmul:.3g}, attention {step.attention:.3g}, memory traffic {step.memory:.3g}"
    )
    lines.append(f"  time of a step    {step.total:.3g} s ({parts})")
    if plan.seconds is not None:
        lines.append(f"  time of the run   {duration(plan.seconds)}")
    if needs.host:
        parts = ", ".join(f"{name} {gib(count)}" for name, count in needs.host.items())
        lines.append(
            f"  RAM for the run   {gib(sum(needs.host.values()))} ({parts}), beside programs and data"
        )
    d = plan.disk
    lines += [
        f"  checkpoint        {gib(d.checkpoint)}, {d.kept} kept",
        f"  disk              {gib(d.most)} at most, {gib(d.free)} free",
        *(f"  note              {note}" for note in needs.notes),
        "",
        verdict(plan),
    ]
    if plan.disk.most > plan.disk.free:
        lines.append(
            f"does not fit on the disk of `output_dir`: {gib(d.most)} are written, {gib(d.free)} are free"
        )
    return "\n".join(lines)


def _memory_rows(title: str, memory: Memory) -> list[str]:
    rows = [(name, memory.by_category.get(key, 0)) for key, name in _NAMES.items()]
    rows = [(name, count) for name, count in rows if count]
    rows += [("fragmentation", memory.fragmentation), ("CUDA context", CONTEXT)]
    width = max(len(name) for name, _ in rows) + 2
    head = f"  {title}: most memory in the {memory.phase}" if memory.phase != title else f"  {title}"
    return [
        head,
        *(f"    {name:<{width}}{gib(count):>12}" for name, count in rows),
        f"    {'needed':<{width}}{gib(memory.needed):>12}",
    ]


def change_lines(plan: Plan) -> list[str]:
    """The proposals, one line each; the first is the one that `--write` takes."""
    if not plan.changes:
        if plan.fits:
            return []
        return ["Nothing that this knows makes it fit: take a larger GPU, more of them, or a smaller model."]
    head = "What would be faster:" if plan.fits else "What would make it fit, the fastest first:"
    return [head, *(f"  {i}. {told(change, plan.fits)}" for i, change in enumerate(plan.changes, 1))]


def told(change: Change, fits: bool) -> str:
    """A change on one line."""
    keys = ", ".join(f"{key}: {_yaml(value)}" for key, value in change.values.items())
    what = f"needs {change.needed / GIB:.1f} GiB"
    if change.step_now:
        what += f", a step takes {change.seconds:.3g} s ({change.cost:+.0%})"
    if change.shortens:
        what += "; longer rows are dropped or cut"
    return f"{keys}  ({what})"


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def diff(before: str, after: str, name: str) -> str:
    """What changes in a file, as `diff -u` shows it."""
    pieces = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), name, name, n=1
    )
    return "".join(pieces).rstrip("\n")


def plan_dict(plan: Plan) -> dict[str, Any]:
    """Plain data: bytes and seconds."""
    course = plan.course
    found: dict[str, Any] = {
        "gpu": plan.gpu.name,
        "quality": "measured card" if plan.gpu.measured and plan.layout.gpus == 1 else "estimate",
        "layout": {"title": plan.layout.title, "gpus": plan.layout.gpus},
        "fits": plan.fits,
        "verdict": verdict(plan),
        "memory_available": plan.memory,
        "memory_needed": plan.needs.needed,
        **as_dict(plan.needs),
        "batch": {
            "rows": plan.needs.batch.rows,
            "length": plan.needs.batch.length,
            "packed": plan.needs.batch.packed,
        },
        "steps": None,
        "total_seconds": None if plan.seconds is None else round(plan.seconds, 3),
        "evaluations": plan.evaluations,
        "disk": {
            "checkpoint": plan.disk.checkpoint,
            "checkpoints_kept": plan.disk.kept,
            "final": plan.disk.final,
            "most": plan.disk.most,
            "free": plan.disk.free,
        },
        "changes": [_change_dict(c) for c in plan.changes],
    }
    if course is None:
        found["steps_unknown"] = plan.why
    else:
        v = course.volume
        found["steps"] = {
            "exact": course.exact,
            "total": v.total_steps,
            "per_epoch": v.steps_per_epoch,
            "epochs": v.epochs,
            "tokens_per_epoch": v.tokens_per_epoch,
            "rows": course.rows,
            "trained_share": round(course.trained_share, 6),
        }
    return found


def _change_dict(change: Change) -> Mapping[str, Any]:
    return {
        "values": change.values,
        "memory_needed": change.needed,
        "step_seconds": round(change.seconds, 6),
        "slower_by": round(change.cost, 4),
    }
