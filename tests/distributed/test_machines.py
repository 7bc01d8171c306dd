"""Two machines, simulated by network namespaces: they meet through torchrun's rendezvous, and a cut link ends both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from distributed.hosts import ADDRESSES, simulate, why_not
from distributed.runs import Runs, furthest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]
LIMIT = 300


def _two(
    runs: Runs, name: str, *arguments: str, cut: str | None = None, **environment: str
) -> dict[str, Any]:
    def command(n: int) -> list[str]:
        own = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "a"]
        own += ["--rdzv-endpoint", f"{ADDRESSES[0]}:29511", "--local-addr", ADDRESSES[n]]
        # Both bear the name of the real machine, by which torchrun would find out which of them is meant.
        own += ["--rdzv-conf", f"is_host={1 - n}"]
        return [*runs.command(name, *arguments), "--launcher", "torchrun", "--", *own]

    given = {
        "commands": [command(0), command(1)],
        "folder": str(runs.folder),
        "environment": {"PYTHONPATH": runs.path(), "OMP_NUM_THREADS": "1"} | environment,
        "cut": cut,
        "limit": LIMIT,
    }
    return simulate(given)


def test_two_machines_have_the_losses_of_one_process(tmp_path: Path, tiny_llama3: Path) -> None:
    runs = Runs(tmp_path, tiny_llama3, max_steps=3, save_steps=3)
    runs.run("one")
    # A machine that has done its part may be silent while the first one still writes.
    found = _two(runs, "two", "--gradient-accumulation-steps", "2", AXOLOTL_PEER_TIMEOUT="20")
    assert found["codes"] == [0, 0], found["said"]
    assert found["left"] == []
    assert furthest(runs.losses("one"), runs.losses("two")) < 1e-5
    assert furthest(runs.weights("one"), runs.weights("two")) < 1e-4


def test_a_cut_link_ends_both_machines(tmp_path: Path, tiny_llama3: Path) -> None:
    runs = Runs(tmp_path, tiny_llama3, max_steps=100_000, save_steps=2, val_set_size=0)
    found = _two(runs, "out", cut="out/checkpoint-2", AXOLOTL_PEER_TIMEOUT="8")
    assert all(code not in (0, None) for code in found["codes"]), found
    # The limit, the pauses between looks, and torchrun's own end; half an hour without the watch.
    assert max(found["ends"]) < 90, found
    assert all("is down, or the link to it is cut" in said for said in found["said"]), found["said"]
    assert found["left"] == []
    assert os.path.isdir(tmp_path / "out" / "checkpoint-2")
