"""The plan against what was measured on a GPU: predicted peak and time of each saved point, and the errors.

usage: python benchmarks/plan_points.py            (needs no GPU; writes results/plan_points.json)
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

from geometries import write_model
from measure import RESULTS, TINY, record

from axolotl.config import Hardware, load_config, resolve
from axolotl.model.attention import choose_attention
from axolotl.plan.estimate import requirement
from axolotl.plan.gpus import GIB, gpu
from axolotl.plan.layout import Layout
from axolotl.plan.rehearsal import Batch

HARDWARE = Hardware(device="cuda", gpu_names=("NVIDIA H200",), bf16=True, tf32=True)


def config_of(point: dict[str, Any], folder: Path) -> Path:
    """The config of a point, as a file."""
    model = write_model(point["model"], folder / point["model"], TINY)
    lines = [
        f"base_model: {model}",
        "reinit_weights: true",
        "datasets: [{path: x.jsonl, type: completion}]",
        f"sequence_len: {point['length']}",
        f"micro_batch_size: {point['rows']}",
        "learning_rate: 0.0001",
        f"gradient_checkpointing: {str(point['recompute']).lower()}",
        f"sample_packing: {str(point.get('packed', False)).lower()}",
        f"gradient_accumulation_steps: {point.get('accumulation', 1)}",
        "bf16: true",
    ]
    if point["adapter"]:
        lines += [f"adapter: {point['adapter']}", "lora_r: 32", "lora_alpha: 64", "lora_target_linear: true"]
    if point["adapter"] == "qlora":
        lines.append("load_in_4bit: true")
    keys = {"fused_kernels": False} | point.get("keys", {})
    lines += [f"{key}: {json.dumps(value)}" for key, value in keys.items()]
    file = folder / f"{point['name']}.yml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def batches(point: dict[str, Any]) -> tuple[Batch, Batch]:
    """The largest micro batch that the run had, and the average one of the steps that were timed."""
    rows, packed = point["rows"], point.get("packed", False)
    if not packed or "batches" not in point:
        plain = Batch(rows, point["length"], packed=packed)
        return plain, plain
    pairs = [point["batches"][step][1] for step in filled_steps(point)]
    return (
        Batch(rows, point["length"], packed=True),
        Batch(rows, point["length"], sum(pairs) / len(pairs), packed=True),
    )


def filled_steps(point: dict[str, Any]) -> list[int]:
    """Settled steps of a packed run whose rows are nearly full, as almost all are: the last bin of the few rows of a
    measurement is mostly padding, which is one long document of its own."""
    settled = range(2 if len(point["batches"]) >= 4 else 1, len(point["batches"]))
    whole = point["rows"] * point["length"]
    return [i for i in settled if point["batches"][i][0] >= 0.9 * whole] or [*settled]


def measured_seconds(point: dict[str, Any]) -> float | None:
    """Seconds of a step: of a packed run those of `filled_steps`."""
    if not point.get("packed") or "batches" not in point or not point.get("all_step_seconds"):
        return point["step_seconds"]
    times = point["all_step_seconds"]
    return statistics.median(times[i] for i in filled_steps(point) if i < len(times))


def predicted(point: dict[str, Any], folder: Path) -> tuple[float, float]:
    """(GiB allocated at the peak, seconds of a step) as the plan says them."""
    cfg, _ = resolve(load_config(config_of(point, folder)), HARDWARE)
    packed = point.get("packed", False)
    attention = choose_attention(cfg.model, packed, HARDWARE)
    largest, usual = batches(point)
    needs = requirement(cfg, gpu("h200"), HARDWARE, Layout("one GPU"), attention, largest, usual=usual)
    return needs.training.allocated / GIB, needs.step.total


def compare(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each point with what the plan says of it and by how much that is off (positive: too much)."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for point in points:
            peak, seconds = predicted(point, Path(folder))
            seconds_measured = measured_seconds(point)
            row = {
                "name": point["name"],
                "measured_gib": point["peak_gib"],
                "predicted_gib": round(peak, 2),
                "memory_error": round(peak / point["peak_gib"] - 1, 4),
                "measured_seconds": seconds_measured,
                "predicted_seconds": round(seconds, 4),
                "time_error": round(seconds / seconds_measured - 1, 4) if seconds_measured else None,
                "time_fitted": point.get("fitted", False),
            }
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    return rows


def main() -> None:
    points = json.loads((RESULTS / "memory_points.json").read_text(encoding="utf-8"))["points"]
    rows = compare(points)
    memory = [abs(r["memory_error"]) for r in rows]
    time = [abs(r["time_error"]) for r in rows if r["time_error"] is not None]
    figures = {
        "gpu": "NVIDIA H200",
        "points": len(rows),
        "greatest_memory_error": max(memory),
        "greatest_memory_shortfall": -min(r["memory_error"] for r in rows),
        "greatest_time_error_in_sample": max(time),
        "rows": rows,
    }
    record(
        "plan_points",
        figures,
        {"memory within 5 %": max(memory) <= 0.05, "time within 15 %": max(time) <= 0.15},
    )


if __name__ == "__main__":
    main()
