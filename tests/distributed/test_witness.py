"""The witness: it speaks only of a command that was killed for want of memory, and changes nothing for the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from axolotl.config.host import Ram
from axolotl.distributed.witness import TOLD_BY, told_of

GIB = 1 << 30
COMMAND = """
import os, signal, sys, time
from axolotl.config.host import Ram
from axolotl.distributed import witness
began = time.perf_counter()
count = iter([3, int(sys.argv[2])])
witness.oom_kills = lambda: next(count)
witness.ram = lambda: Ram(16 << 30, int(sys.argv[3]), "container")
with witness.witnessed("train"):
    assert time.perf_counter() - began < 0.05
    print("up", flush=True)
    exec(sys.argv[1])
"""


def run(code: str, kills: int = 3, free: int = 8 * GIB, **more: str) -> subprocess.CompletedProcess[str]:
    # As PIPEs are read to their end, this returns when the witness is gone too.
    return subprocess.run(
        [sys.executable, "-c", COMMAND, code, str(kills), str(free)],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | more,
    )


DIE = "os.kill(os.getpid(), signal.SIGKILL)"


def test_an_end_by_the_kernel_is_told() -> None:
    done = run(DIE, kills=4)
    assert done.returncode == -signal.SIGKILL
    assert "The kernel ended `axolotl train` with SIGKILL (exit code -9), for want of memory." in done.stderr
    assert "8.0 GiB of the container's 16.0 GiB" in done.stderr
    assert "[AX1405]" in done.stderr and "--auto-resume-from-checkpoints" in done.stderr


def test_forked_processes_do_not_keep_it_waiting() -> None:
    done = run(f"os.fork() or (time.sleep(3), os._exit(0))\n{DIE}", kills=4)
    assert done.returncode == -signal.SIGKILL and "[AX1405]" in done.stderr


def test_without_a_count_little_memory_speaks() -> None:
    done = run(DIE, free=GIB // 8)
    assert "Something outside ended" in done.stderr and "0.1 GiB of the container's" in done.stderr


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (DIE, -signal.SIGKILL),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("sys.exit(2)", 2),
        ("pass", 0),
        ("witness.farewell(); os._exit(7)", 7),
        ("witness.farewell(); os.execv(sys.executable, [sys.executable, '-c', 'exit(5)'])", 5),
    ],
)
def test_other_ends_are_not_spoken_of(code: str, exit_code: int) -> None:
    done = run(code)
    assert (done.returncode, done.stderr, done.stdout) == (exit_code, "", "up\n")


def test_an_end_in_good_order_is_not_spoken_of_though_others_died() -> None:
    assert run("sys.exit(1)", kills=9).stderr == ""
    assert run("raise SystemExit(0)", free=1).stderr == ""


def test_ctrl_c_leaves_the_witness_alone() -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            COMMAND,
            "try: time.sleep(20)\nexcept KeyboardInterrupt: pass\n" + DIE,
            "4",
            "1",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL and "[AX1405]" in told


def test_processes_that_others_look_after_have_none() -> None:
    for name, value in ((TOLD_BY, "sweep"), ("WORLD_SIZE", "2"), ("AXOLOTL_LAUNCH", "x")):
        assert "[AX1405]" not in run(DIE, kills=4, **{name: value}).stderr


def test_what_it_says_fits_the_verb() -> None:
    now = Ram(GIB, 0, "machine")
    assert told_of(Ram(GIB, GIB, "machine"), 0, "train") is None
    for verb, word in (("preprocess", "`dataset_num_proc: 1`"), ("inference", "a smaller model")):
        told = told_of(now, 0, verb)
        assert told is not None and f"`axolotl {verb}`" in told.message and word in told.remedy


def test_the_command_has_one(tmp_path: Path) -> None:
    """`axolotl train`, killed while it imports its libraries: one child that ignores Ctrl-C, gone with it."""
    file = tmp_path / "config.yml"
    file.write_text("base_model: x\nlearning_rate: 1e-3\ndatasets: [{path: a.jsonl, type: completion}]\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "axolotl", "train", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + 20
    while not (found := children.read_text().split()) and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=20)
    assert len(found) == 1 and process.returncode == -signal.SIGKILL
    assert wait_for_end(int(found[0]))


def wait_for_end(pid: int) -> bool:
    """Whether a process ends within seconds; one that nobody has buried counts as ended."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False
