"""Rows that are not on this machine yet: datasets of the Hub, and files behind a URL.

Imported only for such a dataset, because `datasets` takes a second to import.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import fsspec
import huggingface_hub

from axolotl import __version__
from axolotl.config.secrets import masked
from axolotl.data.local import type_of
from axolotl.data.readers import RowId
from axolotl.data.sources import Row, Source
from axolotl.data.splits import Shard, shard_rows
from axolotl.errors import ConfigError, DataError, Place, Problem
from axolotl.registry import require_extra

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry

_EXTRAS = {
    "s3": ("s3fs", "s3"),
    "s3a": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcs"),
    "az": ("adlfs", "azure"),
    "abfs": ("adlfs", "azure"),
    "abfss": ("adlfs", "azure"),
    "adl": ("adlfs", "azure"),
    "oci": ("ocifs", "oci"),
}
_SAVED = {"state.json", "dataset_info.json", "dataset_dict.json"}
_BATCH = 1000


class HubSource(Source):
    """Rows of a Hub dataset, which `datasets` has downloaded and maps from disk."""

    def __init__(self, label: str, dataset: datasets.Dataset, revision: str, shard: Shard | None) -> None:
        self.label, self.revision, self.shard = label, revision, shard
        if shard:
            dataset = dataset.select(sorted(shard_rows(len(dataset), shard).tolist()))
        self.dataset = dataset

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.dataset.column_names)

    @property
    def rows(self) -> int | None:
        return len(self.dataset)

    def fingerprint_parts(self) -> dict[str, str]:
        return {f"{self.label} on the Hub": self.revision}

    def stream(self, start: int = 0) -> Iterator[tuple[RowId, Row]]:
        number = start
        rest = self.dataset.select(range(start, len(self.dataset))) if start else self.dataset
        for batch in rest.iter(_BATCH):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield RowId(self.label, number), dict(zip(batch, values, strict=True))


class HubStream(Source):
    """Rows of a Hub dataset, read over the network one after the other."""

    def __init__(self, label: str, dataset: datasets.IterableDataset, revision: str) -> None:
        self.label, self.dataset, self.revision = label, dataset, revision

    @cached_property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.dataset.column_names or next(iter(self.dataset), {}))

    def fingerprint_parts(self) -> dict[str, str]:
        return {f"{self.label} on the Hub": self.revision}

    def stream(self, start: int = 0) -> Iterator[tuple[RowId, Row]]:
        number = start
        rows = iter(self.dataset.skip(start) if start else self.dataset)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:
                if not _is_network(error):
                    raise
                raise DataError(
                    f"`{self.label}`: the connection to the Hub was lost after {number:,} rows: {error}",
                    "Run the same command with `--auto-resume-from-checkpoints`.",
                ) from error
            if row is None:
                return
            number += 1
            yield RowId(self.label, number), dict(row)


def stream_hub(entry: DatasetEntry, data: DataSection, place: Place, default_split: str) -> HubStream:
    """Opens a Hub dataset without downloading it. Raises as `open_hub` does."""
    token = True if data.hf_use_auth_token else None
    options: dict[str, Any] = {"revision": entry.revision, "token": token}
    if entry.data_files is not None:
        options["data_files"] = entry.data_files
    try:
        info = huggingface_hub.HfApi(token=token).dataset_info(
            str(entry.path), revision=entry.revision, timeout=30
        )
        # Every session of a run has to read the same state of the dataset.
        options["revision"] = info.sha or entry.revision
        split = entry.split or _only_split(entry, default_split, options, place)
        dataset = datasets.load_dataset(str(entry.path), entry.name, split=split, streaming=True, **options)
    except ConfigError:
        raise
    except Exception as error:
        raise _told(error, entry, place) from error
    return HubStream(f"{entry.path}/{split}", dataset, f"{options['revision']} {entry.name or ''} {split}")


def open_hub(
    entry: DatasetEntry, data: DataSection, place: Place, default_split: str, shard: Shard | None
) -> HubSource:
    """Downloads a Hub dataset, or takes it from the cache where the Hub is out of reach.

    Raises DataError where it is not there, ConfigError for a split or configuration that it does not have.
    """
    path = str(entry.path)
    token = True if data.hf_use_auth_token else None
    options: dict[str, Any] = {"revision": entry.revision, "token": token}
    if entry.data_files is not None:
        options["data_files"] = entry.data_files
    unreachable: Exception | None = None
    revision = ""
    try:
        revision = (
            huggingface_hub.HfApi(token=token).dataset_info(path, revision=entry.revision, timeout=30).sha
            or ""
        )
        options["revision"] = revision or entry.revision
    except Exception as error:
        if not _is_network(error):
            raise _told(error, entry, place) from error
        unreachable = error
    try:
        with _offline() if unreachable else contextlib.nullcontext():
            split = entry.split or _only_split(entry, default_split, options, place)
            dataset = datasets.load_dataset(path, entry.name, split=split, **options)
    except ConfigError:
        raise
    except Exception as error:
        raise _told(unreachable or error, entry, place) from error
    files = sorted(f["filename"] for f in dataset.cache_files)
    # The cache names its folders after the revision, so the names stand for it where the Hub cannot be asked.
    revision = revision or hashlib.blake2b("\n".join(files).encode(), digest_size=16).hexdigest()
    return HubSource(f"{path}/{split}", dataset, f"{revision} {entry.name or ''} {split}", shard)


def _only_split(entry: DatasetEntry, default: str, options: dict[str, Any], place: Place) -> str:
    """The split to read where the entry names none: the default, else train, else the only one there is."""
    have = datasets.get_dataset_split_names(str(entry.path), entry.name, **options)
    for split in (default, "train"):
        if split in have:
            return split
    if len(have) == 1:
        return str(have[0])
    raise ConfigError(
        Problem(
            f"`{entry.path}` has no split `{default}`.",
            f"Set `split` to one of: {', '.join(have)}.",
            places=(place,),
        )
    )


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Lets `datasets` look at its cache at once, instead of asking the Hub again and again first."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _is_network(error: BaseException) -> bool:
    names = {each.__name__ for each in type(error).__mro__}
    return bool(names & {"ConnectionError", "ConnectError", "TransportError", "TimeoutException", "Timeout"})


def _told(error: Exception, entry: DatasetEntry, place: Place) -> DataError:
    """The error of a Hub dataset that cannot be had, in the user's terms."""
    path, names = entry.path, {each.__name__ for each in type(error).__mro__}
    said = " ".join(str(error).split())
    if _is_network(error):
        message = f"`{path}` is not a file or folder here, nor in the cache of Hub datasets, and the Hub is out of reach."
        remedy = (
            "Check the network connection, or correct `path`: local files are best written `./name.jsonl`."
        )
    elif "GatedRepoError" in names:
        message = f"the Hub dataset `{path}` is open to approved users only."
        remedy = "Ask for access on its page, log in with `hf auth login`, and set `hf_use_auth_token: true`."
    elif "RevisionNotFoundError" in names:
        message, remedy = (
            f"the Hub dataset `{path}` has no revision `{entry.revision}`.",
            "Correct `revision`.",
        )
    elif names & {"RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"}:
        message = f"`{path}` is neither a file or folder here nor a dataset on the Hub that you may read."
        remedy = "Correct `path`; for a private dataset, log in with `hf auth login` and set `hf_use_auth_token: true`."
    elif isinstance(error, ValueError):
        message, remedy = (
            f"the Hub dataset `{path}` cannot be opened so: {said}",
            "Correct `split`, `name` or `data_files`.",
        )
    else:
        message, remedy = f"the Hub dataset `{path}` cannot be loaded: {type(error).__name__}: {said}", ""
    return DataError(Problem(message, remedy, "data", places=(place,)))


