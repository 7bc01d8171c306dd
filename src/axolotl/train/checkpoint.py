"""Checkpoints on disk: written aside and renamed when whole, with a manifest by which a damaged one is recognised.

{output_dir}/run.json                 which run the folder belongs to, and whether it is complete
{output_dir}/checkpoint-N/            everything that step N+1 depends on
    manifest.json                     size and SHA-256 of every other file
    axolotl_state.json                run, plan of the data, token counters (see `RunState`)
{output_dir}/.tmp-checkpoint-N/       one that is being written, or that was when the process died
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl.console import note, warn
from axolotl.errors import CheckpointError, Problem

MANIFEST, STATE, RUN = "manifest.json", "axolotl_state.json", "run.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class RunState:
    """What our own part of a checkpoint holds, beside transformers' optimizer, schedule, random states and steps."""

    run_id: str
    step: int
    total_steps: int
    steps_per_epoch: int
    plan: str
    """Digest of the first epoch's plan: the same rows, lengths and batches give the same digest."""
    seed: int
    ranks: int
    trained_tokens: int
    """Tokens so far that were predicted and not masked."""
    bad_steps: int = 0
    """Steps that were left out because loss or gradient was no number."""
    bad_streak: int = 0
    """Those on end."""
    losses: tuple[float, ...] = ()
    """Of the last steps, by which spikes are recognised."""
    norms: tuple[float, ...] = ()
    """Logarithms of their gradients' norms."""
    spikes: int = 0
    """Steps whose loss or gradient was far above its usual range."""
    spike_streak: int = 0
    """Those on end."""
    split: int = 1
    """Parts in which each micro batch is computed, since the GPU's memory ran out."""
    accumulation: int = 0
    """Micro batches of each rank per step; 0 where it is not known."""


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint's name, or -1."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first, damaged ones included."""
    if not output_dir.is_dir():
        return []
    found = [p for p in output_dir.iterdir() if p.is_dir() and checkpoint_step(p) >= 0]
    return sorted(found, key=checkpoint_step, reverse=True)


def staging(output_dir: Path, step: int) -> Path:
    """The folder beside the final one in which a checkpoint is written."""
    return output_dir / f".tmp-checkpoint-{step}"


