"""What exact checkpoints and watchdogs cost of a step: the time inside them beside the time of the steps, in one run.

usage: python benchmarks/run_cost.py [rounds]      limit: below 1 % of step time

A run of `axolotl train` on the tiny model, 2 × 512 tokens (a step of a larger model takes longer and the watching does
not). All that is there for exactness, for watching and for the record is timed where it is called: counting tokens
over ranks, looking at losses and gradients, spikes, time limit, hangs, signals, when to save, run.jsonl. Only outermost
calls count, and what they call of transformers does not. Saves are told apart: flushing and hashing beside writing.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from measure import python, quiet_environment, record
from tiny_run import logged, token_rows, write_config

STEPS, BATCH, LENGTH, SAVE_STEPS = 200, 2, 512, 50


class Stopwatch:
    """Seconds inside functions; a function that is called inside another one is not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.stack: list[str] = []
        self.since = 0.0

    def _turn(self) -> None:
        now = time.perf_counter()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    def time(self, owner: Any, name: str, label: str) -> None:
        """From here on, calls of `owner.name` count for `label`, apart from what is timed inside them."""
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self.stack.append(label)
            try:
                return plain(*args, **kwargs)
            finally:
                self._turn()
                self.stack.pop()
                self.since = time.perf_counter()

        setattr(owner, name, timed)


def child(config: str, results: Path) -> None:
    """Trains with everything timed."""
    from transformers.trainer import Trainer

    from axolotl.cli.main import main
    from axolotl.data.collate import PaddedCollator
    from axolotl.train import callbacks, checkpoint, progress, saving, steps, trainer, watch

    watch_of = Stopwatch()
    for kind, label in (
        (steps.StepCheck, "watching numbers"),
        (callbacks.LossWatch, "watching numbers"),
        (watch.HangWatch, "watching time"),
        (watch.TimeLimit, "watching time"),
        (callbacks.Signals, "signals"),
        (saving.SaveCare, "saving in time"),
        (callbacks.AtSteps, "saving in time"),
        (callbacks.EpochOrder, "order of rows"),
        (progress.RunLog, "run.jsonl"),
    ):
        for name in [
            n for n in vars(kind) if n.startswith("on_") and n not in ("on_train_begin", "on_train_end")
        ]:
            watch_of.time(kind, name, label)
    watch_of.time(trainer.TrainerMixin, "get_batch_samples", "counting tokens")
    watch_of.time(trainer.TrainerMixin, "training_step", "watching numbers")
    watch_of.time(trainer.TrainerMixin, "_save_checkpoint", "a save: the rest")
    # What stands inside of those and is no watching.
    watch_of.time(Trainer, "training_step", "forward and backward")
    watch_of.time(trainer.itertools, "islice", "fetching batches")
    watch_of.time(PaddedCollator, "__call__", "fetching batches")
    watch_of.time(trainer.TrainerMixin, "compute_loss", "forward and backward")
    watch_of.time(Trainer, "_save_checkpoint", "a save: writing")
    watch_of.time(checkpoint, "_hashed", "a save: hashing")
    watch_of.time(checkpoint, "_flush", "a save: flushing")
    try:
        main(["train", config])
    finally:
        results.write_text(json.dumps(watch_of.seconds))


def main() -> None:
    if len(sys.argv) > 3 and sys.argv[1] == "--child":
        child(sys.argv[2], Path(sys.argv[3]))
        return
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    shares: list[float] = []
    parts: dict[str, list[float]] = defaultdict(list)
    saves: dict[str, list[float]] = defaultdict(list)
    per_step: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = token_rows(folder / "rows.jsonl", STEPS * BATCH, LENGTH)
        rest = f"learning_rate: 1.0e-4\nlogging_steps: 1\nsave_steps: {SAVE_STEPS}\nsave_total_limit: 1\nmax_time: 10h\n"
        for number in range(rounds):
            out, results = folder / f"out-{number}", folder / f"{number}.json"
            config = write_config(folder / f"{number}.yml", data, out, LENGTH, BATCH, STEPS, rest)
            command = python(__file__, "--child", str(config), str(results))
            subprocess.run(command, check=True, capture_output=True, env=quiet_environment())
            seconds = json.loads(results.read_text())
            steps = [line["seconds_per_step"] for line in logged(out)]
            trained = sum(steps)
            apart = ("forward and backward", "fetching batches")
            watched = {k: v for k, v in seconds.items() if k not in apart and not k.startswith("a save")}
            shares.append(sum(watched.values()) / trained)
            per_step += steps
            for label, value in watched.items():
                parts[label].append(value / trained)
            whole = sum(v for k, v in seconds.items() if k.startswith("a save"))
            for label, value in seconds.items():
                if label.startswith("a save"):
                    saves[label.removeprefix("a save: ")].append(value / whole)
    share = statistics.median(shares)
    figures = {
        "ratios": {
            "watching_over_step": round(share, 5),
            "by_part": {k: round(statistics.median(v), 5) for k, v in sorted(parts.items())},
            "of_a_save": {k: round(statistics.median(v), 3) for k, v in sorted(saves.items())},
        },
        "seconds_per_step": round(statistics.median(per_step), 4),
        "microseconds_of_watching_per_step": round(share * statistics.mean(per_step) * 1e6),
        "work": {
            "threads": torch.get_num_threads(),
            "steps": STEPS,
            "batch": BATCH,
            "tokens_per_row": LENGTH,
            "rounds": rounds,
        },
    }
    record("run_cost", figures, {"below_1_percent": share < 0.01})


if __name__ == "__main__":
    main()
