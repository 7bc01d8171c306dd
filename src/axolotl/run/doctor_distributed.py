"""`axolotl doctor --distributed`: are processes, machines and links ready, before a config gets the blame?"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from axolotl import console
from axolotl.distributed.diagnose import Links, measure
from axolotl.distributed.failure import among_several
from axolotl.distributed.launch import run_processes
from axolotl.distributed.world import world
from axolotl.errors import EnvironmentProblem, Problem
from axolotl.plan.machine import Finding
from axolotl.plan.network import interfaces_here, look_at_environment, look_at_limits, look_at_links
from axolotl.run.doctor import SICK, line_of

COMMAND = ["-m", "axolotl.distributed.diagnose"]
SECONDS = 60
"""Time for all measurements, by default."""


def doctor_distributed(processes: int | None = None, *, seconds: int = SECONDS, as_json: bool = False) -> int:
    """Shows what was found; 0 where nothing is wrong, else 1. Ends after about `seconds`, whatever hangs.

    Under a launcher it is one process of that run, and the first one shows. Otherwise it starts a process for each GPU,
    or two on a CPU. Raises EnvironmentProblem for more processes than GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = [*look_at_environment(os.environ, interfaces_here()), *look_at_limits(gpus)]
    if among_several():
        links = _as_one_of_several(seconds)
        return _show([*here, *look_at_links(links)], as_json) if world().is_main else 0
    if processes and gpus and processes > gpus:
        raise EnvironmentProblem(
            Problem(
                f"`--num-processes {processes}`: only {gpus} GPUs are visible here.",
                f"Write `--num-processes {gpus}` or less.",
                "environment",
            )
        )
    count = processes or gpus or 2
    if any(f.state == "problem" and f.topic == "environment" for f in here):
        here.append(Finding("links", "note", "not measured: mend the environment first"))
    elif count < 2:
        here.append(Finding("links", "note", "not measured: there is one GPU"))
    else:
        here += measured(count, seconds)
    return _show(here, as_json)


def _as_one_of_several(seconds: int) -> Links:
    faulthandler.dump_traceback_later(seconds, exit=True)
    links = measure(lambda text: None, seconds)
    faulthandler.cancel_dump_traceback_later()
    return links


def measured(count: int, seconds: int) -> list[Finding]:
    """Findings of so many processes of this machine that measure their links; a hang is a finding too."""
    folder = Path(tempfile.mkdtemp(prefix="axolotl-doctor-"))
    try:
        code = run_processes([*COMMAND, str(folder), str(seconds)], count)
        file = folder / "links.json"
        if code == 0 and file.exists():
            return list(look_at_links(Links(**json.loads(file.read_text()))))
        return [Finding("links", "problem", _how_far(folder, count, seconds), _REMEDY)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_REMEDY = "What every thread was doing stands above. NCCL_DEBUG=INFO says more; try NCCL_P2P_DISABLE=1 to see whether NVLink or PCIe is the cause."


def _how_far(folder: Path, count: int, seconds: int) -> str:
    stages = []
    for rank in range(count):
        stage = "starting"
        with contextlib.suppress(OSError):
            stage = (folder / f"stage-{rank}").read_text()
        stages.append(
            f"rank {rank} while {stage}" if not stage.startswith("an ") else f"rank {rank} in {stage}"
        )
    return f"the processes did not get through within {seconds} s, or died: {', '.join(stages)}"


def _show(found: Sequence[Finding], as_json: bool) -> int:
    sick = any(f.state == "problem" for f in found)
    if as_json:
        console.out(
            json.dumps({"ok": not sick, "findings": [f.as_dict() for f in found]}, ensure_ascii=False)
        )
    else:
        for finding in found:
            console.out(line_of(finding))
    return SICK if sick else 0
