"""Peak memory and time of a step over a grid of runs on one GPU, and how far the plan is off.

    python benchmarks/gpu/memory_grid.py --out benchmarks/results/memory_grid.json      # runs what is missing; needs a GPU
    python benchmarks/gpu/memory_grid.py --out benchmarks/results/memory_grid.json --compare     # the errors; needs none
    python benchmarks/gpu/memory_grid.py --tiny --out /tmp/grid.json                    # the same program, tiny, on a CPU

Each run is `axolotl train` in a process of its own, on random weights and random tokens; it is written down at once, and
one that stands in the file is not run again. Every third run is held out: nothing may be fitted to it. Models are made
one after the other and deleted, so that the disk holds one at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from geometries import write_model  # noqa: E402
from measure import TINY  # noqa: E402
from plan_points import compare  # noqa: E402

from train import WEIGHTS, make_rows, versions  # noqa: E402

SMALL = ("llama-1b", "qwen3-1.7b", "gemma-2b", "llama-3b", "qwen3-4b")
LARGE = ("llama-8b", "qwen3-8b", "gemma-7b")
TINY_GEOMETRY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TINY_GEOMETRY |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 4096}
FUSED = {"fused_kernels": True}

# adapter, rows, tokens of a row, recompute, packed, further keys
_OF_SMALL: list[tuple[Any, ...]] = [
    (None, 2, 2048, False, False, {}),
    (None, 1, 8192, True, False, {"gradient_accumulation_steps": 2}),
    ("lora", 4, 2048, False, False, {}),
    ("lora", 1, 32768, True, False, {}),
    ("lora", 2, 4096, False, False, FUSED),
    ("qlora", 1, 16384, True, True, {}),
]
_OF_LARGE: list[tuple[Any, ...]] = [
    ("lora", 1, 4096, False, False, {}),
    ("lora", 2, 4096, True, False, {"gradient_accumulation_steps": 2}),
    ("lora", 1, 8192, False, True, FUSED),
    ("lora", 1, 32768, True, False, FUSED),
    ("qlora", 4, 1024, False, False, {}),
    ("qlora", 1, 16384, True, True, {}),
]


def grid() -> list[dict[str, Any]]:
    """All runs, grouped by model."""
    found = []
    for model in SMALL + LARGE:
        for adapter, rows, length, recompute, packed, keys in _OF_SMALL if model in SMALL else _OF_LARGE:
            words = [model, adapter or "full", f"{rows}x{length}", "recompute" if recompute else "keep"]
            words += ["packed"] * packed + ["fused"] * ("fused_kernels" in keys)
            point = {
                "name": " ".join(words),
                "model": model,
                "adapter": adapter,
                "rows": rows,
                "length": length,
            }
            point |= {"recompute": recompute, "packed": packed}
            rest = {k: v for k, v in keys.items() if k != "gradient_accumulation_steps"}
            point |= {"accumulation": keys.get("gradient_accumulation_steps", 1), "keys": rest}
            point["held_out"] = len(found) % 3 == 2
            found.append(point)
    return found


def make_model(name: str, folder: Path, tiny: bool) -> Path:
    """A folder with the geometry, random weights and a tokenizer."""
    target = write_model(name, folder / name, TINY)
    if tiny:
        config = json.loads((target / "config.json").read_text()) | TINY_GEOMETRY
        (target / "config.json").write_text(json.dumps(config))
    if not any(target.glob("*.safetensors")):
        subprocess.run([sys.executable, "-c", WEIGHTS, str(target)], check=True)
    return target


def run(point: dict[str, Any], folder: Path, tiny: bool, steps: int, warm: int) -> dict[str, Any]:
    """One run of `axolotl train`; its peak and the median time of a step, or its error."""
    model = make_model(point["model"], folder, tiny)
    length = point["length"] // 64 if tiny else point["length"]
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    tokens = length * point["rows"] * point["accumulation"] * (steps + 2)
    row_length = min(700, length // 4) if point["packed"] else length
    data = make_rows(folder, row_length, vocabulary, tokens, point["packed"])
    config: dict[str, Any] = {
        "base_model": str(model),
        "datasets": [{"path": str(data), "ds_type": "parquet"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "sequence_len": length,
        "sample_packing": point["packed"],
        "micro_batch_size": point["rows"],
        "gradient_accumulation_steps": point["accumulation"],
        "gradient_checkpointing": point["recompute"],
        "max_steps": steps,
        "learning_rate": 1e-5,
        "lr_scheduler": "constant",
        "save_strategy": "no",
        "on_oom": "fail",
        "bf16": "auto",
        **point["keys"],
    }
    if point["adapter"]:
        config |= {"adapter": point["adapter"], "lora_r": 32, "lora_alpha": 64, "lora_target_linear": True}
    if point["adapter"] == "qlora":
        config["load_in_4bit"] = True
    file = folder / "run.yml"
    file.write_text(json.dumps(config, indent=1))
    shutil.rmtree(folder / "out", ignore_errors=True)
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "axolotl", "train", str(file)], capture_output=True, text=True
    )
    if done.returncode:
        return {"error": (done.stderr or done.stdout)[-1500:]}
    lines = [json.loads(line) for line in (folder / "out" / "run.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line.get("kind") == "train"]
    times = [b["time"] - a["time"] for a, b in itertools.pairwise(logged)][warm:]
    return {
        "peak_gib": round(logged[-1]["peak_memory_gib"], 3),
        "step_seconds": round(statistics.median(times), 5),
        "took_seconds": round(time.time() - started, 1),
    }


def errors(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan against the measured runs: worst and middle errors, of the runs that may be fitted and of the others."""
    measured = [p for p in points if "peak_gib" in p]
    rows = compare(measured)
    found: dict[str, Any] = {"runs": len(rows)}
    for name, held in (("fitted", False), ("held_out", True)):
        mine = [r for r, p in zip(rows, measured, strict=True) if p["held_out"] is held]
        if not mine:
            continue
        memory = [r["memory_error"] for r in mine]
        seconds = [r["time_error"] for r in mine]
        found[name] = {
            "runs": len(mine),
            "memory_error_greatest": max(map(abs, memory)),
            "memory_error_median": statistics.median(map(abs, memory)),
            "memory_greatest_shortfall": max(0.0, -min(memory)),
            "time_error_greatest": max(map(abs, seconds)),
            "time_error_median": statistics.median(map(abs, seconds)),
            # What `rest` of gpus.json would have to be multiplied by; to be taken from the fitted runs alone.
            "time_factor": round(statistics.median(1 / (1 + e) for e in seconds), 4),
        }
    found["limits"] = {"memory_error": 0.05, "memory_shortfall": 0.02, "time_error": 0.15}
    found["rows"] = rows
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/axolotl-memory-grid"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--only", default="", help="Runs whose name holds this.")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="Begin no run after so long.")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() else {"versions": versions(), "points": {}}
    if args.compare:
        result["errors"] = errors(list(result["points"].values()))
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({k: v for k, v in result["errors"].items() if k != "rows"}, indent=1))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    began, here = time.time(), ""
    for point in grid():
        done = result["points"].get(point["name"], {})
        if "peak_gib" in done or args.only not in point["name"] or time.time() - began > args.seconds:
            continue
        if here and here != point["model"]:
            shutil.rmtree(args.work / here, ignore_errors=True)
        here = point["model"]
        result["points"][point["name"]] = point | run(point, args.work, args.tiny, args.steps, args.warm)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(
            point["name"],
            json.dumps({k: v for k, v in result["points"][point["name"]].items() if k not in point}),
            flush=True,
        )
    left = [p["name"] for p in grid() if "peak_gib" not in result["points"].get(p["name"], {})]
    print(f"{len(grid()) - len(left)} of {len(grid())} runs are there.")
    sys.exit(bool(left))


if __name__ == "__main__":
    main()
