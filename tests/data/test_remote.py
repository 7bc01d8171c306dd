"""Datasets that are not here yet: the Hub (played by local data), URLs, and what is told where they cannot be had."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import fsspec
import pytest

from axolotl.config.data import DataSection, DatasetEntry
from axolotl.data import remote
from axolotl.data.sources import Source, open_source
from axolotl.errors import EnvironmentProblem, Place, UserError

PLACE = Place("config.yml", 3, 5)


def source(path: str, **entry: Any) -> Source:
    options = {k: entry.pop(k) for k in ("default_split", "seed") if k in entry}
    return open_source(DatasetEntry.model_validate({"path": path, **entry}), DataSection(), PLACE, **options)


def refused(path: str, **entry: Any) -> str:
    with pytest.raises(UserError) as caught:
        source(path, **entry)
    (problem,) = caught.value.problems
    assert problem.places == (PLACE,)
    return f"{problem.message} {problem.remedy}"


class Hub:
    """The three questions that are put to the Hub, answered from memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.splits = {
            "train": datasets.Dataset.from_dict({"a": list(range(1200)), "b": [[{"c": None}]] * 1200}),
            "test": datasets.Dataset.from_dict({"a": [-1], "b": [[]]}),
        }
        self.error: Exception | None = None
        self.asked: dict[str, Any] = {}
        monkeypatch.setattr(
            remote.huggingface_hub, "HfApi", lambda token=None: SimpleNamespace(dataset_info=self.info)
        )
        monkeypatch.setattr(remote.datasets, "get_dataset_split_names", lambda *a, **k: list(self.splits))
        monkeypatch.setattr(remote.datasets, "load_dataset", self.load)

    def info(self, path: str, **options: Any) -> Any:
        if self.error:
            raise self.error
        return SimpleNamespace(sha="abc123")

    def load(self, path: str, name: str | None = None, *, split: str, **options: Any) -> datasets.Dataset:
        self.asked = {"path": path, "name": name, "split": split, **options}
        if split.partition("[")[0] not in self.splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(self.splits)}.')
        return self.splits[split.partition("[")[0]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    monkeypatch.chdir(tmp_path)
    return Hub(monkeypatch)


def test_hub(hub: Hub) -> None:
    opened = source("org/name", name="small", revision="main", data_files="x/*.parquet")
    assert hub.asked == {
        "path": "org/name",
        "name": "small",
        "split": "train",
        "revision": "abc123",
        "token": None,
        "data_files": "x/*.parquet",
    }
    assert (opened.columns, opened.rows) == (("a", "b"), 1200)
    rows = list(opened.stream())
    assert rows[1005] == (("org/name/train", 1006), {"a": 1005, "b": [{"c": None}]})
    assert [row["a"] for _, row in opened.stream(1198)] == [1198, 1199]
    assert opened.fingerprint_parts() == {"org/name/train on the Hub": "abc123 small train"}


def test_splits_of_the_hub(hub: Hub) -> None:
    assert source("org/name", default_split="test").rows == 1
    source("org/name", split="train[:10]")
    assert hub.asked["split"] == "train[:10]"
    assert 'Unknown split "dev"' in refused("org/name", split="dev")
    hub.splits = {"dev": hub.splits["test"]}
    assert source("org/name").rows == 1
    hub.splits["other"] = hub.splits["dev"]
    assert "`org/name` has no split `train`. Set `split` to one of: dev, other." in refused("org/name")


def test_shards_of_the_hub_are_those_of_files(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"a": i}) + "\n" for i in range(1200)))
    files = [row["a"] for _, row in source("a.jsonl", shards=5, shards_idx=2).stream()]
    assert [row["a"] for _, row in source("org/name", shards=5, shards_idx=2).stream()] == files


class GatedRepoError(Exception): ...


class RepositoryNotFoundError(Exception): ...


class RevisionNotFoundError(Exception): ...


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError("404"), "neither a file or folder here nor a dataset on the Hub"),
        (GatedRepoError("403"), "open to approved users only"),
        (RevisionNotFoundError("404"), "has no revision `v9`"),
        (RuntimeError("what"), "cannot be loaded: RuntimeError: what"),
    ],
)
def test_what_the_hub_refuses(hub: Hub, error: Exception, message: str) -> None:
    hub.error = error
    assert message in refused("org/name", revision="v9")


