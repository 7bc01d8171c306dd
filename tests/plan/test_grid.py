"""The grid of GPU runs: which there are, and which are held out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scripts import script

grid = script("grid_points").grid
predicted = script("plan_points").predicted


@pytest.fixture
def saved(project: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (project / "benchmarks" / "results" / "memory_grid.json").read_text(encoding="utf-8")
    )
    return found


def test_the_grid_is_balanced_wherever_it_is_broken_off() -> None:
    points = grid()
    assert len({p["name"] for p in points}) == len(points) == 48
    for i in range(0, 48, 3):
        assert sum(p["held_out"] for p in points[i : i + 3]) == 1
    held = [p for p in points if p["held_out"]]
    assert {p["model"] for p in held} == {p["model"] for p in points}
    assert min(Counter(p["adapter"] for p in held)[a] for a in (None, "lora", "qlora")) >= 4
    for what in ("recompute", "packed", "keys"):
        assert 0 < sum(bool(p[what]) for p in held) < len(held), what
    assert {p["model"] for p in points[:8]} == {p["model"] for p in points}
    assert {p["length"] for p in points} >= {1024, 2048, 4096, 8192, 16384, 32768}


def test_the_saved_runs_are_those_of_the_grid(saved: dict[str, Any]) -> None:
    assert {n: p["held_out"] for n, p in saved["points"].items()} == {
        p["name"]: p["held_out"] for p in grid()
    }
    assert all(p["left_mib"] < 1 for p in saved["points"].values())
    errors = saved["errors"]
    for name in ("fitted", "held_out"):
        assert errors[name]["memory_error_greatest"] <= errors["limits"]["memory_error"]
        assert errors[name]["memory_greatest_shortfall"] <= errors["limits"]["memory_shortfall"]


@pytest.mark.parametrize(
    "name",
    [
        "llama-1b full 2x2048 keep",
        pytest.param("llama-3b full 2x2048 keep", marks=pytest.mark.slow),
        pytest.param("qwen3-4b full 4x1024 keep fused", marks=pytest.mark.slow),
        pytest.param("gemma-2b lora 4x2048 keep", marks=pytest.mark.slow),
        pytest.param("gemma-7b qlora 4x1024 keep", marks=pytest.mark.slow),
        pytest.param("llama-1b qlora 1x16384 recompute packed", marks=pytest.mark.slow),
    ],
)
def test_the_plan_of_a_measured_run(saved: dict[str, Any], tmp_path: Path, name: str) -> None:
    point = saved["points"][name]
    peak, _ = predicted(point, tmp_path)
    assert peak == pytest.approx(point["peak_gib"], rel=0.01)
    (row,) = [r for r in saved["errors"]["rows"] if r["name"] == name]
    assert peak == pytest.approx(row["predicted_gib"], rel=0.002)
