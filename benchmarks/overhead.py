"""Steps per second of `axolotl train` beside a bare PyTorch loop over the same batches: the tiny model, 2 × 512 tokens.

usage: python benchmarks/overhead.py [rounds]      limit: within 5 % (of the fastest quarter of ten-step stretches)

Both are processes of their own and take turns, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import TINY, axolotl, python, quiet_environment, record
from tiny_run import logged, token_rows, write_config
from transformers import AutoModelForCausalLM

STEPS, BATCH, LENGTH, STRETCH = 200, 2, 512, 10
LEARNING_RATE = 1e-4


def bare(rows_file: Path) -> list[float]:
    """Seconds of each stretch of the bare loop: forward, backward, clipping, fused AdamW, linear schedule."""
    rows = [json.loads(line)["input_ids"] for line in rows_file.read_text().splitlines()]
    batches = [torch.tensor(rows[at : at + BATCH]) for at in range(0, len(rows), BATCH)]
    torch.manual_seed(42)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    seconds, at = [], time.perf_counter()
    for number, ids in enumerate(batches, 1):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if number % STRETCH == 0:
            float(loss.detach())
            now = time.perf_counter()
            seconds.append(now - at)
            at = now
    return seconds


def through_axolotl(config: Path, out: Path) -> list[float]:
    """Seconds of each stretch of `axolotl train`, from the times that it logs."""
    subprocess.run(axolotl("train", config), check=True, capture_output=True, env=quiet_environment())
    times = [line["time"] for line in logged(out)]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def fastest_quarter(seconds: list[float]) -> float:
    """Steps per second over the fastest quarter of the stretches."""
    fastest = sorted(seconds)[: max(1, len(seconds) // 4)]
    return STRETCH / statistics.mean(fastest)


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "--bare":
        print(json.dumps(bare(Path(sys.argv[2]))))
        return
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, out = token_rows(folder / "rows.jsonl", STEPS * BATCH, LENGTH), folder / "out"
        rest = (
            f"learning_rate: {LEARNING_RATE}\noptimizer: adamw_torch_fused\nlr_scheduler: linear\nwarmup_steps: 0\n"
            f'weight_decay: 0.0\nmax_grad_norm: 1.0\nlogging_steps: {STRETCH}\nsave_strategy: "no"\n'
        )
        config = write_config(folder / "config.yml", data, out, LENGTH, BATCH, STEPS, rest)
        ours, theirs = [], []
        for _ in range(rounds):
            # The first stretch of each pays for warming up.
            command = python(__file__, "--bare", str(data))
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env=quiet_environment()
            )
            theirs += json.loads(done.stdout)[1:]
            ours += through_axolotl(config, out)
    rates = {"axolotl": fastest_quarter(ours), "bare_loop": fastest_quarter(theirs)}
    middle = {"axolotl": STRETCH / statistics.median(ours), "bare_loop": STRETCH / statistics.median(theirs)}
    ratio = rates["axolotl"] / rates["bare_loop"]
    figures = {
        "steps_per_second": {k: round(v, 3) for k, v in rates.items()},
        "steps_per_second_median": {k: round(v, 3) for k, v in middle.items()},
        "ratios": {
            "axolotl_over_bare_loop": round(ratio, 4),
            "median": round(middle["axolotl"] / middle["bare_loop"], 4),
        },
        "work": {
            "threads": torch.get_num_threads(),
            "steps": STEPS,
            "batch": BATCH,
            "tokens_per_row": LENGTH,
            "rounds": rounds,
        },
    }
    record("overhead", figures, {"within_5_percent": ratio >= 0.95})


if __name__ == "__main__":
    main()
