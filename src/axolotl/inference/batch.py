"""Many questions from a JSONL file, their answers into another; goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from axolotl.console import note, success
from axolotl.data.json_keys import Decoder
from axolotl.errors import DataError, EnvironmentProblem, Place, Problem, UserError
from axolotl.inference.generate import Sampling, check_room, decode, generate_batch
from axolotl.inference.loading import Loaded
from axolotl.inference.prompting import Prompter

KEY = "row"
_OURS = {"answer", "finish", KEY}
_PROBES = 64
_TOLD = 50  # bad rows that are named one by one
_JSON = {list: "a list", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


def check_rows(source: Path, target: Path, prompter: Prompter, system: str | None = None) -> None:
    """Everything that can be seen without the model. Raises DataError for all bad rows at once, and for the files."""
    if source.resolve() == target.resolve():
        raise DataError(f"`{target}` is the file with the questions.", "Choose another output file.")
    _answered(target)
    rows, problems = _read_rows(source)
    problems += _lay_out(source, rows, prompter, system)[1]
    _refuse(problems)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise EnvironmentProblem(
            f"`--output {target}` cannot be written: {error.strerror or error}.", "Choose another file."
        ) from error


def run_batch(
    loaded: Loaded,
    source: Path,
    target: Path,
    sampling: Sampling,
    *,
    system: str | None = None,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> int:
    """Answers every row of `source` and appends it, with `answer`, to `target`; returns how many were answered now.

    Rows whose number (from 1) stands in `target` already are left alone; a half-written last line is cut off. What
    answers is recorded in `{target}.made_by.json`. `system` goes before the question of rows that have no system message.
    Raises DataError for all unreadable rows at once, before the first answer, and where the answers of `target` came
    from other rows, another model, template or sampling.
    """
    check_rows(source, target, loaded.prompter, system)
    rows, _ = _read_rows(source)
    answered = _answered(target)
    done = set(answered)
    made_by = _made_by(loaded, sampling, system)
    if done:
        _check_same(target, answered, dict(rows), made_by)
    waiting = [(number, row) for number, row in rows if number not in done]
    prompts, _ = _lay_out(source, waiting, loaded.prompter, system)
    _refuse(_too_long(source, prompts, loaded.model, sampling))
    if done:
        note(f"{len(done)} of {len(rows)} rows are answered already.")
    started, tokens = time.perf_counter(), 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(target)
        if not done:
            _record(target).write_text(json.dumps(made_by, indent=2) + "\n", encoding="utf-8")
        with target.open("a", encoding="utf-8") as file:
            for at in range(0, len(waiting), batch_size):
                batch = waiting[at : at + batch_size]
                asked = [prompts[number] for number, _ in batch]
                results = generate_batch(loaded.model, loaded.tokenizer, asked, sampling, loaded.stops)
                for (number, row), (ids, finish) in zip(batch, results, strict=True):
                    answer = {
                        "answer": decode(loaded.tokenizer, ids, loaded.stops),
                        "finish": finish,
                        KEY: number,
                    }
                    file.write(json.dumps({**_beside_answer(row), **answer}, ensure_ascii=False) + "\n")
                    tokens += len(ids)
                file.flush()
                os.fsync(file.fileno())
                if on_batch is not None:
                    on_batch(at + len(batch))
    except OSError as error:
        reason = error.strerror or str(error)
        raise EnvironmentProblem(
            f"`{target}` cannot be written: {reason}.",
            "What is in it stays: the same command goes on from there once it can.",
        ) from error
    seconds = time.perf_counter() - started
    success(
        f"{len(waiting)} rows answered in {seconds:.1f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s): {target}"
    )
    return len(waiting)


def _refuse(problems: list[Problem]) -> None:
    """Raises DataError for the problems; of very many the first are told, and how many more there are."""
    problems = sorted(problems, key=lambda p: p.places[0].line or 0)
    if len(problems) > _TOLD:
        more = Problem(f"and {len(problems) - _TOLD} more rows like these.", "", "data")
        problems = [*problems[:_TOLD], more]
    if problems:
        raise DataError(problems)


def _lay_out(
    source: Path, rows: list[tuple[int, dict[str, Any]]], prompter: Prompter, system: str | None
) -> tuple[dict[int, list[int]], list[Problem]]:
    """(ids of each row's prompt, what is wrong with rows)."""
    prompts: dict[int, list[int]] = {}
    problems: list[Problem] = []
    for number, row in rows:
        try:
            prompts[number] = prompter.row(row, system)
        except UserError as error:
            problems += [
                replace(p, kind="data", places=(Place(str(source), number),)) for p in error.problems
            ]
    return prompts, problems


def _too_long(source: Path, prompts: dict[int, list[int]], model: Any, sampling: Sampling) -> list[Problem]:
    problems: list[Problem] = []
    for number, prompt in prompts.items():
        try:
            check_room(model, prompt, sampling.max_new_tokens)
        except DataError as error:
            problems += [replace(p, places=(Place(str(source), number),)) for p in error.problems]
    return problems


def _beside_answer(row: dict[str, Any]) -> dict[str, Any]:
    """The row's own columns; those named as ours are kept under another name."""
    return {f"{key}_in_row" if key in _OURS else key: value for key, value in row.items()}


def _read_rows(source: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[Problem]]:
    """(rows with their line numbers, lines that are none). Raises DataError where there is no row at all."""
    if not source.is_file():
        what = "is a folder" if source.is_dir() else "does not exist"
        raise DataError(f"`--input {source}` {what}.", "Name a file with one JSON object on each line.")
    rows: list[tuple[int, dict[str, Any]]] = []
    problems: list[Problem] = []
    decoder = Decoder()
    # Only a line feed ends a row: other line separators may stand inside texts.
    for number, line in enumerate(source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line.decode("utf-8"))
            if decoder.twice:
                twice = ", ".join(f"`{key}`" for key in dict.fromkeys(decoder.twice))
                why = f"{twice} stands twice in one object"
                problems.append(_no_row(source, number, why, "Remove one of them."))
                continue
            if isinstance(row, str):
                row = {"prompt": row}
            if not isinstance(row, dict):
                raise ValueError(f"it is {_JSON.get(type(row), 'no object')}")
            rows.append((number, row))
        except UnicodeDecodeError as error:
            why = f"byte {error.start + 1} is not UTF-8"
            problems.append(_no_row(source, number, why, "Save the file as UTF-8."))
        except json.JSONDecodeError as error:
            why = f"{error.msg} at column {error.colno}"
            problems.append(_no_row(source, number, why, "Write one whole JSON object on the line."))
        except ValueError as error:
            problems.append(
                _no_row(source, number, str(error), 'Write an object, such as {"prompt": "…"}, or a text.')
            )
    if not rows and not problems:
        raise DataError(f"`{source}` has no rows.", "Each line is one JSON object.")
    return rows, problems


def _no_row(source: Path, number: int, why: str, remedy: str) -> Problem:
    return Problem(f"this line is no row: {why}.", remedy, "data", (), (Place(str(source), number),))


def _record(target: Path) -> Path:
    return target.with_name(target.name + ".made_by.json")


def _made_by(loaded: Loaded, sampling: Sampling, system: str | None) -> dict[str, Any]:
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
        **({"system message": system} if system else {}),
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
        f"{name} ({_changed(before.get(name), now)})"
        for name, now in {"system message": None, **made_by}.items()
        if name != "model" and before.get(name) != now
    ]
    if before.get("weights") != made_by["weights"] and before.get("model") != made_by["model"]:
        differs.insert(0, f"model ({before.get('model')}, now {made_by['model']})")

    def asked(row: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in row.items() if k not in _OURS}

    other = [
        str(n)
        for n, row in sorted(answered.items())
        if n not in rows or asked(_beside_answer(rows[n])) != asked(row)
    ]
    if other:
        differs.append(f"rows {', '.join(other[:10])}{' ...' if len(other) > 10 else ''}")
    if differs:
        raise DataError(f"`{target}` holds answers of something else: {'; '.join(differs)}.", remedy)


