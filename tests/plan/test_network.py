"""`axolotl doctor --distributed`: what is found about environment and links, and a measurement that hangs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from axolotl.distributed.diagnose import Links
from axolotl.plan.network import look_at_environment, look_at_links
from axolotl.run import doctor_distributed

INTERFACES = ["lo", "eth0", "eth1", "ib0"]


@pytest.mark.parametrize(
    ("given", "state", "words"),
    [
        ({"NCCL_P2P_DISABLE": "1"}, "note", "through RAM"),
        ({"NCCL_P2P_DISABLE": "0"}, "ok", ""),
        ({"NCCL_IB_DISABLE": "1"}, "note", "InfiniBand"),
        ({"NCCL_NVLS_ENABLE": "1"}, "note", "multicast"),
        ({"NCCL_NVLS_ENABLE": "0"}, "ok", ""),
        ({"NCCL_SOCKET_IFNAME": "eth"}, "ok", ""),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, "problem", "eth0, eth1"),
        ({"NCCL_SOCKET_IFNAME": "=ib0"}, "ok", ""),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, "ok", ""),
        ({"NCCL_SOCKET_IFNAME": "^lo,e,ib"}, "problem", "interfaces"),
        ({"GLOO_SOCKET_IFNAME": "wlan0"}, "problem", "wlan0"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "ok", ""),
        ({"MASTER_ADDR": "no-such-machine.invalid"}, "problem", "no-such-machine"),
        ({"MASTER_PORT": "70000"}, "problem", "70000"),
        ({"RANK": "0"}, "problem", "left behind"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "ok", ""),
    ],
)
def test_the_environment_is_looked_at(given: dict[str, str], state: str, words: str) -> None:
    first, *found = look_at_environment({**given, "HOME": "secret"}, INTERFACES)
    assert all(f"{k}={v}" in first.text for k, v in given.items()) and "secret" not in first.text
    if state == "ok":
        assert found == []
    else:
        (one,) = found
        assert one.state == state and words in one.text and one.remedy


def test_links_are_judged_beside_their_like() -> None:
    pairs = [(0, 1, 300.0), (2, 3, 290.0), (0, 2, 10.0), (0, 3, 11.0), (1, 2, 2.0), (1, 3, 10.5)]
    links = Links(4, "nccl", ["a", "a", "b", "b"], 64, 200.0, pairs, ["all-reduce over all"], [(0, 1)])
    found = list(look_at_links(links))
    assert [f.text for f in found if f.state == "problem" and f.topic == "link"] == [
        "ranks 1 and 2 (a to b): 2.00 GB/s, the middle link has 10.25"
    ]
    assert any("wrong numbers" in f.text and f.state == "problem" for f in found)
    assert any("GPUs 0-1 cannot read" in f.text for f in found)
    assert "4 processes on 2 machines" in found[0].text
    # On a CPU a slow moment is no broken cable.
    calm = Links(4, "gloo", ["a", "a", "b", "b"], 4, 2.0, pairs)
    assert {f.state for f in look_at_links(calm)} == {"ok", "note"}


@pytest.mark.slow
def test_the_command_measures_and_ends_where_one_hangs(
    axolotl: Callable[..., CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    done = axolotl("doctor", "--distributed", "--num-processes", "3", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is True
    assert [f["text"][:13] for f in found["findings"] if f["topic"] == "link"] == [
        "ranks 0 and 1",
        "ranks 0 and 2",
        "ranks 1 and 2",
    ]
    done = axolotl("doctor", "--timeout", "9", cwd=tmp_path)
    assert done.returncode == 2 and "--distributed" in done.stderr
    stalls = tmp_path / "stalls.py"
    stalls.write_text(
        "import sys, time\nfrom axolotl.distributed import diagnose\n"
        "def stuck(*args): time.sleep(1000)\n"
        "if diagnose.world().rank == 1:\n    diagnose._all_reduce = stuck\n"
        "diagnose.main(*sys.argv[1:])\n"
    )
    monkeypatch.setattr(doctor_distributed, "COMMAND", [str(stalls)])
    monkeypatch.setattr(doctor_distributed, "interfaces_here", lambda: ["lo"])
    began = time.monotonic()
    assert doctor_distributed.doctor_distributed(2, seconds=20) == 1
    assert time.monotonic() - began < 150
    said = capfd.readouterr()
    assert "rank 1 in an all-reduce over all" in said.out
    assert "in stuck" in said.err
