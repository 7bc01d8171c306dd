"""A run that was killed is told of by the next one in its folder; one that ended with a word, or still goes on, is not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from axolotl.train import killed
from axolotl.train.checkpoint import write_json


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(killed, "oom_kills", lambda: 2)
    write_json(tmp_path / "run.json", {"config": "x"} | killed.now_running())
    (tmp_path / "run.jsonl").write_text('{"kind": "train", "step": 120}\n{"kind": "tra')
    return tmp_path


def test_a_run_that_the_kernel_ended(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(killed, "oom_kills", lambda: 3)
    killed.tell_killed(run)
    told = capfd.readouterr().err
    assert "ended without a word after step 120" in told
    assert "the kernel has ended 1 of the processes here for want of memory" in told and "[AX1405]" in told


def test_a_container_that_was_started_anew_counts_from_nothing(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(killed, "_boot", lambda: "another")
    monkeypatch.setattr(killed, "oom_kills", lambda: 9)
    killed.tell_killed(run)
    assert "most often by the kernel" in capfd.readouterr().err


def test_a_run_that_ended_with_a_word(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    killed.leaves(run)
    killed.tell_killed(run)
    assert capfd.readouterr().err == ""
    assert json.loads((run / "run.json").read_text()) == {"config": "x"}


def test_a_run_that_still_goes_on(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1 << 22)
    killed.tell_killed(run)
    killed.tell_killed(run / "elsewhere")
    assert capfd.readouterr().err == ""


def test_somebody_elses_kill_is_not_put_down_to_memory(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    killed.tell_killed(run)
    told = capfd.readouterr().err
    assert "somebody killed it" in told and "AX1405" not in told


def test_the_checkpoint_from_which_the_killed_run_can_go_on_is_named(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for step in (60, 110):
        (run / f"checkpoint-{step}").mkdir()
    write_json(run / "checkpoint-60" / "trainer_state.json", {})
    killed.tell_killed(run)
    assert "`--auto-resume-from-checkpoints` it would go on from checkpoint-60" in capfd.readouterr().err
    killed.tell_killed(run, resumes=True)
    assert "checkpoint-60" not in capfd.readouterr().err
