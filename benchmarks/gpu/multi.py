"""Training speed of `axolotl train` on several GPUs of one host: scaling of LoRA and full training, 70B, 512k tokens.

    python benchmarks/gpu/multi.py --out benchmarks/results/gpu-multi.json                 # every row that fits these GPUs
    python benchmarks/gpu/multi.py --out ... --rows lora-8b-ddp-2,full-8b-bf16-4 --limit 540
    python benchmarks/gpu/multi.py --out ... --rows full-8b-bf16-4 --again --set torch_compile=true
    python benchmarks/gpu/multi.py --tiny --out /tmp/multi.json --work /tmp/multi           # tiny, gloo, on a CPU

Weights and tokens are random: the geometry is that of Llama 3, and `reinit_weights` draws the weights where they will lie, a
part on each GPU under FSDP. A row that stands in the output already is not run again, so the table can be filled in
pieces, on machines of different sizes; rows that were not run say so. `--limit` ends the program in time: no row is
begun whose time is not left, and a row that takes longer is stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from geometries import write_model  # noqa: E402
from measure import TINY  # noqa: E402

TINY_GEOMETRY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 4096,
}
SHRINK = 64
"""Rows are so many times shorter with --tiny."""
LORA = {"adapter": "lora", "lora_r": 32, "lora_alpha": 64, "lora_target_linear": True, "fused_kernels": True}
FSDP = {
    "fsdp_version": 2,
    "fsdp_config": {"reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT"},
}
FULL = {"fused_kernels": True, "gradient_checkpointing": "auto"}


def rows() -> dict[str, dict[str, Any]]:
    """Every row: model, length of a row of tokens, GPUs, keys; `base` is the row that scaling is measured against."""
    found: dict[str, dict[str, Any]] = {}
    for n in (1, 2, 4, 8):
        found[f"lora-8b-ddp-{n}"] = {
            "model": "llama-8b",
            "length": 4096,
            "gpus": n,
            "base": "lora-8b-ddp-1",
            "scaling": 0.93 if n == 8 else 0.95,
            "keys": {**LORA, "micro_batch_size": 2, "gradient_checkpointing": "auto"},
        }
    for kind, reach in (("bf16", {4: 7500, 8: 6667}), ("fp8", {4: 10938, 8: 10938})):
        for n in (1, 2, 4, 8):
            found[f"full-8b-{kind}-{n}"] = {
                "model": "llama-8b",
                "length": 8192,
                "gpus": n,
                "base": f"full-8b-{kind}-1",
                "scaling": 0.93 if n == 8 else None,
                "reach": reach.get(n),
                # One GPU has nobody to divide the weights with.
                "keys": {
                    **FULL,
                    **(FSDP if n > 1 else {}),
                    **({"fp8": True} if kind == "fp8" else {}),
                    "micro_batch_size": 1,
                },
            }
    big = {**LORA, "micro_batch_size": 1, "gradient_checkpointing": "auto", **FSDP}
    for n in (4, 8):
        found[f"lora-70b-fsdp-{n}"] = {
            "model": "llama-70b",
            "length": 4096,
            "gpus": n,
            "reach": 1300,
            "keys": big,
        }
    found["lora-70b-tp2-fsdp4-8"] = {
        "model": "llama-70b",
        "length": 4096,
        "gpus": 8,
        "reach": 1300,
        "keys": {**big, "tensor_parallel_size": 2, "dp_shard_size": 4},
    }
    for n in (2, 4):
        found[f"full-8b-tp-{n}"] = {
            "model": "llama-8b",
            "length": 8192,
            "gpus": n,
            "keys": {**FULL, "micro_batch_size": 1, "tensor_parallel_size": n},
        }
    found["full-8b-tp2-fsdp2-4"] = {
        "model": "llama-8b",
        "length": 8192,
        "gpus": 4,
        "keys": {**FULL, **FSDP, "micro_batch_size": 1, "tensor_parallel_size": 2},
    }
    for n, length in ((2, 131072), (4, 262144), (8, 524288)):
        found[f"context-{length // 1024}k-{n}"] = {
            "model": "llama-8b",
            "length": length,
            "gpus": n,
            "keys": {
                **LORA,
                "micro_batch_size": 1,
                "gradient_checkpointing": True,
                "context_parallel_size": n,
                "flash_attention": True,
            },
        }
    for n in (2, 4, 8):
        found[f"reshard-8b-{n}to{n // 2}"] = {
            "model": "llama-8b",
            "length": 2048,
            "gpus": n,
            "resume_on": n // 2,
            # Half of 2 is one GPU, which FSDP has nothing to do on: the run goes on with whole weights.
            "keys": {**FULL, **FSDP, "micro_batch_size": 1, "gradient_accumulation_steps": 1},
        }
    return found


def token_rows(work: Path, length: int, count: int) -> Path:
    """A file of so many rows of random tokens, all of them trained."""
    file = work / f"rows-{length}-{count}.parquet"
    if not file.exists():
        draw = np.random.default_rng(0)
        ids = [draw.integers(0, 4000, length).tolist() for _ in range(count)]
        columns = {"input_ids": ids, "labels": ids, "attention_mask": [[1] * length] * count}
        pq.write_table(pa.table(columns), file)
    return file


def versions() -> dict[str, str]:
    """Versions of what decides the speed; those that are not here are left out."""
    found = {}
    for name in ("torch", "transformers", "peft", "accelerate", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_config(
    name: str, row: dict[str, Any], work: Path, tiny: bool, steps: int, more: dict[str, Any]
) -> Path:
    """The row's config, its model's folder and its rows of tokens."""
    model = work / ("tiny" if tiny else "real") / row["model"]
    length = row["length"] // (SHRINK if tiny else 1)
    if not (model / "config.json").exists():
        write_model(row["model"], model, TINY)
        config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 524288}
        (model / "config.json").write_text(json.dumps(config | (TINY_GEOMETRY if tiny else {})))
    keys: dict[str, Any] = {
        "base_model": str(model),
        "reinit_weights": True,
        "dataset_prepared_path": str(work / "prepared"),
        "output_dir": str(work / "out" / name),
        "sequence_len": length,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "constant",
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "bf16": "auto",
        "on_oom": "fail",
        **row["keys"],
        **more,
    }
    ranks = row["gpus"] // (keys.get("context_parallel_size", 1) * keys.get("tensor_parallel_size", 1))
    count = keys["micro_batch_size"] * keys["gradient_accumulation_steps"] * ranks * (steps + 1)
    data = token_rows(work, length, count)
    keys["datasets"] = [{"path": str(data), "ds_type": "parquet"}]
    path = work / f"{name}.yml"
    path.write_text(json.dumps(keys, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def train(config: Path, gpus: int, limit: float, *arguments: str) -> dict[str, Any]:
    """One run of the command; what its log says, or why there is none."""
    command = [
        sys.executable,
        "-m",
        "axolotl",
        "train",
        str(config),
        "--num-processes",
        str(gpus),
        *arguments,
    ]
    with (config.parent / f"{config.stem}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={"NCCL_NVLS_ENABLE": "0", **os.environ}
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return {"error": f"stopped after {limit:.0f} s"}
    if code:
        return {"error": f"exit code {code}: " + Path(log.name).read_text()[-1500:]}
    out = Path(json.loads(config.read_text())["output_dir"])
    lines = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    return {"steps": [line for line in lines if line.get("kind") == "train"]}


def measure(
    name: str,
    row: dict[str, Any],
    work: Path,
    *,
    tiny: bool,
    steps: int,
    warm: int,
    limit: float,
    more: dict[str, Any],
) -> dict[str, Any]:
    """The figures of a row."""
    if "resume_on" in row:
        return measure_resharding(name, row, work, tiny=tiny, limit=limit, more=more)
    config = write_config(name, row, work, tiny, steps, more)
    shutil.rmtree(work / "out" / name, ignore_errors=True)
    began = time.time()
    done = train(config, row["gpus"], limit)
    if "error" in done:
        return done
    log = done["steps"]
    times = [b["time"] - a["time"] for a, b in itertools.pairwise(log)][warm:]
    tokens = [b["tokens"] - a["tokens"] for a, b in itertools.pairwise(log)][warm:]
    return {
        "tokens_per_second_per_gpu": round(sum(tokens) / sum(times) / row["gpus"], 1),
        "median_step_seconds": round(statistics.median(times), 4),
        "steps_measured": len(times),
        "peak_gib": round(max(line["peak_memory_gib"] for line in log), 2),
        "first_loss": log[0]["loss"],
        "last_loss": log[-1]["loss"],
        "first_step_after_seconds": round(log[0]["time"] - began, 1),
        **({"set": more} if more else {}),
    }


def measure_resharding(
    name: str, row: dict[str, Any], work: Path, *, tiny: bool, limit: float, more: dict[str, Any]
) -> dict[str, Any]:
    """A run on all GPUs that saves in parts, and its second half on half of them: the losses of both."""
    save = {"max_steps": 8, "save_steps": 4, "save_strategy": "steps"}
    config = write_config(name, row, work, tiny, 8, {**more, **save})
    shutil.rmtree(work / "out" / name, ignore_errors=True)
    began = time.time()
    whole = train(config, row["gpus"], limit)
    if "error" in whole:
        return whole
    if row["resume_on"] == 1:
        keys = {k: v for k, v in json.loads(config.read_text()).items() if not k.startswith("fsdp")}
        config.write_text(json.dumps(keys, indent=1))
    checkpoint = work / "out" / name / "checkpoint-4"
    half = train(
        config,
        row["resume_on"],
        limit - (time.time() - began),
        *("--output-dir", str(work / "out" / f"{name}-half"), "--resume-from-checkpoint", str(checkpoint)),
    )
    if "error" in half:
        return half
    again = json.loads(config.read_text()) | {"output_dir": str(work / "out" / f"{name}-half")}
    log = Path(again["output_dir"]) / "run.jsonl"
    second = [json.loads(line) for line in log.read_text().splitlines()]
    after = {
        line["step"]: line["loss"] for line in second if line.get("kind") == "train" and line["step"] > 4
    }
    before = {line["step"]: line["loss"] for line in whole["steps"] if line["step"] > 4}
    apart = max(abs(before[step] - after[step]) for step in before)
    return {"losses": before, "losses_resumed": after, "greatest_difference": apart}


def judged(table: dict[str, Any]) -> dict[str, Any]:
    """Adds scaling and what was reached, where the rows for it have been measured."""
    for name, row in rows().items():
        got = table.get(name, {})
        rate = got.get("tokens_per_second_per_gpu")
        if rate is None:
            continue
        base = table.get(row.get("base", ""), {}).get("tokens_per_second_per_gpu")
        if base:
            got["scaling"] = round(rate / base, 3)
        wanted = [
            (got.get("scaling"), row.get("scaling")),
            (rate, row.get("reach")),
        ]
        asked = [(found, goal) for found, goal in wanted if goal is not None and row["gpus"] > 1]
        if asked and all(found is not None for found, _ in asked):
            got["reached"] = all(found >= goal for found, goal in asked)
    return table


def shown(table: dict[str, Any]) -> str:
    """The table in markdown."""
    lines = ["| row | GPUs | tok/s per GPU | scaling | peak GiB | reach |", "|---|---|---|---|---|---|"]
    for name, row in rows().items():
        got = table.get(name, {})
        reach = row.get("reach") or (row.get("scaling") if row["gpus"] > 1 else None) or ""
        if "not run" in got or not got:
            rate = f"not run: {got.get('not run', '-')}"
        elif "error" in got:
            rate = "failed"
        elif "greatest_difference" in got:
            rate = f"losses apart by {got['greatest_difference']:.1e}"
        else:
            rate = f"{got['tokens_per_second_per_gpu']:,}"
        lines.append(
            f"| {name} | {row['gpus']} | {rate} | {got.get('scaling', '')} | {got.get('peak_gib', '')} | {reach} |"
        )
    return "\n".join(lines)


def value_of(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/axolotl-gpu-multi"))
    parser.add_argument("--rows", help="names, with commas; all by default")
    parser.add_argument("--again", action="store_true", help="also rows that have been measured")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm", type=int, default=4, help="steps that do not count")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for everything")
    parser.add_argument("--row-limit", type=float, default=420, help="seconds for a row")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the config")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU if there is no GPU")
    parser.add_argument("--gpus", type=int, help="processes at most; by default the GPUs that are here")
    args = parser.parse_args()
    known = rows()
    names = args.rows.split(",") if args.rows else list(known)
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"no such row: {', '.join(unknown)}. There are {', '.join(known)}.")
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    limit = args.gpus or here or (2 if args.tiny else 0)
    device = torch.cuda.get_device_name(0) if here else "CPU"
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    more, began, failed = dict(map(value_of, args.set)), time.time(), False
    for name in known:
        row, old = known[name], result["rows"].get(name, {"not run": "not asked for"})
        measured = "not run" not in old and "error" not in old
        left = args.limit - (time.time() - began)
        if name not in names or (measured and not args.again):
            new = old
        elif row["gpus"] > limit:
            new = old if measured else {"not run": f"it needs {row['gpus']} GPUs"}
        elif left < min(30, args.row_limit):
            new = old if measured else {"not run": "no time was left"}
        else:
            new = measure(
                name, row, args.work, tiny=args.tiny, steps=args.steps, warm=args.warm,
                limit=min(left, args.row_limit), more=more,
            )  # fmt: skip
            new |= {"device": device, "versions": versions(), "date": time.strftime("%Y-%m-%d")}
            failed |= "error" in new
            print(name, json.dumps(new), flush=True)
        result["rows"][name] = new
        result["rows"] = judged(result["rows"])
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(shown(result["rows"]))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
