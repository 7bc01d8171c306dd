"""The table of several GPUs: rows are resumed, what was not run says so, reaches are judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import script

multi = script("multi")
GEOMETRIES = script("geometries").GEOMETRIES


def _run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> list[str]:
    ran: list[str] = []

    def measure(name: str, row: dict[str, Any], *args: Any, **options: Any) -> dict[str, Any]:
        ran.append(name)
        return {"error": "no"} if "fp8" in name else {"tokens_per_second_per_gpu": 1000.0 / row["gpus"]}

    monkeypatch.setattr(multi, "measure", measure)
    command = ["multi.py", "--out", str(out), "--work", str(out.parent / "w"), "--tiny", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        multi.main()
    return ran


def test_rows_are_resumed_and_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    assert _run(monkeypatch, out, "--rows", "lora-8b-ddp-1,full-8b-fp8-1,lora-8b-ddp-4", "--gpus", "2") == [
        "lora-8b-ddp-1",
        "full-8b-fp8-1",
    ]
    table = json.loads(out.read_text())["rows"]
    assert table.keys() == multi.rows().keys()
    assert table["lora-8b-ddp-4"] == {"not run": "it needs 4 GPUs"}
    assert table["lora-70b-fsdp-4"] == {"not run": "not asked for"}
    # What failed is tried again, what was measured is not.
    again = _run(monkeypatch, out, "--gpus", "2")
    assert "full-8b-fp8-1" in again and "lora-8b-ddp-2" in again and "lora-8b-ddp-1" not in again
    table = json.loads(out.read_text())["rows"]
    assert table["lora-8b-ddp-2"]["scaling"] == 0.5
    assert table["lora-8b-ddp-2"]["reached"] is False
    assert "reached" not in table["lora-8b-ddp-1"]
    _run(monkeypatch, out, "--gpus", "8", "--limit", "0")
    table = json.loads(out.read_text())["rows"]
    assert table["lora-70b-fsdp-8"] == {"not run": "no time was left"}
    assert "tokens_per_second_per_gpu" in table["lora-8b-ddp-2"]


def test_each_row_is_of_a_model_that_is_there_and_fits_its_gpus() -> None:
    for name, row in multi.rows().items():
        heads = GEOMETRIES[row["model"]]["num_attention_heads"]
        shared = row["keys"].get("context_parallel_size", 1) * row["keys"].get("tensor_parallel_size", 1)
        assert row["gpus"] % shared == 0 and heads % shared == 0, name
        assert row.get("base", name) in multi.rows()
