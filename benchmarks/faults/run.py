"""50 kills at random moments, half of them inside a save, and faults of disk, files, clock and tracker; what was lost.

usage: python benchmarks/faults/run.py [kills] [seed]      limit: every run survives, no byte of a result is lost

Each of a few runs is killed several times on end, started again by the same command each time, and at its end compared
with the undisturbed run: logged figures and final weights, bit for bit.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "tests")]

from measure import record  # noqa: E402

from faults.harness import Bench, Warm, damage_newest, fresh, kill_at_random, steps_logged, wait_for  # noqa: E402
from faults.shim import MARK  # noqa: E402

KILLS_PER_RUN = 5


def kills(bench: Bench, draw: random.Random, count: int, number: signal.Signals) -> dict[str, int]:
    """Sends `count` signals to runs, and compares each run at its end."""
    found = {
        "injected": 0,
        "inside_a_save": 0,
        "with_save_async": 0,
        "survived": 0,
        "runs": 0,
        "bytes_lost": 0,
        "figures_lost": 0,
    }
    while found["injected"] < count:
        out = f"{number.name}-{found['runs']}"
        fresh(bench, out)
        bench.keys[out] = {"save_async": bool(found["runs"] % 2)}
        hits = 0
        for _ in range(min(KILLS_PER_RUN, count - found["injected"])):
            where = kill_at_random(bench, out, draw, number, saving=draw.random() < 0.6)
            if where == "ended before":
                break
            hits += 1
            found["inside_a_save"] += where == "inside a save"
        found["injected"] += hits
        found["with_save_async"] += hits if bench.keys[out]["save_async"] else 0
        finish(bench, out, hits, found)
    return found


def finish(bench: Bench, out: str, hits: int, found: dict[str, int]) -> None:
    """Runs the same command to its end and adds up what differs from the undisturbed run."""
    code, outcome = bench.run(out), bench.outcome(out)
    found["runs"] += 1
    found["bytes_lost"] += outcome.bytes_lost
    found["figures_lost"] += len(outcome.differences)
    found["survived"] += hits if code == 0 and not outcome.differences else 0
    if code or outcome.differences:
        print(out, code, outcome.differences, bench.said(out)[-2000:], file=sys.stderr)


def damages(bench: Bench, draw: random.Random, count: int) -> dict[str, int]:
    """Truncated, flipped and missing files of the newest checkpoint."""
    found = {"injected": 0, "survived": 0, "runs": 0, "bytes_lost": 0, "figures_lost": 0}
    for i in range(count):
        out = f"damage-{i}"
        folder = fresh(bench, out)
        child = bench.start(out)
        wait_for(lambda f=folder: steps_logged(f) >= 10, child)
        child.send(signal.SIGKILL)
        child.code(30)
        damage_newest(folder, draw, ("truncated", "flipped", "missing")[i % 3])
        found["injected"] += 1
        finish(bench, out, 1, found)
        if "is skipped" not in bench.said(out):
            raise SystemExit(f"{out}: nobody noticed the damage")
    return found


def refusals(bench: Bench, draw: random.Random, count: int) -> dict[str, int]:
    """Disks that refuse for a while: ENOSPC, EIO, EROFS and short writes."""
    found = {"injected": 0, "survived": 0, "runs": 0, "bytes_lost": 0, "figures_lost": 0}
    for i in range(count):
        out = f"refusal-{i}"
        folder = fresh(bench, out)
        bench.keys[out] = {"save_async": i // 4 % 2 == 1}
        kind = ("enospc", "eio", "erofs", "short")[i % 4]
        calls = draw.randint(5, 40) if kind == "short" else draw.randint(90, 700)
        fault = {
            "kind": kind,
            "under": str(folder),
            "at": calls,
            "times": draw.randint(1, 40),
        }
        bench.run(out, fault)
        if MARK not in bench.said(out):
            raise SystemExit(f"the fault was not met: {fault}")
        found["injected"] += 1
        finish(bench, out, 1, found)
    return found


def jumps(bench: Bench, draw: random.Random, count: int) -> dict[str, int]:
    """Clocks that leap by years while the run goes on."""
    found = {"injected": 0, "survived": 0, "runs": 0, "bytes_lost": 0, "figures_lost": 0}
    for i in range(count):
        out = f"clock-{i}"
        fresh(bench, out)
        fault = {"kind": "clock", "at": draw.randint(1, 40), "times": draw.randint(1, 40), "seed": i}
        bench.run(out, fault)
        if MARK not in bench.said(out):
            raise SystemExit(f"the fault was not met: {fault}")
        found["injected"] += 1
        finish(bench, out, 1, found)
    return found


def silences(bench: Bench, draw: random.Random, count: int) -> dict[str, int]:
    """Trackers whose server takes the connection and never answers."""
    found = {"injected": 0, "survived": 0, "runs": 0, "bytes_lost": 0, "figures_lost": 0}
    for i in range(count):
        out = f"tracker-{i}"
        fresh(bench, out)
        bench.keys[out] = {"use_tensorboard": True, "tracker_timeout": 1}
        bench.run(out, {"kind": "tracker", "at": draw.randint(1, 40)}, timeout=60)
        if MARK not in bench.said(out):
            raise SystemExit(f"{out}: the fault was not met")
        found["injected"] += 1
        finish(bench, out, 1, found)
    return found


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**6)
    draw, began = random.Random(seed), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        warm = Warm()
        bench = Bench(Path(folder), warm)
        bench.reference()
        found = {
            "SIGKILL": kills(bench, draw, count, signal.SIGKILL),
            "SIGTERM": kills(bench, draw, max(count // 8, 1), signal.SIGTERM),
            "SIGINT": kills(bench, draw, max(count // 8, 1), signal.SIGINT),
            "damaged_files": damages(bench, draw, max(count // 8, 1)),
            "refusing_disk": refusals(bench, draw, max(count // 6, 1)),
            "hanging_tracker": silences(bench, draw, max(count // 8, 1)),
            "jumping_clock": jumps(bench, draw, max(count // 8, 1)),
        }
        warm.close()
    totals = {
        key: sum(kind[key] for kind in found.values()) for key in ("injected", "survived", "bytes_lost")
    }
    figures = {"seed": seed, "seconds": round(time.perf_counter() - began), **totals, "faults": found}
    record(
        "faults",
        figures,
        {"all_survived": totals["survived"] == totals["injected"], "nothing_lost": not totals["bytes_lost"]},
    )


if __name__ == "__main__":
    main()
