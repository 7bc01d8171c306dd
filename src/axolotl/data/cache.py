"""The cache of prepared data: its key, why it missed, and the lock under which one process prepares."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.data.formats import formats
from axolotl.data.shards import disk_errors_told, write_whole
from axolotl.data.sources import FileSource, Source
from axolotl.errors import EnvironmentProblem

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry

FORMAT_VERSION = 3
"""Raised whenever the same config and data would be prepared differently than before."""
MANIFEST = "manifest.json"
DEFAULT_FOLDER = "last_run_prepared"
CONTENT = "the content of "
"""How the parts of a key that are files begin."""

_LARGE = 1 << 25
"""Bytes from which a file's hash is remembered."""
_SETTLED_NS = 5_000_000_000

_NOT_IN_KEY = frozenset(
    {
        # datasets and test_datasets are taken apart entry by entry; the others do not touch the saved rows: they
        # choose, order, pack or pad them later
        "datasets",
        "test_datasets",
        "val_set_size",
        "dataset_prepared_path",
        "num_dataset_shards_to_save",
        "push_dataset_to_hub",
        "hf_use_auth_token",
        "shuffle_merged_datasets",
        "shuffle_before_merging_datasets",
        "dataset_shard_num",
        "dataset_shard_idx",
        "dataset_keep_in_memory",
        "dataset_num_proc",
        "max_dropped_fraction",
        "skip_prepare_dataset",
        "remove_unused_columns",
        "sample_packing",
        "eval_sample_packing",
        "sample_packing_group_size",
        "sample_packing_bin_size",
        "sample_packing_sequentially",
        "sample_packing_mp_start_method",
        "sample_packing_eff_est",
        "multipack_real_batches",
        "pad_to_sequence_len",
        "pad_to_multiple_of",
        "curriculum_sampling",
        "group_by_length",
        "batch_flattening",
        "total_num_tokens",
        "total_supervised_tokens",
        "streaming_multipack_buffer_size",
    }
)
_ENTRY_NOT_IN_KEY = frozenset({"weight", "preprocess_shards"})


def digest(text: str | bytes) -> str:
    return hashlib.blake2b(text.encode() if isinstance(text, str) else text, digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """A hash of all of a tokenizer that decides tokens: vocabulary, merges, processors, added and special tokens.

    Its chat template is no part of it: training saves the tokenizer with the template of the data. The template that
    lays out a dataset is a part of its own, where one does.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # what the last call asked for; rows are encoded without either
    backend.no_padding()
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    return digest(backend.to_str() + json.dumps(special, sort_keys=True))


def option_parts(data: DataSection) -> dict[str, str]:
    """The written options that decide the saved rows. A key that this file does not know counts, to be safe."""
    values = data.model_dump(mode="json", exclude_defaults=True)
    return {f"`{key}`": _short(value) for key, value in values.items() if key not in _NOT_IN_KEY}


def entry_parts(entry: DatasetEntry, key: str) -> dict[str, str]:
    """The same for one dataset entry; `key` is its place in the config, such as `datasets[0]`."""
    values = entry.model_dump(mode="json", exclude_defaults=True)
    return {f"`{key}.{name}`": _short(v) for name, v in values.items() if name not in _ENTRY_NOT_IN_KEY}


def code_parts(entry: DatasetEntry) -> dict[str, str]:
    """The user's own code and template files that an entry names, by their content."""
    parts: dict[str, str] = {}
    kind = entry.type if isinstance(entry.type, str) else ""
    names = [kind.rsplit(".", n)[0] for n in range(kind.count(".") + 1)]
    if kind.partition(":")[0] in formats:
        names = [formats.describe(kind.partition(":")[0]).module]
    for name in names:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and name.split(".")[0] != "axolotl":
            parts[f"the code of {name}"] = digest(Path(file).read_bytes())
            break
    return parts


def content_digests(source: Source, root: Path) -> dict[str, str]:
    """The content hash of each file of a source, by its name.

    Large files that have not been touched since they were last hashed are not read again: size, inode and both time
    stamps are the same, and the stamps were old enough at that time to tell a later write apart.
    """
    if not isinstance(source, FileSource):
        return source.fingerprint_parts()
    store = root / "contents.json"
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(store.read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    learnt = False
    for reader in source.readers:
        try:
            stat = reader.path.stat()
        except OSError:  # the reader tells what is wrong
            found[reader.label] = reader.fingerprint()
            continue
        path = str(reader.path.resolve())
        stamp = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
        before = known.get(path)
        if before and before[:4] == stamp:
            found[reader.label] = before[4]
            continue
        found[reader.label] = reader.fingerprint()
        settled = time.time_ns() - max(stamp[2:]) > _SETTLED_NS
        if stat.st_size >= _LARGE and settled:
            known[path] = [*stamp, found[reader.label]]
            learnt = True
    if learnt:
        with contextlib.suppress(OSError):  # it only saves time
            root.mkdir(parents=True, exist_ok=True)
            write_whole(store, json.dumps(known))
    return found


def template_parts(data: DataSection) -> dict[str, str]:
    """The content of the files that `chat_template_jinja` names."""
    written = [
        data.chat_template_jinja,
        *(e.chat_template_jinja for e in (*data.datasets, *data.test_datasets)),
    ]
    files = dict.fromkeys(w for w in written if w and len(w) < 4096 and "\n" not in w and "{" not in w)
    return {f"{CONTENT}{f}": digest(Path(f).read_bytes()) for f in files if Path(f).is_file()}


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:40]}… ({digest(text)[:8]})"


