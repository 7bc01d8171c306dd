"""Whether the last run in an output_dir was killed, which it could not say itself: told by the next one."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

from axolotl.config.host import oom_kills
from axolotl.console import show_problem
from axolotl.errors import Problem
from axolotl.train.checkpoint import RUN, damage, list_checkpoints, read_json, write_json

_RUNS = "running"


def now_running() -> dict[str, Any]:
    """For run.json at the start: which process writes it, and how many the kernel has ended for want of memory so far."""
    return {_RUNS: {"host": platform.node(), "pid": os.getpid(), "boot": _boot(), "oom_kills": oom_kills()}}


def leaves(output_dir: Path) -> None:
    """Notes in run.json that the run has ended with a word, whichever; a disk that refuses it is left alone."""
    with suppress(OSError):
        run = read_json(output_dir / RUN)
        if run.pop(_RUNS, None) is not None:
            write_json(output_dir / RUN, run)


def tell_killed(output_dir: Path, *, resumes: bool = False) -> None:
    """Tells of a run in this folder that ended without a word. Nothing is said where it still goes on.

    `resumes`: this run goes on from a checkpoint, so nobody has to be told that it could.
    """
    was = read_json(output_dir / RUN).get(_RUNS)
    if not isinstance(was, dict):
        return
    same = was.get("boot") == _boot() and was.get("host") == platform.node()
    if same and Path(f"/proc/{was.get('pid')}").exists() and was.get("pid") != os.getpid():
        return
    risen = oom_kills() - int(was.get("oom_kills") or 0) if same else 0
    why = "killed (most often by the kernel, for want of memory), or the machine went down"
    if risen > 0:
        why = (
            f"the kernel has ended {risen} of the processes here for want of memory since then (exit code -9)"
        )
    elif same:
        why = "somebody killed it, or it crashed inside a library"
    step = _last_step(output_dir / "run.jsonl")
    after = f" after step {step}" if step else ""
    memory = risen > 0 or not same
    advice = []
    whole = next((each for each in list_checkpoints(output_dir) if not damage(each, thorough=False)), None)
    if whole is not None and not resumes:
        advice.append(
            f"This run begins anew; with `--auto-resume-from-checkpoints` it would go on from {whole.name}."
        )
    if memory:
        advice.append("Where memory was short: more RAM, `dataset_num_proc: 1`, or a smaller model.")
    show_problem(
        Problem(
            f"The last run in {output_dir} ended without a word{after}: {why}.",
            " ".join(advice),
            "warning",
            code="AX1405" if memory else "",
        )
    )


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _last_step(file: Path) -> int:
    with suppress(OSError, ValueError):
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 65536))
            lines = stream.read().splitlines()
        for line in reversed(lines):
            with suppress(ValueError, AttributeError):
                if step := json.loads(line).get("step"):
                    return int(step)
    return 0
