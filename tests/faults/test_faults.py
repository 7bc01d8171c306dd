"""Faults met by the real command; afterwards the same command ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.harness import (
    TESTS,
    Bench,
    damage_newest,
    figures,
    fingerprint,
    fresh,
    kill_at_random,
    steps_logged,
    wait_for,
)
from faults.shim import MARK

FAULTS = 6
TOKENIZER = TESTS / "fixtures" / "tiny-llama3" / "tokenizer.json"
# Of a run's calls that touch output_dir, those after the rehearsal and before the end.
CALLS = {"enospc": (90, 700), "eio": (90, 700), "erofs": (90, 700), "short": (5, 40)}
slow = pytest.mark.slow


def ends_as_undisturbed(bench: Bench, out: str) -> None:
    """The same command again, and the comparison."""
    code = bench.run(out)
    assert code == 0, bench.said(out)[-3000:]
    assert bench.outcome(out).differences == [], bench.said(out)[-3000:]


def rerun_changes_nothing(bench: Bench, out: str) -> None:
    before = fingerprint(bench.folder / out)
    assert bench.run(out) == 0
    assert "is complete" in bench.said(out)
    assert fingerprint(bench.folder / out) == before


@slow
@pytest.mark.parametrize("saving", [False, True], ids=["between saves", "inside a save"])
@pytest.mark.parametrize(
    ("number", "background"),
    [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGTERM, True), (signal.SIGINT, False)],
    ids=["SIGKILL", "SIGKILL save_async", "SIGTERM save_async", "SIGINT"],
)
def test_killed_and_started_again(
    bench: Bench, draw: random.Random, number: signal.Signals, saving: bool, background: bool
) -> None:
    out = f"{number.name}-{saving}-{background}"
    fresh(bench, out)
    bench.keys[out] = {"save_async": background}
    where = [kill_at_random(bench, out, draw, number, saving=saving) for _ in range(FAULTS)]
    print(where)
    ends_as_undisturbed(bench, out)
    rerun_changes_nothing(bench, out)


@slow
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_damaged_checkpoints_are_passed_over(bench: Bench, draw: random.Random, how: str) -> None:
    for i in range(FAULTS):
        out = f"damage-{how}-{i}"
        folder = fresh(bench, out)
        child = bench.start(out)
        lines = draw.randint(9, 20)
        assert wait_for(lambda n=lines, f=folder: steps_logged(f) >= n, child)
        child.send(signal.SIGKILL)
        child.code(30)
        print(damage_newest(folder, draw, how))
        ends_as_undisturbed(bench, out)
        assert "is skipped" in bench.said(out)


@slow
@pytest.mark.parametrize("kind", ["enospc", "eio", "erofs", "short"])
def test_a_disk_that_refuses_for_a_while(bench: Bench, draw: random.Random, kind: str) -> None:
    for i in range(FAULTS):
        out = f"{kind}-{i}"
        folder = fresh(bench, out)
        bench.keys[out] = {"save_async": i % 2 == 1}
        # The first calls make the folder and rehearse; a disk that refuses then is told at once (see below).
        fault = {
            "kind": kind,
            "under": str(folder),
            "at": draw.randint(*CALLS[kind]),
            "times": draw.randint(1, 40),
        }
        print(fault)
        code = bench.run(out, fault)
        assert MARK in bench.said(out)
        if code:
            # Only an end that could not be written may be an error, and one that says what to do.
            assert code == 2 and "could not be written" in bench.said(out), bench.said(out)[-3000:]
        ends_as_undisturbed(bench, out)


@slow
def test_native_writers_that_meet_a_limit(bench: Bench, draw: random.Random) -> None:
    """No file may grow beyond a size: safetensors' and torch's own writers are cut off in the middle of a file."""
    for i in range(FAULTS):
        out = f"fsize-{i}"
        folder = fresh(bench, out)
        bench.keys[out] = {"save_async": i % 2 == 1}
        size = draw.randint(170_000, 350_000)
        # Below the size of the tokenizer's file the rehearsal fails; above it, each save of the optimizer.
        code = bench.run(out, {"kind": "fsize", "bytes": size})
        assert code == (2 if size < TOKENIZER.stat().st_size else 0), bench.said(out)[-3000:]
        said = bench.said(out)
        assert "nothing has been trained yet" in said or "could not be saved" in said
        assert "Traceback" not in said
        assert not [p for p in folder.glob("checkpoint-*") if not (p / "manifest.json").exists()]
        ends_as_undisturbed(bench, out)


@pytest.fixture
def small_disk(bench: Bench) -> Any:
    """small_disk(name, size) → a folder on a file system of that size; a directory with a quota where none can be mounted."""
    mounted: list[Path] = []

    def make(name: str, size: str) -> Path:
        folder = bench.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
            capture_output=True,
            check=False,
        )
        if done.returncode == 0:
            mounted.append(folder)
        return folder

    make.mounted = mounted  # type: ignore[attr-defined]
    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=False)


@slow
def test_a_disk_that_fills_up_and_is_cleared(
    bench: Bench, draw: random.Random, small_disk: Callable[..., Path]
) -> None:
    for i in range(FAULTS):
        disk = small_disk(f"disk-{i}", "6m")
        out = f"disk-{i}/out"
        bench.keys[out] = {"save_async": i % 2 == 1}
        child = bench.start(out)
        filler = disk / "filler"
        run, lines = disk / "out", draw.randint(4, 9)
        assert wait_for(lambda r=run, n=lines: steps_logged(r) >= n, child)
        fill(filler, draw.randint(0, 900_000), bool(small_disk.mounted))  # type: ignore[attr-defined]
        ended = not wait_for(lambda r=run: shutil.disk_usage(r).free < 100_000, child) or disk_stays_full(
            child
        )
        filler.unlink()
        assert ended or child.code(240) is not None
        if child.code(240) != 0:
            assert "could not be written" in bench.said(out), bench.said(out)[-3000:]
        ends_as_undisturbed(bench, out)


def disk_stays_full(child: Any) -> bool:
    """Waits for two seconds in which the run goes on; whether it ended."""
    return child.code(2) is not None


def fill(file: Path, spare: int, bounded: bool) -> None:
    """Takes all room of a disk but `spare` bytes."""
    with file.open("wb", buffering=0) as stream:
        try:
            while bounded:
                stream.write(b"0" * 65536)
        except OSError:
            stream.truncate(max(0, file.stat().st_size - spare))


@slow
def test_a_disk_too_small_is_told_before_the_first_step(
    bench: Bench, small_disk: Callable[..., Path]
) -> None:
    disk = small_disk("tiny-disk", "600k")
    fault = None if small_disk.mounted else {"kind": "fsize", "bytes": 200_000}  # type: ignore[attr-defined]
    assert bench.run("tiny-disk/out", fault) == 2
    said = bench.said("tiny-disk/out")
    assert "nothing has been trained yet" in said
    assert "Traceback" not in said
    assert "step 1/" not in said
    assert not list((disk / "out").glob("checkpoint-*"))


@slow
def test_a_clock_that_jumps(bench: Bench, draw: random.Random) -> None:
    for i in range(FAULTS):
        out = f"clock-{i}"
        folder = fresh(bench, out)
        bench.keys[out] = {"max_time": "1h", "hang_timeout": "5m"}
        fault = {
            "kind": "clock",
            "at": draw.randint(1, 40),
            "times": draw.randint(1, 40),
            "seed": draw.randrange(10**6),
        }
        print(fault)
        assert bench.run(out, fault) == 0, bench.said(out)[-3000:]
        assert MARK in bench.said(out)
        assert bench.outcome(out).differences == []
        assert not (folder / "stacks.txt").exists()
    rerun_changes_nothing(bench, out)


@slow
def test_a_tracker_whose_server_hangs(bench: Bench, draw: random.Random) -> None:
    for i in range(FAULTS):
        out = f"tracker-{i}"
        fresh(bench, out)
        bench.keys[out] = {"use_tensorboard": True, "tracker_timeout": 1}
        fault = {"kind": "tracker", "at": draw.randint(1, 40), "times": 1}
        print(fault)
        assert bench.run(out, fault, timeout=60) == 0, bench.said(out)[-3000:]
        said = bench.said(out)
        assert MARK in said and "The tracker tensorboard has not answered" in said
        assert bench.outcome(out).differences == []


@slow
def test_an_output_dir_that_vanishes(bench: Bench, draw: random.Random) -> None:
    for i in range(FAULTS):
        out = f"vanished-{i}"
        folder = fresh(bench, out)
        child = bench.start(out)
        lines = draw.randint(4, 20)
        assert wait_for(lambda n=lines, f=folder: steps_logged(f) >= n, child)
        shutil.rmtree(folder, ignore_errors=True)
        assert child.code(240) == 0, bench.said(out)[-3000:]
        expected = (bench.undisturbed / "adapter_model.safetensors").read_bytes()
        assert (folder / "adapter_model.safetensors").read_bytes() == expected
        undisturbed = figures(bench.undisturbed / "run.jsonl")
        assert all(undisturbed[key] == value for key, value in figures(folder / "run.jsonl").items())
        rerun_changes_nothing(bench, out)


def test_a_kill_inside_a_save_then_the_same_command(bench: Bench, draw: random.Random) -> None:
    fresh(bench, "quick")
    bench.keys["quick"] = {"save_async": True}
    print(kill_at_random(bench, "quick", draw, signal.SIGKILL, saving=True))
    ends_as_undisturbed(bench, "quick")
    report = (bench.folder / "quick" / "run_report.html").read_text()
    assert '<span id="state">complete</span>' in report and "42 of 42" in report
    rerun_changes_nothing(bench, "quick")


@slow
def test_out_of_memory_goes_on_with_smaller_batches(bench: Bench) -> None:
    fresh(bench, "oom")
    assert bench.run("oom", {"kind": "oom", "at": 8}) == 0, bench.said("oom")[-3000:]
    said = bench.said("oom")
    assert "memory ran out in step 4: each micro batch in 2 parts" in said
    ours, theirs = (figures(bench.folder / out / "run.jsonl") for out in ("oom", "undisturbed"))
    assert ours.keys() == theirs.keys()
    # The same rows, tokens and schedule in every step, whatever the batches were cut into.
    assert all(ours[key][3:6] == theirs[key][3:6] for key in theirs)
    assert all(ours["train", step] == theirs["train", step] for step in (1, 2, 3))


@slow
def test_out_of_memory_then_killed_is_the_run_it_would_have_been(bench: Bench, draw: random.Random) -> None:
    for out in ("oom-whole", "oom-killed"):
        fresh(bench, out)
    assert bench.run("oom-whole", {"kind": "oom", "at": 5}) == 0
    child = bench.start("oom-killed", {"kind": "oom", "at": 5})
    assert wait_for(lambda: steps_logged(bench.folder / "oom-killed") >= 12, child)
    child.send(signal.SIGKILL)
    child.code(30)
    assert bench.run("oom-killed") == 0
    whole, killed = (bench.folder / out for out in ("oom-whole", "oom-killed"))
    assert figures(whole / "run.jsonl") == figures(killed / "run.jsonl")
    assert (whole / "adapter_model.safetensors").read_bytes() == (
        killed / "adapter_model.safetensors"
    ).read_bytes()


@slow
def test_out_of_memory_may_end_the_run(bench: Bench) -> None:
    fresh(bench, "oom-fail")
    assert bench.run("oom-fail", {"kind": "oom", "at": 8}, on_oom="fail") == 2
    said = bench.said("oom-fail")
    assert "memory ran out in step 4, and `on_oom: fail`" in said
    assert "Traceback" not in said


@slow
def test_numbers_that_are_none_end_the_run_with_the_rows(bench: Bench) -> None:
    folder = fresh(bench, "nan")
    # Two micro batches in a step: steps 7, 8 and 9, of which none is in the checkpoint of step 6.
    assert bench.run("nan", {"kind": "nan", "at": 13, "times": 6}) == 1
    said = bench.said("nan")
    assert "Traceback" not in said and "3 times on end, at step 9" in said
    bad = json.loads((folder / "bad_batch.json").read_text())
    assert bad["step"] == 9 and all(row["text"] for each in bad["micro_batches"] for row in each["rows"])
    # Without whatever caused it, the same command goes on from the last checkpoint, and no weight was harmed.
    ends_as_undisturbed(bench, "nan")


@slow
def test_time_that_is_over_ends_in_good_order(bench: Bench) -> None:
    fresh(bench, "time")
    assert bench.run("time", max_time="1s") == 0
    said = bench.said("time")
    assert "Stopped by `max_time" in said and "To continue:" in said
    assert not (bench.folder / "time" / "adapter_model.safetensors").exists()
    ends_as_undisturbed(bench, "time")


@slow
def test_another_optimizer_is_refused_and_another_rate_is_told(bench: Bench) -> None:
    out = "changed"
    fresh(bench, out)
    bench.run(out, max_time="1s")
    assert bench.run(out, optimizer="lion") == 2
    assert '`optimizer` was unset and is "lion"' in bench.said(out)
    assert bench.run(out, learning_rate=0.5, lora_dropout=0.0) == 0
    said = bench.said(out)
    assert "`learning_rate` was 0.003 and is 0.5; training goes on with the saved 0.003" in said
    assert "`lora_dropout` was 0.1 and is 0.0; the new value holds from step" in said