def fingerprint(parts: Mapping[str, str]) -> str:
    """The name of the folder that holds what these parts give."""
    return digest(json.dumps(dict(parts), sort_keys=True))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished preparation; None where there is none or a file that it names is missing."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        described = [
            f"{name}/{file}" for name in manifest["sets"] for file in ("state.json", "dataset_info.json")
        ]
        whole = whole and all((folder / name).is_file() for name in [*described, "ledger.parquet"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def explain_miss(root: Path, name: str, parts: Mapping[str, str]) -> str | None:
    """What changed since the most similar preparation in `root`, as a phrase; None where there is none to compare."""
    best: list[str] | None = None
    for file in root.glob(f"*/{MANIFEST}"):
        if file.parent.name == name:
            continue
        try:
            old = json.loads(file.read_text(encoding="utf-8"))["parts"]
        except (OSError, ValueError, KeyError):
            continue
        # Where no file is shared it is another dataset altogether, not an older state of this one.
        if not any(key.startswith(CONTENT) for key in old.keys() & parts.keys()):
            continue
        changes = _changes(old, parts)
        if changes and (best is None or len(changes) < len(best)):
            best = changes
    if best is None:
        return None
    return "; ".join(best[:3]) + (f"; and {len(best) - 3} more" if len(best) > 3 else "")


def _changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    found = []
    for key in dict.fromkeys((*old, *new)):
        a, b = old.get(key), new.get(key)
        if a == b:
            continue
        if not key.startswith("`"):
            found.append(f"{key} {'is new' if a is None else 'is gone' if b is None else 'changed'}")
        else:
            found.append(f"{key} was {'not set' if a is None else a}, is now {'not set' if b is None else b}")
    return found


@contextlib.contextmanager
def preparing(root: Path, name: str, on_wait: Callable[[], None]) -> Iterator[Path]:
    """The folder in which this process, and no other, prepares `name`. Waits (after `on_wait()`) while another one does.

    The folder is `<name>.partial`; when the caller has renamed it, or finds that another process finished, nothing of
    it stays behind.
    """
    partial = root / f"{name}.partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"the folder `{root}` for prepared data cannot be made: {error.strerror}.",
            "Set `dataset_prepared_path` to a folder that you can write to.",
        ) from error
    with disk_errors_told(root):
        handle = _lock(partial, on_wait)
    try:
        yield partial
    finally:
        for folder in (partial, root / name):
            lock = folder / "lock"
            with contextlib.suppress(OSError):
                if os.fstat(handle).st_ino == lock.stat().st_ino:
                    lock.unlink()
        with contextlib.suppress(OSError):
            partial.rmdir()  # only where it is empty
        os.close(handle)


def _lock(partial: Path, on_wait: Callable[[], None]) -> int:
    told = False
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(partial / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # renamed in between
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told:
                on_wait()
                told = True
            fcntl.flock(handle, fcntl.LOCK_EX)
        # The one who held the lock may have finished and taken the file away: then this lock guards nothing.
        try:
            if os.fstat(handle).st_ino == (partial / "lock").stat().st_ino:
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)


def remove(folder: Path) -> None:
    """Removes a folder so that it never looks finished while it goes."""
    for state in folder.rglob("state.json"):
        state.unlink()
    shutil.rmtree(folder, ignore_errors=True)
