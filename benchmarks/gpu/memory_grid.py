"""Peak memory and time of a step over a grid of runs on one GPU, and how far the plan is off.

    python benchmarks/gpu/memory_grid.py --out memory_grid.json --seconds 540      # runs what is missing; needs a GPU
    python benchmarks/gpu/memory_grid.py --out memory_grid.json --compare          # the errors; needs none
    python benchmarks/gpu/memory_grid.py --out /tmp/grid.json --tiny               # the same program, tiny, on a CPU

Which runs there are stands in grid_points.py, what one of them does in grid_run.py. They are made by one process after
another run has left nothing in it; a second process has its imports done and waits, so that a run that ends its process, hangs,
or leaves memory behind costs no more than itself. Each result is written at once; runs that stand in the file, an `oom`
too, are not made again. A third of the runs is held out: nothing may be fitted to them.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from grid_points import grid  # noqa: E402
from speed import versions  # noqa: E402

IMPORT_SECONDS = 180
LEFT_MIB = 16
"""Memory that a run may leave behind; a process with more is not used again."""


class Worker:
    """A process that makes runs, one after the other."""

    def __init__(self) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `end`)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "grid_run.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.ready = False

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer, or why there is none."""
        try:
            if not self.ready:
                self.ready = bool(self.answers.get(timeout=IMPORT_SECONDS))
            if not self.ready:
                return {"error": f"the process ended in its imports: {self._said()}", "lost": True}
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.answers.get(timeout=seconds)
        except queue.Empty:
            return {
                "error": f"no result after {seconds:g} s: {self._said()}",
                "lost": True,
                "timed_out": True,
            }
        except OSError as error:
            return {"error": f"the process is gone ({error}): {self._said()}", "lost": True}
        if not line:
            code = self.process.wait()
            return {"error": f"the process ended with {code}: {self._said()}", "lost": True}
        found: dict[str, Any] = json.loads(line)
        return found

    def _said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-1500:]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.errors.close()


def measure(args: argparse.Namespace, result: dict[str, Any]) -> bool:
    """Makes the runs that are missing; whether none is left."""
    began = time.time()
    worker, spare = Worker(), Worker()
    try:
        for point in grid():
            done = result["points"].get(point["name"], {})
            if "peak_gib" in done or "oom" in done or args.only not in point["name"]:
                continue
            left = args.seconds - (time.time() - began)
            if left < 5:
                break
            question = {"point": point, "folder": str(args.work), "tiny": args.tiny}
            found = worker.ask(question, min(args.row_seconds, left))
            if found.get("timed_out") and left <= args.row_seconds:
                break  # not the run's fault: it is made again next time
            lost = found.pop("lost", False)
            result["points"][point["name"]] = point | found
            write(args.out, result)
            shown = {k: v for k, v in found.items() if k not in ("losses", "all_step_seconds", "kernels")}
            print(f"{time.time() - began:6.1f} s  {point['name']}: {json.dumps(shown)}", flush=True)
            if lost or found.get("left_mib", 0) > LEFT_MIB:
                worker.end()
                worker, spare = spare, Worker()
    finally:
        worker.end()
        spare.end()
    missing = [
        p["name"] for p in grid() if not {"peak_gib", "oom"} & result["points"].get(p["name"], {}).keys()
    ]
    print(f"{len(grid()) - len(missing)} of {len(grid())} runs are there, after {time.time() - began:.0f} s.")
    return not missing


def write(file: Path, result: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(file.name + ".new")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    aside.replace(file)


def errors(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan against the measured runs: worst and middle errors, of the runs that may be fitted and of the others.

    Runs with `not_compared` say why they are left out.
    """
    from plan_points import compare  # the plan's imports are for this alone

    measured = [p for p in points if p.get("peak_gib") and not p.get("not_compared")]
    rows = compare(measured)
    held = [p["held_out"] for p in measured]
    found: dict[str, Any] = {"runs": len(rows), "all": summary(rows)}
    for name, wanted in (("fitted", False), ("held_out", True)):
        mine = [row for row, is_held in zip(rows, held, strict=True) if is_held is wanted]
        if mine:
            found[name] = summary(mine)
    found["limits"] = {"memory_error": 0.05, "memory_shortfall": 0.02, "time_error": 0.15}
    found["rows"] = [row | {"held_out": is_held} for row, is_held in zip(rows, held, strict=True)]
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    memory = [r["memory_error"] for r in rows]
    seconds = [r["time_error"] for r in rows if r["time_error"] is not None]
    return {
        "runs": len(rows),
        "memory_error_greatest": max(map(abs, memory)),
        "memory_error_median": statistics.median(map(abs, memory)),
        "memory_greatest_shortfall": max(0.0, -min(memory)),
        "memory_within_5_percent": sum(abs(e) <= 0.05 for e in memory),
        "time_error_greatest": max(map(abs, seconds)),
        "time_error_median": statistics.median(map(abs, seconds)),
        "time_within_15_percent": sum(abs(e) <= 0.15 for e in seconds),
        # What `rest` of gpus.json would have to be multiplied by; to be taken from the fitted runs alone.
        "time_factor": round(statistics.median(1 / (1 + e) for e in seconds), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "axolotl-memory-grid")
    parser.add_argument("--only", default="", help="Runs whose name holds this.")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="End after so long.")
    parser.add_argument("--row-seconds", type=float, default=90, help="Give up a run after so long.")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() else {"versions": versions(), "points": {}}
    if args.compare:
        result["errors"] = errors(list(result["points"].values()))
        write(args.out, result)
        print(json.dumps({k: v for k, v in result["errors"].items() if k != "rows"}, indent=1))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    sys.exit(not measure(args, result))


if __name__ == "__main__":
    main()
