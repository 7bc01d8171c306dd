"""Everything that is measured on one GPU, in order of value, in one call that ends in time.

    python benchmarks/gpu/all.py --out results-folder --seconds 560     # again, with the same folder: what is missing
    python benchmarks/gpu/all.py --list                                 # the rows, their order and their time
    python benchmarks/gpu/all.py --out /tmp/all --tiny                  # the same rows, tiny, on a CPU

A row is a command of its own. It is begun only where the time that it usually takes is left, is stopped (with all that it
started) where it goes on beyond the end, and is then *unfinished*: speed.py and fp8_validation.py keep what they have
measured and go on from there, the others begin anew. `all.json` is whole at every moment and says of each row: complete,
unfinished, failed or not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from speed import ROOT, card, versions

HERE = Path("benchmarks/gpu")
UNFINISHED = 3
"""The exit code by which a benchmark says that it goes on in the next call."""


@dataclass(frozen=True)
class Row:
    """A command, and the seconds that it usually takes. `{out}`, `{work}`, `{left}` and `{tiny}` are filled in."""

    name: str
    seconds: float
    command: str
    needs: str = ""
    """A package without which it is not run, or `gpu`."""


def speed(row: str, run: str, seconds: float) -> Row:
    command = (
        f"{{python}} {HERE / 'speed.py'} --out {{out}}/speed.json --work {{work}}/speed --seconds {{left}} "
    )
    package = {"unsloth": "unsloth", "liger": "liger_kernel"}.get(run, "")
    return Row(f"{row}: {run}", seconds, f"{command} --rows {row} --runs '{run}' {{tiny}}", package)


def recompute(rows: str, seconds: float, more: str = "") -> Row:
    command = f"{{python}} {HERE / 'recompute.py'} --rows {rows} --out {{out}}/recompute-{rows}.jsonl {more} {{tiny}}"
    return Row(f"recompute: {rows}", seconds, command)


ROWS = (
    speed("lora-8b", "axolotl", 75),
    speed("lora-8b", "unsloth", 90),
    speed("lora-8b", "liger", 60),
    speed("lora-8b", "axolotl plain", 60),
    speed("lora-8b-recompute", "axolotl", 70),
    speed("lora-8b-recompute", "unsloth", 90),
    speed("lora-8b-fp8", "axolotl", 60),
    Row("kernels on the GPU", 240, "{python} -m pytest -q -m gpu tests/gpu", "gpu"),
    recompute("check", 40),
    recompute("usual", 150),
    speed("lora-8b-packed-8k", "axolotl", 70),
    speed("lora-8b-packed-8k", "axolotl plain", 60),
    speed("full-1b", "axolotl", 50),
    speed("full-1b", "liger", 50),
    speed("full-1b", "transformers", 50),
    speed("qlora-8b", "axolotl", 80),
    speed("qlora-8b", "unsloth", 90),
    recompute("long", 180, "--length 300000"),
    Row(
        "fp8 on trained weights",
        180,
        f"{{python}} {HERE / 'fp8_validation.py'} --out {{out}}/fp8-validation.json --work {{work}}/fp8 "
        "--seconds {left} {tiny}",
    ),
    speed("lora-8b", "transformers", 70),
    speed("lora-8b-recompute", "liger", 70),
    speed("lora-8b-recompute", "transformers", 80),
    speed("lora-8b-offload", "axolotl", 70),
    speed("qlora-8b", "liger", 80),
)


def missing(row: Row, gpu: bool) -> str:
    """What a row needs and this machine has not; empty where it can be run."""
    if row.needs == "gpu":
        return "" if gpu else "needs a GPU"
    site = os.environ.get("PEER_SITE") if row.needs == "unsloth" else None
    if not row.needs or importlib.util.find_spec(row.needs) or (site and (Path(site) / row.needs).is_dir()):
        return ""
    return f"{row.needs} is not installed"


def filled(row: Row, out: Path, work: Path, left: float, tiny: bool) -> str:
    """The command of a row; benchmarks that watch their own time are given a little less than there is."""
    return row.command.format(
        python=shlex.quote(sys.executable),
        out=shlex.quote(str(out)),
        work=shlex.quote(str(work)),
        left=round(max(1, left - 15)),
        tiny="--tiny" if tiny else "",
    )


def done(command: str, seconds: float, log: Path) -> tuple[str, int | None]:
    """Runs a command, at most so long; what it started is stopped with it. (its state, its exit code)."""
    with log.open("a", encoding="utf-8") as said:
        said.write(f"$ {command}\n")
        said.flush()
        process = subprocess.Popen(
            command, shell=True, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            for signum, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
                try:
                    os.killpg(process.pid, signum)
                    process.wait(patience)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue
            return "unfinished", None
    return {0: "complete", UNFINISHED: "unfinished"}.get(code, "failed"), code


def write(path: Path, value: Any) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def run(rows: tuple[Row, ...], args: argparse.Namespace, gpu: bool) -> dict[str, Any]:
    """Runs what is missing and fits; returns, and keeps in `{out}/all.json`, the state of every row."""
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.out / "all.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"rows": {}, "starts": []}
    result["starts"].append(
        {"at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "card": card(), "versions": versions()}
    )
    for row in rows:
        result["rows"].setdefault(row.name, {"state": "not run"})
    write(file, result)
    for i, row in enumerate(rows):
        before = result["rows"][row.name]
        if before["state"] == "complete" or (before["state"] == "failed" and not args.again):
            continue
        left = args.seconds - (time.monotonic() - began)
        if lacking := missing(row, gpu):
            before["why"] = lacking
        elif left < (min(row.seconds, 5) if args.tiny else row.seconds):
            before["why"] = f"needs about {row.seconds:.0f} s, {max(0, left):.0f} s were left"
        else:
            at = time.monotonic()
            log = args.out / f"{i:02d}.log"
            # Written before it begins: a call that is cut off leaves the row as unfinished.
            result["rows"][row.name] = {"state": "unfinished", "log": log.name}
            write(file, result)
            state, code = done(filled(row, args.out, args.work, left, args.tiny), max(1.0, left - 5), log)
            seconds = round(time.monotonic() - at, 1)
            result["rows"][row.name] |= {"state": state, "exit": code, "seconds": seconds}
            print(f"{state:<11} {seconds:7.1f} s  {row.name}", flush=True)
        write(file, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results; an earlier call's goes on")
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/axolotl-gpu-all"), help="models and data, kept"
    )
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--again", action="store_true", help="also rows that failed")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    rows = tuple(row for row in ROWS if args.only in row.name)
    if args.list or args.out is None:
        for row in rows:
            print(f"{row.seconds:5.0f} s  {row.name}")
        return
    args.out, args.work = args.out.resolve(), args.work.resolve()
    result = run(rows, args, card() not in ("CPU", ""))
    missing = [name for name, row in result["rows"].items() if row["state"] != "complete"]
    print(
        f"{len(result['rows']) - len(missing)} of {len(result['rows'])} rows complete: {args.out / 'all.json'}"
    )
    sys.exit(1 if any(row["state"] == "failed" for row in result["rows"].values()) else 0)


if __name__ == "__main__":
    main()
