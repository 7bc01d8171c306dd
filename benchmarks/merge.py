"""Merging a LoRA into random models of 2 and 8 GB: time beside copying the files, memory, and PEFT's own way.

usage: python benchmarks/merge.py [rounds] [--sizes 2,8]
limits: memory at 8 GB within 10 % of that at 2 GB, and at most 1.3 × the largest file plus the libraries; time within
1.5 × of `cp` of the same files, both written through to the disk.

Every kind of work is a process of its own that imports first and is timed afterwards; they take turns. Its memory is
the kernel's own count of the most it held (VmHWM). Needs 4 × the largest size on the disk of the temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import TINY, python, quiet_environment, record, spread

SHARD_BYTES = 10**9
RANK = 32
SHAPES: dict[int, dict[str, int]] = {
    1: {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 6, "num_attention_heads": 16},
    2: {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 14, "num_attention_heads": 16},
    8: {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 38, "num_attention_heads": 24},
}
WAYS = ("copy", "merge", "merge_checked", "peft")


def make(folder: Path, size: int) -> None:
    """A Llama with random bfloat16 weights of about `size` GB in files of 1 GB, and a LoRA for all its layers."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    base, adapter = folder / "base", folder / "adapter"
    for each in (base, adapter):
        each.mkdir(parents=True)
    config = LlamaConfig(**SHAPES[size], vocab_size=32000, num_key_value_heads=8, dtype="bfloat16")
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(base)
    shards: list[dict[str, Any]] = [{}]
    held = 0
    for name, tensor in model.state_dict().items():
        if held + tensor.numel() * 2 > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += tensor.numel() * 2
    weight_map = {}
    torch.manual_seed(0)
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        drawn = {n: torch.empty(t.shape, dtype=torch.bfloat16).normal_(0, 0.02) for n, t in shard.items()}
        save_file(drawn, base / file, {"format": "pt"})
    total = 2 * sum(t.numel() for t in model.state_dict().values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))

    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    settings.base_model_name_or_path = str(base)
    adapted = get_peft_model(model, settings)
    weights = get_peft_model_state_dict(adapted)
    save_file(
        {n: torch.empty(t.shape).normal_(0, 0.01) for n, t in weights.items()},
        adapter / "adapter_model.safetensors",
        {"format": "pt"},
    )
    adapted.peft_config["default"].save_pretrained(adapter)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(adapter)


def work(way: str, folder: Path) -> dict[str, float]:
    """One way to write the model, timed from after the imports until the disk has it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from axolotl.config.adapter import AdapterSection
    from axolotl.config.model import ModelSection
    from axolotl.weights.merge import merge

    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    imported = _most_memory()
    started, busy = time.perf_counter(), sum(os.times()[:4])
    if way == "copy":
        out.mkdir()
        subprocess.run(["cp", *map(str, base.glob("*.safetensors")), str(out)], check=True)
        subprocess.run(["sync", *map(str, out.iterdir()), str(out)], check=True)
    elif way == "peft":
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        merged.save_pretrained(out, max_shard_size="1GB")
        subprocess.run(["sync", *map(str, out.iterdir()), str(out)], check=True)
    else:
        report = merge(
            ModelSection.model_validate({"base_model": str(base)}),
            AdapterSection.model_validate({"adapter": "lora", "lora_r": RANK, "lora_alpha": 2 * RANK}),
            adapter,
            out,
            verify="layers" if way == "merge_checked" else "off",
        )
        assert all(check.passed for check in report.checks), report.checks
    took = time.perf_counter() - started
    busy = sum(os.times()[:4]) - busy
    return {"seconds": took, "cpu_seconds": busy, "peak_bytes": _most_memory(), "libraries_bytes": imported}


def _most_memory() -> int:
    """Bytes of memory that this process held at its most, by the kernel's count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measured(size: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Every way in turn, `rounds` times."""
    subprocess.run(python(__file__, "--make", str(size), str(folder)), check=True, env=quiet_environment())
    files = sorted((folder / "base").glob("*.safetensors"))
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            for file in files:  # each finds the base in the page cache, as after training
                with file.open("rb", buffering=0) as handle:
                    while handle.read(2**24):
                        pass
            done = subprocess.run(
                python(__file__, "--work", way, str(folder)),
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=quiet_environment(),
            )
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            shutil.rmtree(folder / "out")
    best = {way: min(run["seconds"] for run in runs) for way, runs in found.items()}
    peak = {way: max(run["peak_bytes"] for run in runs) for way, runs in found.items()}
    return {
        "bytes": sum(f.stat().st_size for f in files),
        "files": len(files),
        "largest_file_bytes": max(f.stat().st_size for f in files),
        "adapter_bytes": (folder / "adapter" / "adapter_model.safetensors").stat().st_size,
        "libraries_bytes": max(run["libraries_bytes"] for runs in found.values() for run in runs),
        "seconds": {way: spread([run["seconds"] for run in runs]) for way, runs in found.items()},
        "cpu_seconds": {way: spread([run["cpu_seconds"] for run in runs]) for way, runs in found.items()},
        "peak_bytes": {way: peak[way] for way in WAYS if way != "copy"},
        "ratios": {
            "merge_over_copy": round(best["merge"] / best["copy"], 3),
            "merge_checked_over_copy": round(best["merge_checked"] / best["copy"], 3),
            "checking_share": round(1 - best["merge"] / best["merge_checked"], 3),
            "merge_over_peft": round(best["merge_checked"] / best["peft"], 3),
            "peak_over_peft": round(peak["merge_checked"] / peak["peft"], 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    parser.add_argument("--sizes", default="2,8")
    parser.add_argument("--make", nargs=2)
    parser.add_argument("--work", nargs=2)
    given = parser.parse_args()
    if given.make:
        make(Path(given.make[1]), int(given.make[0]))
    elif given.work:
        print(json.dumps(work(given.work[0], Path(given.work[1]))))
    else:
        compare(given.rounds, [int(size) for size in given.sizes.split(",")])


def compare(rounds: int, sizes: list[int]) -> None:
    """Measures all sizes and records them with the limits."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < 4 * 10**9 * max(sizes):
        sys.exit(f"needs {4 * max(sizes)} GB of disk; {tempfile.gettempdir()} has {free / 1e9:.1f} GB free")
    results = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            results[f"{size}_GB"] = measured(size, rounds, Path(name))
        print(size, json.dumps(results[f"{size}_GB"]), file=sys.stderr)
    small, large = (results[f"{size}_GB"] for size in (min(sizes), max(sizes)))
    growth = large["peak_bytes"]["merge_checked"] / small["peak_bytes"]["merge_checked"] - 1
    limits = {
        "peak_within_10_percent": abs(growth) <= 0.10,
        "peak_at_most_1.3_files_and_libraries": all(
            r["peak_bytes"]["merge_checked"] <= 1.3 * r["largest_file_bytes"] + r["libraries_bytes"]
            for r in results.values()
        ),
        "time_within_1.5_copies": all(r["ratios"]["merge_over_copy"] <= 1.5 for r in results.values()),
        "checked_time_within_1.5_copies": all(
            r["ratios"]["merge_checked_over_copy"] <= 1.5 for r in results.values()
        ),
    }
    work_done = {"rank": RANK, "dtype": "bfloat16", "threads": len(os.sched_getaffinity(0))}
    ratios = {"peak_growth": round(growth, 3)}
    record("merge", {"work": work_done, "sizes": results, "ratios": ratios}, limits)


if __name__ == "__main__":
    main()
