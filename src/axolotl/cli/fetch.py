"""`axolotl fetch`: copies what is shipped with the package into the user's folder. No network."""

from __future__ import annotations

import difflib
import filecmp
import shutil
from collections.abc import Iterator
from pathlib import Path

from axolotl import console
from axolotl.errors import EnvironmentProblem, UserError
from axolotl.registry import PACKAGE_ROOT

FOLDERS = ("examples", "deepspeed_configs")


def shipped(what: str) -> Path:
    """The folder that holds `what`: inside the package, or beside it in a clone. Raises EnvironmentProblem."""
    clone = PACKAGE_ROOT.parent.parent
    for folder in (PACKAGE_ROOT / "assets" / what, clone / what):
        if folder.is_dir() and (folder.parent.name == "assets" or (clone / "pyproject.toml").is_file()):
            return folder
    raise EnvironmentProblem(f"This installation holds no `{what}`.", "Install the package again.")


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            yield file.relative_to(folder)


def fetch(what: str, dest: Path | None = None, *, force: bool = False) -> Path:
    """Copies the shipped folder `what` to `dest` (default: ./`what`) and returns that path.

    A file that is there already and differs is the user's own: it is kept and named, unless `force`. Raises UserError
    for an unknown name and EnvironmentProblem where the destination cannot be written.
    """
    if what not in FOLDERS:
        near = difflib.get_close_matches(what, FOLDERS, n=1)
        hint = f"Did you mean `{near[0]}`? " if near else ""
        raise UserError(f"There is no `{what}` to fetch.", f"{hint}Known: {', '.join(FOLDERS)}.")
    source, target = shipped(what), dest or Path(what)
    if target.resolve() == source.resolve():
        console.note(f"{target}: this is the clone's own folder; nothing to copy.")
        return target
    copied, same, kept = 0, 0, []
    try:
        for name in _files(source):
            file = target / name
            if file.exists() and filecmp.cmp(source / name, file, shallow=False):
                same += 1
            elif file.exists() and not force:
                kept.append(file)
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, file)
                copied += 1
    except OSError as error:
        raise EnvironmentProblem(
            f"`{target}` cannot be written: {error.strerror or error}.", "Choose another folder with --dest."
        ) from error
    console.success(f"{target}: {copied} files copied, {same} already there.")
    for file in kept:
        console.warn(f"{file} differs from the shipped one and was kept; --force overwrites it.")
    return target
