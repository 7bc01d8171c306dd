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
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def trials(
    bench: Bench, name: str, count: int, inject: Callable[[str, Path, int], None], noticed: str = ""
) -> dict[str, int]:
    """Fresh runs, each with a fault that `inject` gives it (name, folder, number), and then run to its end.

    `noticed`: what a run has to have said by then about its fault.
    """
    found = {"injected": 0, "survived": 0, "runs": 0, "bytes_lost": 0, "figures_lost": 0}
    for i in range(count):
        out = f"{name}-{i}"
        inject(out, fresh(bench, out), i)
        found["injected"] += 1
        finish(bench, out, 1, found)
        if noticed not in bench.said(out):
            raise SystemExit(f"{out}: nobody noticed the damage")
    return found


def meet(bench: Bench, out: str, fault: dict[str, Any], **options: Any) -> None:
    """Runs with a fault of the shim, which has to be met."""
    bench.run(out, fault, **options)
    if MARK not in bench.said(out):
        raise SystemExit(f"{out}: the fault was not met: {fault}")


def damages(bench: Bench, draw: random.Random, count: int) -> dict[str, int]:
    """Truncated, flipped and missing files of the newest checkpoint."""

    def inject(out: str, folder: Path, i: int) -> None:
        child = bench.start(out)
        wait_for(lambda: steps_logged(folder) >= 10, child)
        child.send(signal.SIGKILL)
        child.code(30)
        damage_newest(folder, draw, ("truncated", "flipped", "missing")[i % 3])

    return trials(bench, "damage", count, inject, noticed="is skipped")


def refusals(bench: Bench, draw: random.Random, count: int) -> dict[str, int]:
    """Disks that refuse for a while: ENOSPC, EIO, EROFS and short writes."""

    def inject(out: str, folder: Path, i: int) -> None:
        bench.keys[out] = {"save_async": i // 4 % 2 == 1}
        kind = ("enospc", "eio", "erofs", "short")[i % 4]
        calls = draw.randint(5, 40) if kind == "short" else draw.randint(90, 700)
        meet(bench, out, {"kind": kind, "under": str(folder), "at": calls, "times": draw.randint(1, 40)})

    return trials(bench, "refusal", count, inject)


def jumps(bench: Bench, draw: random.Random, count: int) -> dict[str, int]:
    """Clocks that leap by years while the run goes on."""

    def inject(out: str, _: Path, i: int) -> None:
        meet(
            bench, out, {"kind": "clock", "at": draw.randint(1, 40), "times": draw.randint(1, 40), "seed": i}
        )

    return trials(bench, "clock", count, inject)


def silences(bench: Bench, draw: random.Random, count: int) -> dict[str, int]:
    """Trackers whose server takes the connection and never answers."""

    def inject(out: str, _: Path, i: int) -> None:
        bench.keys[out] = {"use_tensorboard": True, "tracker_timeout": 1}
        meet(bench, out, {"kind": "tracker", "at": draw.randint(1, 40)}, timeout=60)

    return trials(bench, "tracker", count, inject)


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