def _changed(before: Any, now: Any) -> str:
    """What differs between two values, in words; of two mappings only the keys that do."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{_word(before)}, now {_word(now)}"
    keys = [key for key in dict.fromkeys((*before, *now)) if before.get(key) != now.get(key)]
    return "; ".join(f"{key} {_word(before.get(key))}, now {_word(now.get(key))}" for key in keys)


def _word(value: Any) -> str:
    return "unset" if value is None else str(value)


def _answered(target: Path) -> dict[int, dict[str, Any]]:
    """The rows that `target` holds whole. Raises DataError, and leaves it alone, where this command did not write it."""
    if target.is_dir():
        raise DataError(f"`--output {target}` is a folder.", "Name a file.")
    if not target.is_file():
        return {}
    whole, _, torn = target.read_bytes().rpartition(b"\n")
    if torn and not _record(target).is_file():
        raise DataError(f"`{target}` was not written by this command.", "Choose another output file.")
    found = {}
    for number, line in enumerate(whole.split(b"\n") if whole else (), start=1):
        try:
            row = json.loads(line.decode("utf-8"))
            found[int(row[KEY])] = row
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"`{target}`, line {number} was not written by this command.", "Choose another output file."
            ) from None
    return found


def _cut_torn_line(target: Path) -> None:
    """Removes what an interruption left of a last line."""
    if target.is_file():
        content = target.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(target, content.rfind(b"\n") + 1)
