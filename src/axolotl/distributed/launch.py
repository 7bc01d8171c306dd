"""Starts the processes of a run on this machine and looks after them until all have ended.

torch's elastic agent does the same for several machines and restarts (`--launcher torchrun`). It is not used by default
because it gives processes that are saving a checkpoint 30 seconds, and those that hang in a collective after another
one has died as long.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore

from axolotl import console
from axolotl.config.host import oom_kills
from axolotl.distributed.exits import explain_exit
from axolotl.distributed.failure import LAUNCH
from axolotl.distributed.witness import farewell
from axolotl.errors import Problem

GRACE = 1.0  # seconds between the death of one process and the end of all
LINGER = 120.0  # seconds for the others, when one has ended after a signal
POLL = 0.1
MODULE = ["-m", "axolotl.cli.train"]
AGENT = [sys.executable, "-m", "axolotl.distributed.agent"]
_FORWARDED = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
)


def environment_of(rank: int, processes: int, port: int, folder: Path) -> dict[str, str]:
    """What a process has to know: its place, where the others meet, and settings that the user may set otherwise."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {"OMP_NUM_THREADS": str(max(1, cpus // processes)), **defaults_for_processes()}
    if Path("/sys/class/net/lo").exists():
        # Within one machine no name of it has to be found out, which many machines do not know.
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    return (
        defaults
        | dict(os.environ)
        | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            LAUNCH: str(folder),
        }
    )


def defaults_for_processes() -> dict[str, str]:
    """Settings of every process that we start, whoever its launcher is; what the user has set counts more."""
    # NVLink multicast reserves memory that other programs of the machine may hold, and then NCCL does not start.
    return {"NCCL_NVLS_ENABLE": "0"}


@dataclass
class _Group:
    """The processes of a run, by rank."""

    processes: list[subprocess.Popen[bytes]]
    asked: list[signal.Signals] = field(default_factory=list)

    def take(self, number: int, frame: FrameType | None) -> None:
        """Passes a signal on. The second Ctrl-C ends everything at once."""
        received = signal.Signals(number)
        if received is signal.SIGINT and signal.SIGINT in self.asked:
            self.kill()
        self.asked.append(received)
        # A terminal that is closed is no reason to lose the steps since the last checkpoint.
        self.send(signal.SIGTERM if received.name == "SIGHUP" else received)

    def send(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes over the signals that are passed on."""
        before = {number: signal.signal(number, self.take) for number in _FORWARDED}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    def wait(self) -> int | None:
        """Until all have ended well (None), or one has not: its rank. None too where all end because of a signal."""
        ended: float | None = None
        while True:
            codes = [process.poll() for process in self.processes]
            for rank, code in enumerate(codes):
                if code not in (None, 0) and not (self.asked and _is_answer(code)):
                    return rank
            if all(code is not None for code in codes):
                return None
            if self.asked and any(code is not None for code in codes):
                ended = ended or time.monotonic()
                if time.monotonic() - ended > LINGER:
                    return next(rank for rank, code in enumerate(codes) if code is None)
            time.sleep(POLL)


def _is_answer(code: int | None) -> bool:
    """Whether a process ended as one does that a signal asked to."""
    numbers = {int(s) for s in _FORWARDED}
    return code is not None and (code - 128 in numbers or -code in numbers)


def run_processes(command: Sequence[str], processes: int) -> int:
    """Runs `command` (without the interpreter) in so many processes of this machine; returns the exit code.

    0 where all ended well; the exit code of the first that failed, and then all others are ended within about a second;
    128 and the number of the signal that this process got and passed on. An error is told by the process that had it;
    one that died without a word is told of here. No process is left when this returns; if this process is killed
    itself, the others save and end.
    """
    folder = Path(tempfile.mkdtemp(prefix="axolotl-launch-"))
    # Kept here, so that the place where all meet does not go with the first of them that dies.
    store = TCPStore(
        "127.0.0.1", 0, None, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5)
    )
    group, kills = _Group([]), oom_kills()
    try:
        with group.listening():
            for rank in range(processes):
                group.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        env=environment_of(rank, processes, store.port, folder),
                        # The terminal's Ctrl-C would reach them a second time.
                        start_new_session=True,
                    )
                )
            if group.asked:
                group.send(group.asked[0])
            failed = group.wait()
            if failed is not None:
                return _end_all(group, failed, folder, kills)
            if group.asked:
                return max((p.returncode or 0 for p in group.processes), default=0) and 128 + group.asked[0]
            return 0
    finally:
        group.kill()
        for process in group.processes:
            process.wait()
        del store
        shutil.rmtree(folder, ignore_errors=True)


def _end_all(group: _Group, failed: int, folder: Path, kills: int) -> int:
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and any(p.poll() is None for p in group.processes):
        time.sleep(POLL)
    spoken = any(folder.glob("failed-*"))
    group.kill()
    code = group.processes[failed].wait()
    if group.asked.count(signal.SIGINT) > 1:
        console.note("Stopped at once.")
        return 128 + signal.SIGINT
    if not spoken:
        console.show_problem(_last_words(failed, code, oom_kills() - kills))
    return code if 0 < code < 128 else 1


def _last_words(rank: int, code: int, kernel_kills: int) -> Problem:
    """What is told of a process that told nothing itself."""
    who = f"the process of rank {rank}"
    told = explain_exit(code, who, kernel_kills)
    if told is None:
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        told = Problem(f"{who} {how}.", kind="environment")
    message = told.message[0].upper() + told.message[1:]
    return dataclasses.replace(told, message=f"{message} All others were ended.")


def launcher_command(
    launcher: str, own: Sequence[str], arguments: Sequence[str], processes: int
) -> list[str]:
    """The command of torchrun or accelerate that trains; `own` are the user's options for it, `arguments` those of train.

    The number of processes per machine is added where `own` does not say it.
    """
    counts = {
        "torchrun": ("--nproc-per-node", "--nproc_per_node"),
        "accelerate": ("--num_processes", "--num-processes", "-n", "--config_file"),
    }[launcher]
    options = list(own)
    named = any(option.partition("=")[0] in counts for option in own)
    if not named:
        options = [f"{counts[0]}={processes}", *options]
    if launcher == "torchrun":
        return [*AGENT, "torch.distributed.run", *options, *MODULE, *arguments]
    if not named and processes > 1 and "--multi_gpu" not in options and "--cpu" not in options:
        options.insert(0, "--multi_gpu")
    return [*AGENT, "accelerate.commands.launch", *options, *MODULE, *arguments]


def become(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Turns this process into another program, which then gets all signals."""
    farewell()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], list(command), dict(environment))
