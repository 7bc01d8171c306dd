"""From the `path` of a dataset to the local files that hold its rows."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from axolotl.data.columnar import ArrowReader, ParquetReader, saved_files, saved_splits
from axolotl.data.json_readers import JsonLinesReader, JsonReader
from axolotl.data.readers import COMPRESSIONS, CsvReader, Reader, TextReader
from axolotl.data.splits import Part
from axolotl.errors import ConfigError, DataError, Place, Problem

if TYPE_CHECKING:
    from axolotl.config.data import DatasetEntry

Open = Callable[[Path, str, str | None], Reader]

TYPES: dict[str, Open] = {
    "json": lambda path, label, field: JsonReader(path, label, field),
    "jsonl": lambda path, label, field: JsonLinesReader(path, label),
    "csv": lambda path, label, field: CsvReader(path, label),
    "tsv": lambda path, label, field: CsvReader(path, label, "\t"),
    "parquet": lambda path, label, field: ParquetReader(path, label),
    "arrow": lambda path, label, field: ArrowReader(path, label),
    "text": lambda path, label, field: TextReader(path, label),
}
ENDINGS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
}
_SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
_NOT_DATA = {"state.json", "dataset_info.json", "dataset_dict.json", "dataset_infos.json"}


def local_readers(
    entry: DatasetEntry,
    place: Place,
    parts: list[Part],
    split_is_set: bool,
    path: Path | None = None,
    shown: str | None = None,
) -> tuple[list[Reader], list[Part]]:
    """Readers of the files that an entry names, and the slices of their rows that it wants.

    `path` and `shown` replace the entry's path, where it was fetched from elsewhere. Raises DataError for what is not
    there, ConfigError for a `ds_type` or `split` that does not fit.
    """
    _check_type(entry, place)
    names = sorted({p.name for p in parts})
    if len(names) > 1:
        raise ConfigError(
            Problem(
                f"the split `{entry.split}` joins several splits, which only works for datasets of the Hub.",
                "Write one entry for each split.",
                places=(place,),
            )
        )
    wanted = names[0]
    root = path or Path(entry.path or "").expanduser()
    shown = shown or str(entry.path)
    files = _files(entry, root, place, wanted, split_is_set)

    def label(file: Path) -> str:
        if path is None:
            return str(file)
        return shown if file == path else f"{shown.rstrip('/')}/{file.relative_to(path)}"

    return [open_file(file, label(file), entry) for file in files], parts


def open_file(path: Path, label: str, entry: DatasetEntry) -> Reader:
    """The reader of one file: by ds_type, else by its name, else as JSON."""
    # `path: json` with `data_files` names the type where others name the folder
    named = entry.ds_type or (entry.path if entry.data_files is not None and entry.path in TYPES else None)
    kind = named.lower() if named else type_of(path) or "json"
    return TYPES[kind](path, label, entry.field)


def type_of(path: Path) -> str | None:
    """The type of a data file by its name, without the ending of a compression; None where the name does not tell."""
    if path.name in _NOT_DATA or path.name.startswith("."):
        return None
    ending = path.suffix.lower()
    if ending in COMPRESSIONS:
        ending = path.with_suffix("").suffix.lower()
    return ENDINGS.get(ending)


def _check_type(entry: DatasetEntry, place: Place) -> None:
    if entry.ds_type and entry.ds_type.lower() not in TYPES:
        near = difflib.get_close_matches(entry.ds_type.lower(), TYPES, n=1)
        hint = f"Did you mean `{near[0]}`? " if near else ""
        raise ConfigError(
            Problem(
                f"`{entry.ds_type}` is not a known `ds_type`.",
                f"{hint}Known: {', '.join(TYPES)}.",
                places=(place,),
            )
        )


def _files(entry: DatasetEntry, root: Path, place: Place, split: str, split_is_set: bool) -> list[Path]:
    if entry.data_files is not None:
        base = root if root.is_dir() else root.parent if root.is_file() else Path()
        named = entry.data_files
        if isinstance(named, dict):
            return _patterns(_of_split(named, split, split_is_set, place), base, place)
        found = _patterns([named] if isinstance(named, str) else named, base, place)
    elif root.is_dir():
        return _folder(entry, root, place, split, split_is_set)
    elif root.exists():
        found = [root]
    elif glob.has_magic(str(root)):
        found = _matches(str(root))
        if not found:
            raise DataError(_missing(root, place, f"no file matches `{root}`."))
    else:
        raise DataError(_missing(root, place))
    if not split_is_set or split == "train":
        return found
    chosen = [f for f in found if _is_of_split(f.name, split)]
    if not chosen:
        what = f"`{root}` is one file and has" if found == [root] else "the files named here have"
        raise ConfigError(
            Problem(
                f"{what} no split `{split}`.",
                "Remove `split`, or write `train`, with a slice if you want a part: `train[:10%]`.",
                places=(place,),
            )
        )
    return chosen


def _of_split(named: dict[str, str | list[str]], split: str, split_is_set: bool, place: Place) -> list[str]:
    """The files that a mapping of splits names for one of them."""
    if split not in named and not split_is_set:
        split = "train"
    if split not in named:
        raise ConfigError(
            Problem(
                f"`data_files` names no files for the split `{split}`.",
                f"It names: {', '.join(named)}. Set `split`.",
                places=(place,),
            )
        )
    files = named[split]
    return [files] if isinstance(files, str) else files


def _matches(pattern: str) -> list[Path]:
    return [f for f in sorted(map(Path, glob.glob(pattern, recursive=True))) if f.is_file()]


def _patterns(patterns: list[str], base: Path, place: Place) -> list[Path]:
    """The files that names and patterns stand for, counted from a folder. Raises DataError for all that match none."""
    found: list[Path] = []
    problems: list[Problem] = []
    for pattern in patterns:
        file = base / Path(pattern).expanduser()
        matches = [file] if file.is_file() else _matches(str(file))
        if not matches:
            problems.append(_missing(file, place))
        found += matches
    if problems:
        raise DataError(problems)
    return list(dict.fromkeys(found))


def _folder(entry: DatasetEntry, root: Path, place: Place, split: str, split_is_set: bool) -> list[Path]:
    saved = saved_splits(root)
    if saved is not None:
        if split not in saved and not split_is_set and "train" in saved:
            split = "train"
        if split not in saved:
            raise _no_split(root, split, saved, place)
        root = root / split
    files = saved_files(root)
    if files is not None:
        return files
    kind = entry.ds_type.lower() if entry.ds_type else None
    everything = sorted(
        f
        for f in root.rglob("*")
        if f.is_file() and not any(p.startswith(".") for p in f.relative_to(root).parts)
    )
    known = [f for f in everything if type_of(f) is not None]
    if kind:
        known = [f for f in known if type_of(f) == kind or (kind == "json" and type_of(f) == "jsonl")]
    if not known:
        names = ", ".join(f.name for f in everything[:5]) or "nothing"
        raise DataError(
            Problem(
                f"the folder `{root}` holds no data files{f' of type {kind}' if kind else ''}.",
                f"It holds: {names}. Data files end in {', '.join(ENDINGS)}; others are named with `data_files` and "
                "`ds_type`.",
                "path",
                places=(place,),
            )
        )
    splits = {
        name: [f for f in known if _is_of_split(str(f.relative_to(root)), name)] for name in _SPLIT_WORDS
    }
    labelled = {f for files in splits.values() for f in files}
    splits["train"] = [f for f in known if f in splits["train"] or f not in labelled]
    if split not in splits and (root / split).is_dir():
        splits[split] = [f for f in known if f.relative_to(root).parts[0] == split]
    if not splits.get(split) and not split_is_set:
        split = "train"
    chosen = splits.get(split)
    if not chosen:
        raise _no_split(root, split, [name for name, files in splits.items() if files], place)
    return chosen


def _is_of_split(name: str, split: str) -> bool:
    words = _SPLIT_WORDS.get(split, re.escape(split))
    return re.search(rf"(?<![a-z])({words})(?![a-z])", name.lower()) is not None


def _no_split(root: Path, split: str, have: list[str], place: Place) -> ConfigError:
    return ConfigError(
        Problem(
            f"`{root}` has no split `{split}`.", f"It has: {', '.join(have)}. Set `split`.", places=(place,)
        )
    )


def _missing(path: Path, place: Place, message: str | None = None) -> Problem:
    """The problem of a path that does not exist, with the names that are near it."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    if folder != path.parent and not glob.has_magic(str(path.parent)):
        remedy = f"The folder `{path.parent}` does not exist."
    else:
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
        near = near or [n for n in names if type_of(Path(n)) is not None][:3]
        remedy = (
            f"Did you mean {' or '.join(f'`{folder / n}`' for n in near)}?" if near else "Correct the path."
        )
    relative = "" if path.is_absolute() else f" Paths count from the current folder, {Path.cwd()}."
    return Problem(message or f"`{path}` does not exist.", remedy + relative, "path", places=(place,))
