"""From the command to the first training step: the tiny model, 400 rows, nothing prepared.

usage: python benchmarks/first_step.py [runs]      limit: ≤ 9 s, the best of the runs
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from measure import TINY, alpaca_rows, axolotl, python, quiet_environment, record, spread, timed, write_rows


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    to_step, to_end, imports, children = [], [], [], []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rows = write_rows(folder / "rows.jsonl", alpaca_rows(400))
            config = folder / "config.yml"
            config.write_text(
                f"base_model: {TINY}\ndatasets:\n  - path: {rows}\n    type: alpaca\noutput_dir: {folder}/out\n"
                f"dataset_prepared_path: {folder}/prepared\nadapter: lora\nlora_r: 8\nlora_alpha: 16\n"
                "lora_target_linear: true\nsequence_len: 512\nmicro_batch_size: 2\nmax_steps: 10\nlogging_steps: 1\n"
                "learning_rate: 0.0002\n",
                encoding="utf-8",
            )
            before = os.times().children_user
            started = time.time()
            took, done = timed(axolotl("train", config), env=quiet_environment())
            assert done.returncode == 0, done.stderr
            children.append(os.times().children_user - before)
            steps = [json.loads(line) for line in (folder / "out" / "run.jsonl").read_text().splitlines()]
            to_step.append(
                next(s["time"] for s in steps if s["kind"] == "train" and s["step"] == 1) - started
            )
            to_end.append(took)
        took, _ = timed(
            python("-c", "import torch, transformers, peft, datasets; from transformers import Trainer")
        )
        imports.append(took)
    figures = {
        "seconds": {
            "to_first_step": spread(to_step),
            "whole_run": spread(to_end),
            "importing_libraries": spread(imports),
        },
        "ratios": {"first_step_over_importing_libraries": round(min(to_step) / min(imports), 2)},
        "cpu_seconds": spread(children),
    }
    record("first_step", figures, {"first_step_9_s": min(to_step) <= 9})


if __name__ == "__main__":
    main()
