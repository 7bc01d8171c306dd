"""Many questions from a JSONL file, their answers into another; goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from axolotl.console import note, success
from axolotl.errors import DataError, Problem, UserError
from axolotl.inference.generate import Sampling, decode, generate_batch
from axolotl.inference.loading import Loaded

KEY = "row"
_OURS = {"answer", "finish", KEY}
_PROBES = 64


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

    Rows whose number (from 1) stands in `target` already are left alone; a half-written last line is cut off. What
    answers is recorded in `{target}.made_by.json`. Raises DataError for all unreadable rows at once, before the first
    answer, and where the answers of `target` came from other rows, another model, template or sampling.
    """
    rows = _read_rows(source)
    if source.resolve() == target.resolve():
        raise DataError(f"`{target}` is the file with the questions.", "Choose another output file.")
    answered = _answered(target)
    done = set(answered)
    made_by = _made_by(loaded, sampling)
    if done:
        _check_same(target, answered, dict(rows), made_by)
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
    if not done:
        _record(target).write_text(json.dumps(made_by, indent=2) + "\n", encoding="utf-8")
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
    for number, line in enumerate(source.read_bytes().splitlines(), start=1):
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


def _record(target: Path) -> Path:
    return target.with_name(target.name + ".made_by.json")


def _made_by(loaded: Loaded, sampling: Sampling) -> dict[str, Any]:
    """What decides the answers: a digest of values from every weight, the template, the sampling."""
    weights = hashlib.sha256()
    for name, tensor in (*loaded.model.named_parameters(), *loaded.model.named_buffers()):
        if tensor.is_meta:  # on disk, by the device map
            continue
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // _PROBES)].contiguous().cpu().view(torch.uint8)
        weights.update(name.encode() + picked.numpy().tobytes())
    template = hashlib.sha256(str(loaded.tokenizer.chat_template).encode())
    return {
        "model": loaded.source,
        "weights": weights.hexdigest()[:16],
        "chat template": template.hexdigest()[:16],
        "sampling": vars(sampling),
    }


def _check_same(
    target: Path,
    answered: dict[int, dict[str, Any]],
    rows: dict[int, dict[str, Any]],
    made_by: dict[str, Any],
) -> None:
    """Raises DataError with all that differs from what wrote the answers of `target`. A model that moved is the same."""
    remedy = "Choose another output file, or remove this one to answer all rows anew."
    try:
        before = json.loads(_record(target).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"what wrote `{target}` is not recorded beside it.", remedy) from None
    differs = [
        f"{name} ({before.get(name)}, now {now})"
        for name, now in made_by.items()
        if name != "model" and before.get(name) != now
    ]
    if before.get("weights") != made_by["weights"] and before.get("model") != made_by["model"]:
        differs.insert(0, f"model ({before.get('model')}, now {made_by['model']})")

    def asked(row: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if row is None else {k: v for k, v in row.items() if k not in _OURS}

    other = [str(n) for n, row in sorted(answered.items()) if asked(rows.get(n)) != asked(row)]
    if other:
        differs.append(f"rows {', '.join(other[:10])}{' ...' if len(other) > 10 else ''}")
    if differs:
        raise DataError(f"`{target}` holds answers of something else: {'; '.join(differs)}.", remedy)


def _answered(target: Path) -> dict[int, dict[str, Any]]:
    """The rows that `target` holds whole; what an interruption left of a last line is removed."""
    if not target.is_file():
        return {}
    content = target.read_bytes()
    if content and not content.endswith(b"\n"):
        content = content[: content.rfind(b"\n") + 1]
        with target.open("r+b") as file:
            file.truncate(len(content))
    found = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = json.loads(line)
            found[int(row[KEY])] = row
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"`{target}`, line {number} was not written by this command.", "Choose another output file."
            ) from None
    return found