def test_without_the_hub_the_cache_is_used(hub: Hub) -> None:
    hub.error = ConnectionError("no network")
    opened = source("org/name")
    assert opened.rows == 1200
    assert hub.asked["revision"] is None
    assert opened.fingerprint_parts() == source("org/name").fingerprint_parts()


def test_without_hub_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = refused("nobody-here/nothing")
    assert "`nobody-here/nothing` is not a file or folder here, nor in the cache of Hub datasets" in told


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A web server over `files`; `sent` lists the paths that were sent in full."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files: dict[str, bytes] = {}
    state = SimpleNamespace(files=files, etag="1", cut=0, requests=0)

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests += 1
            content = files.get(self.path)
            self.send_response(200 if content is not None else 404)
            content = content or b""
            self.send_header("Content-Length", str(len(content)))
            if state.etag:
                self.send_header("ETag", state.etag)
            self.end_headers()
            self.wfile.write(content[: len(content) - state.cut])

        def log_message(self, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


def test_http(web: Any) -> None:
    web.files["/d/a%20b.jsonl?x=1"] = b'{"a": 1}\n{"a": 2}\n'
    url = f"{web.url}/d/a%20b.jsonl?x=1"
    rows = list(source(url).stream())
    assert rows == [((url, 1), {"a": 1}), ((url, 2), {"a": 2})]
    web.files["/d/a%20b.jsonl?x=1"] = b'{"a": 3}\n{"a": 4}\n'
    assert [row["a"] for _, row in source(url).stream()] == [1, 2], (
        "an unchanged ETag means an unchanged file"
    )
    web.etag = "2"
    assert [row["a"] for _, row in source(url).stream()] == [3, 4]
    web.etag = None
    web.files["/d/a%20b.jsonl?x=1"] = b'{"a": 5}\n{"a": 6}\n'
    assert [row["a"] for _, row in source(url).stream()] == [5, 6]


def test_http_failures(web: Any, tmp_path: Path) -> None:
    assert "there is nothing at" in refused(f"{web.url}/none.jsonl")
    web.files["/a.jsonl"] = b'{"a": 1}\n'
    web.cut = 3
    assert "cannot be downloaded: OSError: it ended after 6 of 9 bytes" in refused(f"{web.url}/a.jsonl")
    web.cut = 0
    assert len(list(source(f"{web.url}/a.jsonl").stream())) == 1, (
        "a broken download is not taken for a whole one"
    )
    assert "cannot be downloaded" in refused("http://127.0.0.1:9/a.jsonl")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pipe("/bucket/d/train.jsonl", b'{"a": 1}\n')
    files.pipe("/bucket/d/deep/more.jsonl", b'{"a": 2}\n')
    files.pipe("/bucket/d/test.jsonl", b'{"a": 3}\n')
    files.pipe("/bucket/d/weights.bin", b"x")
    return files


def values(path: str, **entry: Any) -> list[int]:
    return [row["a"] for _, row in source(path, **entry).stream()]


def test_buckets(bucket: Any) -> None:
    assert values("memory://bucket/d/test.jsonl") == [3]
    assert values("memory://bucket/d") == [2, 1]
    assert values("memory://bucket/d", split="test") == [3]
    assert values("memory://bucket/d/*.jsonl", split="train") == [1]
    (row_id, _), *_ = source("memory://bucket/d").stream()
    assert row_id == ("memory://bucket/d/deep/more.jsonl", 1)
    assert list(source("memory://bucket/d/test.jsonl").fingerprint_parts()) == [
        "memory://bucket/d/test.jsonl"
    ]
    bucket.pipe("/bucket/d/test.jsonl", b'{"a": 33}\n')
    assert values("memory://bucket/d/test.jsonl") == [33]


def test_buckets_that_cannot_be_read(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is nothing at `memory://bucket/none`" in refused("memory://bucket/none")
    assert "begins with `nope://`, which is not known" in refused("nope://bucket/x")
    with pytest.raises(EnvironmentProblem) as caught:
        source("oci://bucket/x.jsonl")
    assert "axolotl[oci]" in caught.value.problems[0].remedy
