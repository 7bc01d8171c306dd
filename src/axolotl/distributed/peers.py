"""Whether the other machines of a run are still there.

A machine that is switched off, or a link that is cut, closes no connection: gloo and NCCL would wait for it until
`ddp_timeout`, half an hour by default. Here each machine writes a count into the store where all met, and each
process reads all of them. A machine whose count stands still has left without a word.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count

import torch.distributed as dist

from axolotl.errors import EnvironmentProblem, Problem

SILENCE = 60.0
"""Seconds of silence after which a machine counts as lost; AXOLOTL_PEER_TIMEOUT says otherwise, 0 looks for none."""
LEFT = "left"


def silence_allowed() -> float:
    """Seconds that another machine may be silent."""
    text = os.environ.get("AXOLOTL_PEER_TIMEOUT", "")
    try:
        return float(text) if text else SILENCE
    except ValueError:
        raise EnvironmentProblem(
            f"AXOLOTL_PEER_TIMEOUT is `{text}`.", "It takes seconds; 0 waits for other machines without end."
        ) from None


class PeerWatch:
    """Looks after the machines of a run, in threads of its own, until `leave`."""

    def __init__(
        self,
        store: dist.Store,
        machine: int,
        machines: int,
        *,
        speaks: bool,
        lost: Callable[[EnvironmentProblem], None],
        silence: float = SILENCE,
    ) -> None:
        """`speaks`: this process writes the count of its machine. `lost` is called once, from a thread."""
        self.store, self.machine, self.machines, self.speaks = store, machine, machines, speaks
        self.lost, self.silence = lost, silence
        self.pause = max(0.2, silence / 12)
        now = time.monotonic()
        self.heard: dict[int, tuple[bytes, float]] = {m: (b"", now) for m in range(machines) if m != machine}
        self.answered = now
        self._over = threading.Event()
        self._talk = threading.Thread(target=self._talking, name="peer talk", daemon=True)
        self._watch = threading.Thread(target=self._watching, name="peer watch", daemon=True)
        self._talk.start()
        self._watch.start()

    def leave(self) -> None:
        """Says that this machine's part is done: its silence means nothing from now on."""
        self._over.set()
        self._talk.join(timeout=2 * self.pause)
        if self.speaks and not self._talk.is_alive():
            try:
                self.store.set(_key(self.machine), LEFT)
            except RuntimeError:
                return  # whoever kept the store has left first

    def _talking(self) -> None:
        # Waits for an answer without end where the link is cut: that is what the other thread looks for.
        try:
            for n in count(1):
                if self.speaks:
                    self.store.set(_key(self.machine), str(n))
                for other in self.heard:
                    if self.store.check([_key(other)]):
                        said = self.store.get(_key(other))
                        if said != self.heard[other][0]:
                            self.heard[other] = (said, time.monotonic())
                self.answered = time.monotonic()
                if self._over.wait(self.pause):
                    return
        except RuntimeError:
            return

    def _watching(self) -> None:
        # A thread that could not run itself, in a process that was stopped for example, has seen no silence.
        before = time.monotonic()
        while not self._over.wait(self.pause):
            now = time.monotonic()
            if now - before > 4 * self.pause:
                self.answered = now
                self.heard = {m: (said, now) for m, (said, _) in self.heard.items()}
            before = now
            quiet = [
                m for m, (said, at) in self.heard.items() if said != LEFT.encode() and now - at > self.silence
            ]
            if not quiet and now - self.answered <= self.silence:
                continue
            if self._over.is_set():
                return
            self.lost(EnvironmentProblem(self._problem(quiet)))
            return

    def _problem(self, quiet: list[int]) -> Problem:
        who = f"machine {', '.join(map(str, quiet))}" if quiet else "the machine where all processes met"
        return Problem(
            f"Nothing was heard of {who} for {self.silence:.0f} seconds (this is machine {self.machine} of "
            f"{self.machines}, counted from 0): it is down, or the link to it is cut.",
            "Look at that machine's output and at the network, then run the same command with "
            "`--auto-resume-from-checkpoints`. `axolotl doctor --distributed` measures the links.",
            "environment",
            code="AX1410",
        )


def _key(machine: int) -> str:
    return f"axolotl/machine/{machine}"


def own_connection(store: dist.Store) -> dist.Store:
    """The same store through another connection, whose answers nobody else waits for."""
    # torch's description of the class leaves it out.
    other: dist.Store = store.clone()  # type: ignore[attr-defined]
    other.set_timeout(timedelta(seconds=30))
    return other


STUCK = 10.0
"""Seconds that torch's agent has for noticing that a process of it has ended."""
_LOOK = """
import os, signal, sys, time
child, agent, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
born, dead = time.monotonic(), None
while time.monotonic() < born + 60:
    try:
        with open(f"/proc/{child}/stat") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
    except OSError:
        break
    if int(parent) != agent:
        break
    if state == "Z":
        dead = dead or time.monotonic()
        if time.monotonic() > dead + seconds:
            os.kill(agent, signal.SIGKILL)
            break
    time.sleep(0.3)
"""


def end_stuck_agent() -> None:
    """Has torch's agent ended where it does not notice that this process, which is about to end, has ended. Linux only.

    An agent whose link is cut waits in its store until the kernel gives the connection up, a quarter of an hour, and
    hears no signal. One that lives takes the dead process's exit code at once, whatever it does then.
    """
    if not os.environ.get("TORCHELASTIC_RUN_ID") or not sys.platform.startswith("linux"):
        return
    subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _LOOK, str(os.getpid()), str(os.getppid()), str(STUCK)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
