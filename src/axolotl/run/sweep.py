"""`axolotl train --sweep`: one run after the other, each in a process and a folder of its own, and a table at the end."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl import console
from axolotl.config.host import oom_kills
from axolotl.distributed.exits import explain_exit
from axolotl.distributed.witness import TOLD_BY

TABLE = "sweep.csv"


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its folder, the values that it tries, and the command line that starts it."""

    folder: Path
    values: dict[str, Any]
    arguments: Sequence[str]


@dataclass(frozen=True)
class Outcome:
    """What came of a run; figures are None where the run did not log them."""

    run: Run
    exit_code: int
    seconds: float
    loss: float | None
    eval_loss: float | None


def sweep(runs: Sequence[Run], output_dir: Path) -> list[Outcome]:
    """Runs everything in order; a run that fails does not stop the others, Ctrl-C stops all after the present one.

    The table is written to `{output_dir}/sweep.csv` after each run, best evaluation loss (else loss) first.
    """
    outcomes: list[Outcome] = []
    output_dir.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs, start=1):
        console.note(f"Run {number} of {len(runs)}: {run.folder.name}")
        started, kills = time.monotonic(), oom_kills()
        code = _execute([sys.executable, "-m", "axolotl", "train", *run.arguments])
        why = explain_exit(code, f"run {number}", oom_kills() - kills)
        if why is not None:
            console.show_problem(why)
        loss, eval_loss = _last_figures(run.folder / "run.jsonl")
        outcomes.append(Outcome(run, code, time.monotonic() - started, loss, eval_loss))
        _write_table(outcomes, output_dir / TABLE)
        if code == 128 + signal.SIGINT:
            console.warn(f"Interrupted: {len(runs) - number} runs were not started.")
            break
    for line in table(outcomes):
        console.out(line)
    return outcomes


def _execute(command: Sequence[str]) -> int:
    """Runs a child that gets the terminal's Ctrl-C by itself; this process waits for it to save."""
    child = subprocess.Popen(command, env=os.environ | {TOLD_BY: "sweep"})
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue


def _last_figures(file: Path) -> tuple[float | None, float | None]:
    loss = eval_loss = None
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the run died while it wrote this line
            loss = row.get("loss", loss)
            eval_loss = row.get("eval_loss", eval_loss)
    return loss, eval_loss


def _ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    def worth(o: Outcome) -> tuple[bool, float]:
        figure = o.eval_loss if o.eval_loss is not None else o.loss
        return (o.exit_code != 0, figure if figure is not None else float("inf"))

    return sorted(outcomes, key=worth)


def _write_table(outcomes: Sequence[Outcome], file: Path) -> None:
    keys = list(dict.fromkeys(key for o in outcomes for key in o.run.values))
    with file.open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow([*keys, "eval_loss", "loss", "seconds", "exit_code", "output_dir"])
        for o in _ranked(outcomes):
            values = [o.run.values.get(k) for k in keys]
            rows.writerow([*values, o.eval_loss, o.loss, round(o.seconds, 1), o.exit_code, o.run.folder])


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """The results for people, best first."""
    lines = [f"{'eval loss':>10} {'loss':>10} {'time':>8}  run"]
    for o in _ranked(outcomes):
        figures = [f"{x:.4f}" if x is not None else "-" for x in (o.eval_loss, o.loss)]
        state = "" if o.exit_code == 0 else f"  failed (exit {o.exit_code})"
        lines.append(f"{figures[0]:>10} {figures[1]:>10} {o.seconds:>7.0f}s  {o.run.folder.name}{state}")
    return lines
