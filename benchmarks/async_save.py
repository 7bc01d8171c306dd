"""How long a step waits for a checkpoint: `save_async: true` beside a save that training waits for.

usage: python benchmarks/async_save.py [rounds]      limit: the wait is below 5 % of a save's (medians, one run)

All weights of a 44 M model with AdamW, so that a checkpoint has half a GiB. Both kinds are runs of `axolotl train` and take
turns. A run's first save is told apart: it has to get the memory for the copy. So is what the steps cost that a
thread writes beside (on two cores it takes one of them).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measure import TINY, axolotl, quiet_environment, record, spread, write_rows
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

SAVES, BETWEEN, LENGTH = 5, 12, 384


def model(folder: Path) -> int:
    """Writes a Llama with random weights; returns how many it has."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
    )
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in made.parameters())


def run(folder: Path, base: Path, data: Path, *, background: bool) -> tuple[list[float], list[float], float]:
    """(seconds that each save stopped training, seconds of each step after the first, GiB of a checkpoint)."""
    out = folder / ("background" if background else "waiting")
    config = folder / f"{out.name}.yml"
    config.write_text(
        f"base_model: {base}\ndatasets:\n  - path: {data}\n    type:\noutput_dir: {out}\n"
        f"dataset_prepared_path: {folder}/prepared\nsequence_len: {LENGTH}\nmicro_batch_size: 1\n"
        f"max_steps: {SAVES * BETWEEN + 2}\nlearning_rate: 1.0e-5\nbf16: false\ntf32: false\nlogging_steps: 1\n"
        f"save_steps: {BETWEEN}\nsave_total_limit: 1\nsave_async: {str(background).lower()}\n",
        encoding="utf-8",
    )
    subprocess.run(["rm", "-rf", str(out)], check=True)
    subprocess.run(axolotl("train", config), check=True, capture_output=True, env=quiet_environment())
    lines = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    # A save is counted in the line of the step after it; the last one is of the run's end, which waits for it.
    saves = [line["save_seconds"] for line in trained if "save_seconds" in line and line["step"] > 1]
    steps = [line["seconds_per_step"] for line in trained[1:]]
    size = sum(p.stat().st_size for p in next(out.glob("checkpoint-*")).iterdir())
    return saves, steps, size / 2**30


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    waits: dict[bool, list[float]] = {True: [], False: []}
    first: dict[bool, list[float]] = {True: [], False: []}
    steps: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = model(folder / "base")
        rows = torch.randint(
            10, 4000, (SAVES * BETWEEN + 2, LENGTH), generator=torch.Generator().manual_seed(0)
        )
        data = write_rows(
            folder / "rows.jsonl",
            [{"input_ids": r, "attention_mask": [1] * LENGTH, "labels": r} for r in rows.tolist()],
        )
        for _ in range(rounds):
            for background in (False, True):
                saves, seconds, size = run(folder, folder / "base", data, background=background)
                first[background].append(saves[0])
                waits[background] += saves[1:]
                steps[background] += seconds
    ratio = statistics.median(waits[True]) / statistics.median(waits[False])
    figures = {
        "seconds": {
            "save_that_training_waits_for": spread(waits[False]),
            "wait_with_save_async": spread(waits[True]),
            "wait_of_a_runs_first_save_with_save_async": spread(first[True]),
        },
        "ratios": {
            "wait_over_save": round(ratio, 4),
            "first_wait_over_save": round(
                statistics.median(first[True]) / statistics.median(waits[False]), 4
            ),
            # Of all steps, those that a thread wrote beside included.
            "step_beside_step": round(statistics.mean(steps[True]) / statistics.mean(steps[False]), 4),
            "run_beside_run": round(
                (sum(steps[True]) + sum(waits[True])) / (sum(steps[False]) + sum(waits[False])), 4
            ),
        },
        "work": {
            "weights": weights,
            "checkpoint_gib": round(size, 3),
            "threads": torch.get_num_threads(),
            "steps_between_saves": BETWEEN,
            "rounds": rounds,
        },
    }
    record("async_save", figures, {"below_5_percent": ratio < 0.05})


if __name__ == "__main__":
    main()
