"""Writes a folder as a whole or not at all: beside its place first, then by one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from axolotl.console import note
from axolotl.errors import EnvironmentProblem, ModelError
from axolotl.model.files import ADAPTER_CONFIG
from axolotl.weights.card import is_ours


def refuse_destination(destination: Path, *sources: Path) -> None:
    """Raises ModelError for a destination that is one of the sources, or holds what cannot be made again from them."""
    target = destination.resolve()
    for source in sources:
        if source.exists() and (target == source.resolve() or target in source.resolve().parents):
            raise ModelError(
                f"`{destination}` is where `{source}` is read from.", "Choose another output folder."
            )
    if destination.is_file():
        raise ModelError(f"`{destination}` is a file.", "Choose another output folder.")
    if not destination.is_dir() or not any(destination.iterdir()) or is_ours(destination):
        return
    if any((destination / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise ModelError(
            f"`{destination}` holds a model that was not merged, consolidated or quantised here; it is not "
            "overwritten.",
            "Choose another output folder, with --output DIR, or delete this one first.",
        )
    raise ModelError(
        f"`{destination}` holds other files and no model; it is not overwritten.",
        "Choose another output folder, with --output DIR, or move the files.",
    )


def need_space(folder: Path, needed: int, what: str) -> None:
    """Raises EnvironmentProblem where the disk that will hold `folder` has fewer than `needed` bytes free."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise EnvironmentProblem(
            f"{what} needs {gigabytes(needed)} at `{folder}`; the disk has {gigabytes(free)} free.",
            "Free some space, or choose a folder on another disk.",
        )


def gigabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


@contextmanager
def written_whole(destination: Path) -> Iterator[Path]:
    """A new folder to write into; when the block ends it takes the place of `destination`, else it is removed.

    An existing folder of that name is replaced, which is told. Raises EnvironmentProblem where nothing can be written.
    """
    part = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"`{destination}` cannot be written: {error.strerror}.", "Choose another output folder."
        ) from None
    try:
        yield part
        _sync(part)
        replace(part, destination)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise EnvironmentProblem(
            f"`{destination}` could not be written: {error.strerror or error}.", "Nothing was left there."
        ) from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _sync(folder: Path) -> None:
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace(part: Path, destination: Path) -> None:
    """Puts `part` in the place of `destination`; at every moment one of the two is whole."""
    old = destination.with_name(f".{destination.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        note(f"`{destination}` existed and is replaced.")
        destination.rename(old)
    part.rename(destination)
    shutil.rmtree(old, ignore_errors=True)
