"""Many questions from a JSONL file, their answers into another; goes on where it stopped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from axolotl.console import note, success
from axolotl.errors import DataError, Problem, UserError
from axolotl.inference.generate import Sampling, decode, generate_batch
from axolotl.inference.loading import Loaded

KEY = "row"


def run_batch(
    loaded: Loaded,
    source: Path,
    target: Path,
    sampling: Sampling,
    *,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> int:
    """Answers every row of `source` and appends it, with `answer`, to `target`; returns how many were answered now.

    Rows whose number (from 1) stands in `target` already are left alone; a half-written last line is cut off. Raises
    DataError for all unreadable rows at once, before the first answer.
    """
    rows = _read_rows(source)
    if source.resolve() == target.resolve():
        raise DataError(f"`{target}` is the file with the questions.", "Choose another output file.")
    done = _answered(target)
    waiting = [(number, row) for number, row in rows if number not in done]
    prompts, problems = {}, []
    for number, row in waiting:
        try:
            prompts[number] = loaded.prompter.row(row)
        except UserError as error:
            problems += [
                Problem(f"`{source}`, line {number}: {p.message}", p.remedy, "data") for p in error.problems
            ]
    if problems:
        raise DataError(problems[:20])
    if done:
        note(f"{len(done)} of {len(rows)} rows are answered already.")
    started, tokens = time.perf_counter(), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", encoding="utf-8") as file:
        for at in range(0, len(waiting), batch_size):
            batch = waiting[at : at + batch_size]
            results = generate_batch(
                loaded.model,
                loaded.tokenizer,
                [prompts[number] for number, _ in batch],
                sampling,
                loaded.stops,
            )
            for (number, row), (ids, finish) in zip(batch, results, strict=True):
                answer = {
                    "answer": decode(loaded.tokenizer, ids, loaded.stops),
                    "finish": finish,
                    KEY: number,
                }
                file.write(json.dumps({**row, **answer}, ensure_ascii=False) + "\n")
                tokens += len(ids)
            file.flush()
            os.fsync(file.fileno())
            if on_batch is not None:
                on_batch(at + len(batch))
    seconds = time.perf_counter() - started
    success(
        f"{len(waiting)} rows answered in {seconds:.1f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s): {target}"
    )
    return len(waiting)


def _read_rows(source: Path) -> list[tuple[int, dict[str, Any]]]:
    if not source.is_file():
        raise DataError(f"`--input {source}` does not exist.", "Check the path.")
    rows, problems = [], []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if isinstance(row, str):
                row = {"prompt": row}
            if not isinstance(row, dict):
                raise ValueError(f"{type(row).__name__} instead of an object")
            rows.append((number, row))
        except ValueError as error:
            problems.append(
                Problem(f"`{source}`, line {number} is not a JSON row: {error}", "Correct it.", "data")
            )
    if problems:
        raise DataError(problems[:20])
    if not rows:
        raise DataError(f"`{source}` has no rows.", "Each line is one JSON object.")
    return rows


def _answered(target: Path) -> set[int]:
    """Numbers of the rows that `target` holds whole; what an interruption left of a last line is removed."""
    if not target.is_file():
        return set()
    content = target.read_bytes()
    if content and not content.endswith(b"\n"):
        content = content[: content.rfind(b"\n") + 1]
        with target.open("r+b") as file:
            file.truncate(len(content))
    found = set()
    for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
        try:
            found.add(int(json.loads(line)[KEY]))
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"`{target}`, line {number} was not written by this command.", "Choose another output file."
            ) from None
    return found
