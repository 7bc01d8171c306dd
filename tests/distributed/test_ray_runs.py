"""`use_ray: true` with two workers on CPUs: the losses and weights of one process, an error told once, going on."""

from __future__ import annotations

from pathlib import Path

import pytest

from axolotl.train.checkpoint import damage
from distributed.runs import Runs, furthest

pytestmark = [pytest.mark.slow, pytest.mark.extras]
LONG = 900


def test_ray_trains_tells_errors_once_and_goes_on(
    tmp_path: Path, tiny_llama3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs = Runs(tmp_path, tiny_llama3)
    runs.run("one", timeout=LONG)
    ray = ("--use-ray", "true", "--ray-num-workers", "2", "--gradient-accumulation-steps", "2")
    plugin = ("--plugins", "[accident]")
    said = runs.run("ray", *ray, *plugin, code=1, timeout=LONG, ACCIDENT="raise:1:5")
    assert said.count("ArithmeticError: on purpose") == 1
    assert "On rank 1:" in said
    assert damage(tmp_path / "ray" / "checkpoint-3") is None
    # The accident happens once.
    again = ("--auto-resume-from-checkpoints", "true")
    runs.run("ray", *ray, *plugin, *again, timeout=LONG, ACCIDENT="raise:1:5")
    assert furthest(runs.losses("one"), runs.losses("ray")) < 1e-5
    assert furthest(runs.weights("one"), runs.weights("ray")) < 1e-4