def clear_staging(output_dir: Path) -> None:
    """Removes what saves that were cut off have left; one that was about to be replaced comes back."""
    for folder in output_dir.glob(".old-checkpoint-*"):
        final = folder.with_name(folder.name.removeprefix(".old-"))
        if final.exists():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            os.replace(folder, final)
    for folder in output_dir.glob(".tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)


def described(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files that this process has written, which are on the disk then."""
    for name in names:
        _flush(folder / name)
    return _hashed(folder, names)


def publish(written: Path, final: Path, known: dict[str, dict[str, Any]] | None = None) -> None:
    """Turns a folder that is written into a checkpoint: manifest, everything flushed to disk, renamed in one go.

    `known`: files that other processes have looked at already (see `described`).
    """
    done = known or {}
    present = (p for p in sorted(written.rglob("*")) if p.is_file() and p.name != MANIFEST)
    rest = [name for name in (p.relative_to(written).as_posix() for p in present) if name not in done]
    files = dict(sorted((done | described(written, rest)).items()))
    write_json(written / MANIFEST, {"format": 1, "files": files})
    for each in {(written / name).parent for name in files}:
        _flush(each)
    _flush(written)
    replaced = final.with_name(f".old-{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(written, final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def flush_all(folder: Path) -> None:
    """Waits until every file of a folder is on the disk."""
    for file in folder.rglob("*"):
        _flush(file)
    _flush(folder)


def damage(folder: Path, *, thorough: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None for an intact one. Reads every byte; if not thorough, only sizes.

    A checkpoint without a manifest comes from another program; it counts as intact when it has transformers' state.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file() and (folder / STATE).exists():
        return "its manifest is missing"
    if not manifest.is_file():
        return (
            None if (folder / "trainer_state.json").is_file() else "it has neither manifest nor trainer state"
        )
    try:
        expected: dict[str, dict[str, Any]] = json.loads(manifest.read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest cannot be read"
    for name, facts in expected.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != facts["size"]:
            return f"{name} has {size} bytes instead of {facts['size']}"
    if not thorough:
        return None
    try:
        actual = _hashed(folder, list(expected))
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read ({error.strerror})"
    changed = [name for name in expected if actual[name]["sha256"] != expected[name]["sha256"]]
    return f"the content of {changed[0]} has changed" if changed else None


def resumable(folder: Path) -> str | None:
    """Why training cannot go on from a checkpoint, or None."""
    if not (folder / "trainer_state.json").is_file():
        return "it has no trainer state"
    if (
        not (folder / "optimizer.pt").is_file()
        and not any(folder.glob("optimizer*"))
        and not any(folder.glob("global_step*"))
    ):
        return "it holds weights only (save_only_model)"
    return damage(folder)


def newest_intact(output_dir: Path) -> Path | None:
    """The newest checkpoint of the present run that training can continue from; says which it skips, and why."""
    run = read_json(output_dir / RUN).get("run_id")
    for folder in list_checkpoints(output_dir):
        state = read_json(folder / STATE)
        if run is not None and state and state.get("run_id") != run:
            note(f"{folder} belongs to an earlier run; it is left alone.")
            continue
        problem = resumable(folder)
        if problem is None:
            return folder
        warn(f"{folder} is skipped: {problem}.")
    return None


def resume_folder(resume: str | None, auto: bool, output_dir: Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` and `auto_resume_from_checkpoints` lead to; None starts fresh.

    Raises CheckpointError for a named checkpoint that is missing or damaged, and for `true` where there is none.
    """
    if resume and resume.lower() not in ("true", "auto"):
        folder = Path(resume)
        if not folder.is_dir():
            found = [str(p) for p in list_checkpoints(output_dir)]
            remedy = (
                f"There are: {', '.join(found)}." if found else f"There is no checkpoint in {output_dir}."
            )
            raise CheckpointError(_problem(f"`resume_from_checkpoint: {resume}` is not a folder.", remedy))
        problem = resumable(folder)
        if problem:
            remedy = "Name another checkpoint, or set `auto_resume_from_checkpoints: true` to take the newest intact one."
            raise CheckpointError(_problem(f"`{resume}` cannot be resumed from: {problem}.", remedy))
        return folder
    if not resume and not auto:
        return None
    folder_or_none = newest_intact(output_dir)
    if folder_or_none is None and resume:
        raise CheckpointError(
            _problem(
                f"`resume_from_checkpoint: {resume}`: there is no intact checkpoint in {output_dir}.",
                "Delete the line to start from the beginning, or set `auto_resume_from_checkpoints: true` instead.",
            )
        )
    return folder_or_none


def _problem(message: str, remedy: str) -> Problem:
    return Problem(message, remedy, "checkpoint", ("resume_from_checkpoint",))


def rotate(output_dir: Path, keep: int | None, best: str | None, saved: Path) -> None:
    """Deletes the oldest checkpoints of this run beyond `keep`; never the one just saved, never the best.

    Later ones, from before the run went back to an earlier step, do not count and stay: they may be damaged, and must
    not push out a good one.
    """
    if not keep:
        return
    run_id, step = read_json(saved / STATE).get("run_id"), checkpoint_step(saved)
    mine = [
        p
        for p in list_checkpoints(output_dir)
        if checkpoint_step(p) <= step and read_json(p / STATE).get("run_id") == run_id
    ]
    kept = {saved.name} | ({Path(best).name} if best else set())
    for folder in mine:
        if len(kept) < keep:
            kept.add(folder.name)
    for folder in mine:
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def differences(saved: RunState, present: RunState) -> list[str]:
    """What has changed since a checkpoint was saved, in words, for the user who resumes from it."""
    found = []
    if saved.plan != present.plan:
        found.append(
            "the training data or how it is batched has changed; training goes on at the same step of the new order"
        )
    if saved.seed != present.seed:
        found.append(f"seed was {saved.seed} and is {present.seed}; the order of the rows is another one")
    if saved.ranks != present.ranks:
        found.append(
            f"there were {saved.ranks} processes and are {present.ranks}; random numbers will differ"
        )
    if saved.total_steps != present.total_steps:
        found.append(
            f"the run had {saved.total_steps} steps and has {present.total_steps}; the learning rate follows the new course"
        )
    return found


def read_state(folder: Path) -> RunState | None:
    """Our state in a checkpoint; None where another program wrote it."""
    values = read_json(folder / STATE)
    fields = dataclasses.fields(RunState)
    if not {f.name for f in fields if f.default is dataclasses.MISSING} <= set(values):
        return None
    found: dict[str, Any] = {}
    for name in (f.name for f in fields if f.name in values):
        found[name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
    return RunState(**found)


def write_state(folder: Path, state: RunState) -> None:
    """Puts our state into a checkpoint that is being written."""
    write_json(folder / STATE, dataclasses.asdict(state))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing or damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file so that no reader ever sees half of it."""
    aside = file.with_name(f".{file.name}.tmp")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    _flush(aside)
    os.replace(aside, file)


def _hashed(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    # Hashing lets other threads run meanwhile.
    with ThreadPoolExecutor(max_workers=4) as pool:
        hashes = list(pool.map(lambda name: _sha256(folder / name), names))
    return {
        name: {"size": (folder / name).stat().st_size, "sha256": h}
        for name, h in zip(names, hashes, strict=True)
    }


def _sha256(file: Path) -> str:
    sha = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            sha.update(chunk)
    return sha.hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
