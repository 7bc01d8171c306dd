"""Machines of a run that fall silent, with a store in this process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from axolotl.distributed.peers import PeerWatch, own_connection, silence_allowed
from axolotl.errors import EnvironmentProblem

SILENCE = 1.5


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore(
        "127.0.0.1", 0, None, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )


def _watch(store: dist.Store, machine: int, machines: int, told: list[EnvironmentProblem]) -> PeerWatch:
    return PeerWatch(own_connection(store), machine, machines, speaks=True, lost=told.append, silence=SILENCE)


def test_who_talks_is_left_in_peace_and_who_says_goodbye_is_not_missed(store: dist.TCPStore) -> None:
    told: list[EnvironmentProblem] = []
    first, second = _watch(store, 0, 2, told), _watch(store, 1, 2, told)
    time.sleep(2 * SILENCE)
    assert told == []
    second.leave()
    time.sleep(2 * SILENCE)
    assert told == []
    first.leave()


def test_who_falls_silent_is_named_once(store: dist.TCPStore) -> None:
    told: list[EnvironmentProblem] = []
    first, second, third = (_watch(store, n, 3, told if n == 0 else []) for n in range(3))
    time.sleep(SILENCE / 2)
    second._over.set()  # it talks no more, and says no goodbye
    end = time.monotonic() + 20
    while not told and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(SILENCE)
    (error,) = told
    assert "machine 1 for" in str(error)
    assert error.problems[0].code == "AX1410"
    for watch in (first, third):
        watch.leave()


def test_the_limit_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    assert silence_allowed() == 60
    monkeypatch.setenv("AXOLOTL_PEER_TIMEOUT", "7.5")
    assert silence_allowed() == 7.5
    monkeypatch.setenv("AXOLOTL_PEER_TIMEOUT", "soon")
    with pytest.raises(EnvironmentProblem, match="soon"):
        silence_allowed()


AGENT = """
import os, subprocess, sys, time
os.environ["TORCHELASTIC_RUN_ID"] = "a"
child = subprocess.Popen([sys.executable, "-c",
    "from axolotl.distributed import peers; peers.STUCK = 1; peers.end_stuck_agent()"])
print("started", flush=True)
if sys.argv[1] == "looks":
    child.wait()
    time.sleep(4)
    sys.exit(3)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("does", "code"), [("looks", 3), ("hangs", -9)])
def test_only_an_agent_that_does_not_look_is_ended(tmp_path: Path, does: str, code: int) -> None:
    agent = subprocess.Popen([sys.executable, "-c", AGENT, does], cwd=tmp_path, stdout=subprocess.DEVNULL)
    timer = threading.Timer(50, agent.kill)
    timer.start()
    assert agent.wait() == code
    timer.cancel()
