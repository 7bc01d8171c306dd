"""What two processes find about sharded models (`parts.py`): loading, saving, optimizers, options."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def test_two_processes_find_everything_in_order(tmp_path: Path, tiny_llama3: Path) -> None:
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(HERE / "parts.py")]
    done = subprocess.run(
        [*run, str(tmp_path), str(tiny_llama3)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    told = [line for line in done.stdout.splitlines() if line.endswith((": passed", ": failed"))]
    assert len(told) == 8, done.stdout + done.stderr
    assert all(line.endswith(": passed") for line in told), done.stdout + done.stderr