def fetch(url: str, data: DataSection, place: Place) -> Path:
    """A local copy of the file or folder behind a URL; taken from the download cache where it has not changed.

    Raises DataError where it cannot be had, EnvironmentProblem where the extra for such URLs is not installed.
    """
    scheme = url.partition("://")[0].lower()
    if scheme in _EXTRAS:
        require_extra(*_EXTRAS[scheme], f"Reading `{scheme}://` addresses")
    try:
        if scheme in ("http", "https"):
            return _download(url)
        if scheme == "file":
            return Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
        return _copy(url)
    except Exception as error:
        said, shown = " ".join(str(error).split()), masked(url)
        if isinstance(error, FileNotFoundError):
            message, remedy = f"there is nothing at `{shown}`.", "Correct `path`."
        elif scheme not in ("http", "https") and scheme not in fsspec.available_protocols():
            message = f"`{shown}` begins with `{scheme}://`, which is not known."
            remedy = f"Known: http, https, hf, {', '.join(_EXTRAS)}."
        else:
            message = f"`{shown}` cannot be downloaded: {type(error).__name__}: {masked(said)}"
            remedy = "Check the address, the network connection and your credentials."
        raise DataError(Problem(message, remedy, "path", places=(place,))) from error


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(home).expanduser() / "axolotl" / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(*parts: object) -> str:
    return hashlib.blake2b("\n".join(map(str, parts)).encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def _new(final: Path) -> Iterator[Path]:
    """A folder that gets its name only once it is complete."""
    partial = Path(tempfile.mkdtemp(dir=final.parent))
    try:
        yield partial
        with contextlib.suppress(OSError):  # another process was faster
            partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download(url: str) -> Path:
    request = urllib.request.Request(url, headers={"User-Agent": f"axolotl/{__version__}"})
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or "data.json"
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(url) from error
        raise
    with response:
        size = response.headers.get("Content-Length")
        stamp = response.headers.get("ETag") or response.headers.get("Last-Modified")
        final = _cache() / _key(url, stamp, size)
        if stamp and (final / name).is_file():
            return final / name
        if final.exists():
            shutil.rmtree(final)
        with _new(final) as folder:
            with (folder / name).open("wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
            got = (folder / name).stat().st_size
            if size is not None and got != int(size):
                raise OSError(f"it ended after {got} of {size} bytes")
    return final / name


def _copy(url: str) -> Path:
    """A copy of what an fsspec address names: a file, the data files of a folder, or those that match a pattern."""
    system, root = fsspec.core.url_to_fs(url)
    if glob.has_magic(root):
        found = system.glob(root, detail=True)
        base = root[: min(root.find(c) for c in "*?[" if c in root)].rpartition("/")[0]
    elif system.isdir(root):
        found, base = system.find(root, detail=True), root
    else:
        found, base = {root: system.info(root)}, root.rpartition("/")[0]
    single = list(found) == [root]
    wanted = {
        name: info
        for name, info in sorted(found.items())
        if info.get("type", "file") == "file" and (single or type_of(Path(name)) or Path(name).name in _SAVED)
    }
    if not wanted:
        raise FileNotFoundError(url)
    stamps = ("size", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")
    facts = [(name, *(info.get(s) for s in stamps)) for name, info in wanted.items()]
    final = _cache() / _key(url, *facts)
    if not final.exists():
        with _new(final) as folder:
            for name in wanted:
                target = folder / name.removeprefix(base).lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(name, str(target))
    return final / Path(root).name if single else final
