"""Starting processes and looking after them, with processes that only sleep, fail or wait for a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from axolotl.distributed import failure
from axolotl.distributed.launch import AGENT, environment_of, launcher_command, run_processes
from axolotl.errors import ConfigError, EnvironmentProblem
from axolotl.run.launch import _asked_of_accelerate, _remember, process_count
from distributed.runs import eventually

SLEEP = "import os, time; open(f'{os.environ[\"RANK\"]}.pid', 'w').write(str(os.getpid())); time.sleep(100)"
# Ends as a training process does: after a signal it saves, and then ends with 128 and its number.
SAVES = """
import os, signal, sys, time
from axolotl.distributed.failure import end_with_parent
rank = os.environ["RANK"]
def save(number, frame):
    time.sleep(0.3)
    open(f"{rank}.saved", "a").write(f"{number}\\n")
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
end_with_parent()
open(f"{rank}.pid", "w").write(str(os.getpid()))
time.sleep(100)
"""
SUPERVISE = """
import sys
from axolotl.distributed.launch import run_processes
sys.exit(run_processes(["-c", sys.argv[1]], 2))
"""


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def _started(folder: Path) -> list[int]:
    files = [folder / f"{rank}.pid" for rank in (0, 1)]
    eventually(lambda: all(f.exists() and f.read_text() for f in files))
    return [int(f.read_text()) for f in files]


def _supervised(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, code], cwd=folder, stderr=subprocess.PIPE, text=True
    )


def test_each_process_knows_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    say = "import os; open(os.environ['RANK'], 'w').write(' '.join(os.environ[k] for k in "
    say += "('WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'NCCL_NVLS_ENABLE')))"
    assert run_processes(["-c", say], 3) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [f"3 {r} 3 0" for r in range(3)]


def test_they_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = (
        "import torch.distributed as d; d.init_process_group('gloo'); d.barrier(); d.destroy_process_group()"
    )
    assert run_processes(["-c", code], 2) == 0


def test_what_the_user_has_set_counts_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    monkeypatch.delenv("OMP_NUM_THREADS")
    found = environment_of(1, 2, 1234, tmp_path)
    assert found["NCCL_NVLS_ENABLE"] == "1"
    assert int(found["OMP_NUM_THREADS"]) >= 1
    assert (found["RANK"], found["MASTER_PORT"]) == ("1", "1234")


def test_one_that_fails_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    code = (
        f"import os, sys, time\nif os.environ['RANK'] == '1':\n    time.sleep(0.5)\n    sys.exit(7)\n{SLEEP}"
    )
    assert run_processes(["-c", code], 2) == 7
    assert time.monotonic() - began < 20
    assert not _alive(int((tmp_path / "0.pid").read_text()))
    assert "rank 1 ended with exit code 7" in capsys.readouterr().err


def test_one_that_is_killed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = f"import os\nif os.environ['RANK'] == '0':\n    os.kill(os.getpid(), 9)\n{SLEEP}"
    assert run_processes(["-c", code], 2) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "the process of rank 0 with SIGKILL (exit code -9)" in said
    assert "for want of memory" in said and "AX1405" in said and "--auto-resume-from-checkpoints" in said


@pytest.mark.parametrize(
    ("code", "words"),
    [("os.kill(os.getpid(), 11)", "crashed (SIGSEGV)"), ("os.kill(os.getpid(), 14)", "SIGALRM")],
)
def test_other_deaths_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_processes(["-c", f"import os\nif os.environ['RANK'] == '1':\n    {code}\n{SLEEP}"], 2) == 1
    said = capsys.readouterr().err
    assert words in said and "rank 1" in said


def test_an_error_of_all_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = (
        "import sys\nfrom axolotl.distributed.failure import tell_failure\n"
        "from axolotl.errors import DataError\nsys.exit(tell_failure(DataError('`x` is wrong')))"
    )
    assert run_processes(["-c", code], 2) == 2
    said = capfd.readouterr().err
    assert said.count("`x` is wrong") == 1
    assert said.count("On rank ") == 1
    assert "exit code" not in said


def test_who_only_lost_another_lets_that_one_speak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = (
        "import os, sys, time\nfrom axolotl.distributed.failure import tell_failure\n"
        "if os.environ['RANK'] == '0':\n    sys.exit(tell_failure(RuntimeError('Connection closed by peer')))\n"
        "time.sleep(1)\nsys.exit(tell_failure(RuntimeError('the cause')))"
    )
    assert run_processes(["-c", code], 2) == 1
    said = capfd.readouterr().err
    assert "the cause" in said and "On rank 1" in said
    assert "closed by peer" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_all_once(tmp_path: Path, number: signal.Signals) -> None:
    process = _supervised(SAVES, tmp_path)
    pids = _started(tmp_path)
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    passed_on = signal.SIGTERM if number == signal.SIGHUP else number
    assert [(tmp_path / f"{rank}.saved").read_text() for rank in (0, 1)] == [f"{int(passed_on)}\n"] * 2
    assert not any(map(_alive, pids))


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    process = _supervised(
        SAVES.replace("time.sleep(0.3)", "open(f'{rank}.heard', 'w').close(); time.sleep(90)"), tmp_path
    )
    pids = _started(tmp_path)
    process.send_signal(signal.SIGINT)
    eventually(lambda: all((tmp_path / f"{rank}.heard").exists() for rank in (0, 1)))
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert not any(map(_alive, pids))


def test_none_outlives_the_one_that_started_them(tmp_path: Path) -> None:
    process = _supervised(SAVES, tmp_path)
    pids = _started(tmp_path)
    process.kill()
    process.wait(10)
    eventually(lambda: not any(map(_alive, pids)), 20)
    assert [(tmp_path / f"{rank}.saved").read_text() for rank in (0, 1)] == ["15\n"] * 2


def _config(**model: Any) -> Any:
    keys = {"device_map": None, "max_memory": None, "gpu_memory_limit": None, "device": None} | model
    return SimpleNamespace(model=SimpleNamespace(**keys))


def test_each_gpu_gets_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_count(_config(), None, None) == 1
    assert process_count(_config(), None, 3) == 3
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert process_count(_config(), None, None) == 4
    assert process_count(_config(), "python", None) == 1
    assert process_count(_config(), "torchrun", None) == 4
    assert process_count(_config(device_map="auto"), None, None) == 1
    assert process_count(_config(), None, 2) == 2
    with pytest.raises(EnvironmentProblem, match="only 4 GPUs"):
        process_count(_config(), None, 5)


def test_a_launcher_gets_its_options_before_the_module() -> None:
    torchrun = launcher_command("torchrun", ["--nnodes", "2"], ["c.yml"], 4)
    assert torchrun[1:] == [
        "-m",
        "axolotl.distributed.agent",
        "torch.distributed.run",
        "--nproc-per-node=4",
        "--nnodes",
        "2",
        "-m",
        "axolotl.cli.train",
        "c.yml",
    ]
    assert "--nproc-per-node=4" not in launcher_command("torchrun", ["--nproc_per_node=2"], ["c.yml"], 4)
    accelerate = launcher_command("accelerate", [], ["c.yml"], 4)
    assert accelerate[4:] == ["--multi_gpu", "--num_processes=4", "-m", "axolotl.cli.train", "c.yml"]
    assert "--num_processes=4" not in launcher_command("accelerate", ["--config_file", "a"], ["c.yml"], 4)


def test_the_word_of_a_launch_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(failure.LAUNCH, str(tmp_path))
    assert failure.first_to_fail(ConfigError("a"))
    assert not failure.first_to_fail(ConfigError("b"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert failure.first_to_fail(ConfigError("c"))
    monkeypatch.delenv(failure.LAUNCH)
    mine = failure.word_file()
    assert str(os.getppid()) in mine.name
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    assert failure.word_file() != mine
    assert failure.launch_name() == "job"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert failure.first_to_fail(ConfigError("d"))


def test_the_processes_know_how_they_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(failure.OPTIONS, raising=False)
    _remember(None, 2, [])
    assert failure.launch_options() == ["--num-processes", "2"]
    _remember("torchrun", None, ["--nnodes", "2"])
    assert failure.launch_options() == ["--launcher", "torchrun", "--", "--nnodes", "2"]
    _remember(None, None, [])
    assert failure.launch_options() == []


@pytest.mark.parametrize(
    ("own", "asked"),
    [(["--num_processes", "2", "--cpu"], 2), (["--num_processes=4"], 4), (["-n", "1"], 0), ([], 0)],
)
def test_accelerate_that_starts_one_process_for_several_is_noticed(
    monkeypatch: pytest.MonkeyPatch, own: list[str], asked: int
) -> None:
    monkeypatch.setenv(failure.OPTIONS, "")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    _remember("accelerate", None, own)
    assert _asked_of_accelerate() == 0, "the process that starts accelerate"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert _asked_of_accelerate() == asked


@pytest.mark.slow
def test_torchrun_tells_of_a_process_that_the_system_ended(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, signal\nif os.environ['RANK'] == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [*AGENT, "torch.distributed.run", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "the process of rank 1 with SIGKILL" in done.stderr and "[AX1405]" in done.stderr
    assert "for want of memory" in done.stderr
    # What speaks for itself is told by torchrun alone.
    script.write_text("raise SystemExit(3)\n")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "AX1405" not in done.stderr and "exitcode  : 3" in done.stderr
