"""What the benchmarks share: the tiny model, made-up rows, timed processes, and the record of a run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
TINY = PROJECT / "tests" / "fixtures" / "tiny-llama3"
PACKAGES = ("axolotl", "torch", "transformers", "peft", "accelerate", "datasets", "pydantic", "click")


def timed(command: Sequence[str], **options: Any) -> tuple[float, subprocess.CompletedProcess[str]]:
    """(wall seconds, the finished process)."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, **options)
    return time.perf_counter() - started, done


def python(*args: str) -> list[str]:
    return [sys.executable, *args]


def axolotl(*args: str | Path) -> list[str]:
    return python("-m", "axolotl", *map(str, args))


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """The least, the middle and the most of repeated timings, in seconds."""
    return {
        "min": round(min(seconds), 4),
        "median": round(statistics.median(seconds), 4),
        "max": round(max(seconds), 4),
        "runs": len(seconds),
    }


def alpaca_rows(count: int, seed: int = 3, longest: int = 60) -> list[dict[str, str]]:
    """Instruction rows of ragged lengths."""
    r = random.Random(seed)
    words = [
        "river",
        "stone",
        "apple",
        "window",
        "garden",
        "boat",
        "lantern",
        "quiet",
        "narrow",
        "bright",
        "carry",
        "find",
        "lose",
        "paint",
    ]

    def text(low: int, high: int) -> str:
        return " ".join(r.choice(words) for _ in range(r.randint(low, high)))

    return [{"instruction": text(3, 12), "input": "", "output": text(1, longest)} for _ in range(count)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def quiet_environment() -> dict[str, str]:
    """This environment without the network, and with the waiting of threads that `axolotl` asks for."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def record(name: str, figures: dict[str, Any], limits: dict[str, bool]) -> None:
    """Prints one JSON object, writes it to results/, and exits with 1 where a limit is missed."""
    versions = {p: importlib.metadata.version(p) for p in PACKAGES}
    machine = {
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "system": platform.system(),
        "load": os.getloadavg()[0],
    }
    whole = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        **figures,
        "limits_met": limits,
        "python": platform.python_version(),
        "versions": versions,
        "machine": machine,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(whole))
    sys.exit(0 if all(limits.values()) else 1)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
