"""A run of `axolotl train` on the tiny model, for benchmarks: rows of random tokens, its config, what it logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from measure import TINY, write_rows


def token_rows(file: Path, count: int, length: int) -> Path:
    """So many rows of random tokens, the same ones each time, all of them trained."""
    rows = np.random.default_rng(0).integers(10, 4000, (count, length)).tolist()
    return write_rows(file, [{"input_ids": r, "attention_mask": [1] * length, "labels": r} for r in rows])


def write_config(file: Path, data: Path, out: Path, length: int, batch: int, steps: int, rest: str) -> Path:
    """Without mixed precision; `rest` are further lines of YAML."""
    file.write_text(
        f"base_model: {TINY}\ndatasets:\n  - path: {data}\n    type:\noutput_dir: {out}\n"
        f"dataset_prepared_path: {file.parent}/prepared\nsequence_len: {length}\nmicro_batch_size: {batch}\n"
        f"max_steps: {steps}\nbf16: false\ntf32: false\n{rest}",
        encoding="utf-8",
    )
    return file


def logged(out: Path) -> list[dict[str, Any]]:
    """What a run logged of its steps."""
    lines = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]
