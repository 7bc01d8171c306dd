"""The benchmarks of one GPU as programs: rows that fit are run, what is cut off goes on, and the stated test decides."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts import BENCHMARKS, script

calls = script("all")
fp8 = script("fp8_validation")
PY = "{python} -c "


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(calls, "card", lambda: "CPU")

    def call(rows: tuple[Any, ...], seconds: float = 60.0, again: bool = False) -> dict[str, Any]:
        args = argparse.Namespace(
            out=tmp_path / "out", work=tmp_path / "work", seconds=seconds, again=again, tiny=False
        )
        rows_of = calls.run(rows, args, gpu=False)["rows"]
        assert json.loads((tmp_path / "out" / "all.json").read_text())["rows"] == rows_of
        return dict(rows_of)

    return call


def test_every_row_ends_as_what_it_was(call: Any, tmp_path: Path) -> None:
    rows = (
        calls.Row("good", 1, PY + "\"print('said')\""),
        calls.Row("bad", 1, PY + '"raise SystemExit(1)"'),
        calls.Row("half", 1, PY + '"raise SystemExit(3)"'),
        calls.Row("gpu", 1, "false", "gpu"),
        calls.Row("peer", 1, "false", "no_such_package"),
        calls.Row("long", 1000, "false"),
    )
    found = call(rows)
    states = {name: row["state"] for name, row in found.items()}
    assert states == {"good": "complete", "bad": "failed", "half": "unfinished"} | dict.fromkeys(
        ("gpu", "peer", "long"), "not run"
    )
    assert found["gpu"]["why"] == "needs a GPU" and "no_such_package" in found["peer"]["why"]
    assert "needs about 1000 s" in found["long"]["why"]
    assert (tmp_path / "out" / "00.log").read_text().endswith("said\n")
    # The next call does what is missing, and nothing twice.
    mended = (
        calls.Row("good", 1, "false"),
        calls.Row("bad", 1, "true"),
        calls.Row("half", 1, "true"),
    )
    found = call(mended)
    assert [found[n]["state"] for n in ("good", "bad", "half")] == ["complete", "failed", "complete"]
    assert call(mended, again=True)["bad"]["state"] == "complete"


def test_a_row_beyond_the_end_is_stopped_with_its_children(call: Any, tmp_path: Path) -> None:
    child = f"(sleep 4; touch {tmp_path}/late) & sleep 60"
    began = time.monotonic()
    found = call((calls.Row("slow", 1, child), calls.Row("next", 5, "true")), seconds=7)
    assert time.monotonic() - began < 12
    assert found["slow"]["state"] == "unfinished" and found["next"]["state"] == "not run"
    time.sleep(max(0.0, 4.5 - (time.monotonic() - began)))
    assert not (tmp_path / "late").exists()


def test_each_row_is_a_command_of_ours() -> None:
    names = [row.name for row in calls.ROWS]
    assert len(set(names)) == len(names)
    kinds = script("speed").RUNS
    assert {n for n in names if ": " in n and not n.startswith("recompute:")} <= {
        f"{row}: {run}" for row, runs in kinds.items() for run in runs
    }
    for row in calls.ROWS:
        words = calls.filled(row, Path("/o"), Path("/w"), 100.0, True).split()
        assert words[0] == sys.executable and "{" not in " ".join(words)
        if words[1].endswith(".py"):
            assert (BENCHMARKS.parent / words[1]).is_file() and "--tiny" in words


def test_the_stated_test() -> None:
    draw = random.Random(0)
    near = [1 + draw.gauss(0, 0.002) for _ in range(6)]
    same = fp8.verdict(near, [x + draw.gauss(0, 0.001) for x in near], "relative", 0.02)
    assert same["verdict"] == "not distinguishable" and same["p_within_bound"] == pytest.approx(1 / 64)
    worse = fp8.verdict(near, [x + 0.1 for x in near], "relative", 0.02)
    assert worse["verdict"] == "different" and worse["p_permutation"] == pytest.approx(2 / 924)
    wild = fp8.verdict(near, [x + draw.gauss(0, 0.2) for x in near], "relative", 0.02)
    assert wild["verdict"] == "undecided"
    # Four seeds cannot show it, however equal they are.
    assert fp8.verdict(near[:4], near[:4], "relative", 0.02)["verdict"] == "undecided"
    # A difference that is certain and within the bound is neither.
    assert fp8.verdict(near, [x + 0.015 for x in near], "relative", 0.02)["verdict"] == "undecided"


def test_what_is_asked_was_never_read() -> None:
    files = [(f"{i}.py", f"def f{i}(self, a, b={i}):\n    'Does {i}.'\n" + "#" * 300) for i in range(200)]
    parts = fp8.divided(files, most=20_000)
    names = {heap: {name for name, _ in found} for heap, found in parts.items()}
    assert not names["asked"] & names["task"] and not names["read"] & (names["asked"] | names["task"])
    assert sum(len(text) for _, text in parts["read"]) <= 20_000
    source, answer = fp8.questions(parts["asked"], 500)[0]
    assert answer == "a, b | Does" and source.startswith("def f0(self, a, b=0):")


@pytest.mark.slow
def test_the_validation_from_end_to_end(tmp_path: Path) -> None:
    file = tmp_path / "fp8.json"
    command = [sys.executable, str(BENCHMARKS / "gpu" / "fp8_validation.py"), "--tiny", "--seeds", "1"]
    command += ["--work", str(tmp_path / "w"), "--out", str(file)]
    # No time: nothing is begun, and the file says what is next.
    early = subprocess.run([*command, "--seconds", "-1"], capture_output=True, text=True, check=False)
    assert early.returncode == 3, early.stderr
    assert "are left" in json.loads(file.read_text())["next"]
    whole = subprocess.run([*command, "--seconds", "900"], capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr
    result = json.loads(file.read_text())
    assert result["state"] == "complete" and set(result["runs"]) == {"bf16-1", "fp8-1"}
    assert result["base"]["last_loss"] < result["base"]["first_loss"]
    # The 8-bit base was really there: not the same numbers, though nearly.
    plain, small = (result["runs"][name]["first_loss"] for name in ("bf16-1", "fp8-1"))
    assert plain != small and small == pytest.approx(plain, rel=0.05)
    again = subprocess.run([*command, "--seconds", "60"], capture_output=True, text=True, check=False)
    assert again.returncode == 0 and json.loads(file.read_text())["runs"] == result["runs"]
