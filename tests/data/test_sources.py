"""Sources: paths of every kind, splits, slices and shards, and what is told where nothing is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.config.data import DataSection, DatasetEntry
from axolotl.data import sources
from axolotl.data.sources import FileSource, Source, is_local, open_source
from axolotl.data.splits import parse_split, ranges
from axolotl.errors import ConfigError, DataError, Place, UserError

PLACE = Place("config.yml", 3, 5)


def source(path: Path | str, **entry: Any) -> Source:
    options = {k: entry.pop(k) for k in ("default_split", "seed") if k in entry}
    return open_source(
        DatasetEntry.model_validate({"path": str(path), **entry}), DataSection(), PLACE, **options
    )


def read(path: Path | str, **entry: Any) -> list[Any]:
    return [row["a"] for _, row in source(path, **entry).stream()]


def refused(path: Path | str, **entry: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(source(path, **entry).stream())
    problem = caught.value.problems[0]
    assert problem.places == (PLACE,)
    return f"{problem.message} {problem.remedy}"


def lines(path: Path, *values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"a": v}) + "\n" for v in values))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_batches(here: Path) -> None:
    lines(here / "a.jsonl", *range(5))
    opened = source("a.jsonl")
    batches = list(opened.batches(2))
    assert [[row["a"] for _, row in batch] for batch in batches] == [[0, 1], [2, 3], [4]]
    assert [tuple(row_id) for row_id, _ in batches[1]] == [("a.jsonl", 3), ("a.jsonl", 4)]
    assert [row["a"] for batch in opened.batches(2, start=3) for _, row in batch] == [3, 4]
    assert (opened.columns, opened.rows, opened.label) == (("a",), 5, "a.jsonl")


def test_batches_of_large_rows_are_short(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SIZE_PER_BATCH", 100)
    rows = [{"messages": [{"content": "x" * n}]} for n in (30, 30, 200, 30, 30, 30, 30)]
    lines(here / "a.jsonl", *rows)
    sizes = [len(batch) for batch in source("a.jsonl").batches(5)]
    assert sizes == [3, 4]
    # cut at the same rows where reading goes on after some
    assert [len(batch) for batch in source("a.jsonl").batches(5, start=3)] == [4]


def test_blank_lines_are_counted(here: Path) -> None:
    (here / "a.jsonl").write_text('{"a": 1}\n\n \n{"a": 2}\n')
    opened = source("a.jsonl")
    assert [tuple(i) for i, _ in opened.stream()] == [("a.jsonl", 1), ("a.jsonl", 4)]
    assert opened.blank_lines == 2


def test_types_by_name_and_by_ds_type(here: Path) -> None:
    lines(here / "a.jsonl", 1)
    (here / "a.json").write_text('[{"a": 2}]')
    (here / "a.csv").write_text("a\n3\n")
    (here / "a.tsv").write_text("a\tb\n4\t5\n")
    pq.write_table(pa.table({"a": [6]}), here / "a.parquet")
    with pa.ipc.new_stream("a.arrow", pa.schema([("a", pa.int64())])) as writer:
        writer.write_table(pa.table({"a": [7]}))
    assert [read(f"a.{e}")[0] for e in ("jsonl", "json", "csv", "tsv", "parquet", "arrow")] == [
        1,
        2,
        "3",
        "4",
        6,
        7,
    ]
    (here / "a.txt").write_text("hello\n")
    assert [row for _, row in source("a.txt").stream()] == [{"text": "hello"}]
    (here / "rows.data").write_text("a\n8\n")
    assert read("rows.data", ds_type="csv") == ["8"]
    lines(here / "rows", 9)
    assert read("./rows") == [9]
    assert "`cvs` is not a known `ds_type`. Did you mean `csv`?" in refused("rows.data", ds_type="cvs")


def test_different_columns_in_different_rows(here: Path) -> None:
    (here / "a.jsonl").write_text('{"a": 1}\n{"b": {"c": 1}}\n{"a": "x", "b": 2}\n')
    opened = source("a.jsonl")
    assert opened.columns == ("a", "b")
    assert [row for _, row in opened.stream()] == [{"a": 1}, {"b": {"c": 1}}, {"a": "x", "b": 2}]


def test_globs(here: Path) -> None:
    lines(here / "d" / "b.jsonl", 2)
    lines(here / "d" / "a.jsonl", 1)
    lines(here / "d" / "deep" / "c.jsonl", 3)
    assert read("d/*.jsonl") == [1, 2]
    assert read("d/**/*.jsonl") == [1, 2, 3]
    assert "no file matches `d/*.parquet`" in refused("d/*.parquet")
    assert read("d/*.jsonl", split="train[:1]") == [1]
    lines(here / "d" / "test.jsonl", 4)
    assert read("d/*.jsonl", split="test") == [4]
    assert "the files named here have no split `dev`" in refused("d/*.jsonl", split="dev")


def test_folders(here: Path) -> None:
    lines(here / "d" / "b.jsonl", 2)
    lines(here / "d" / "a.jsonl", 1)
    lines(here / "d" / ".hidden" / "x.jsonl", 9)
    (here / "d" / "README.md").write_text("x")
    assert read("d") == [1, 2]
    assert read("d", data_files="b.jsonl") == [2]
    assert read("d", data_files=["b.jsonl", "a*"]) == [2, 1]
    assert read("d", data_files={"train": "b.jsonl", "test": "a.jsonl"}, split="test") == [1]
    assert read("d", data_files={"train": "b.jsonl"}, default_split="test") == [2]
    assert "names no files for the split `dev`" in refused("d", data_files={"train": "b.jsonl"}, split="dev")
    assert "`d/c.jsonl` does not exist. Did you mean" in refused("d", data_files="c.jsonl")
    (here / "e").mkdir()
    assert "the folder `e` holds no data files. It holds: nothing." in refused("e")
    assert "no data files of type csv" in refused("d", ds_type="csv")


def test_a_loader_with_data_files(here: Path) -> None:
    (here / "x.dat").write_text("a\n1\n")
    assert read("csv", data_files="x.dat") == ["1"]


def test_splits_of_a_folder_are_told_by_names(here: Path) -> None:
    lines(here / "d" / "train-0.jsonl", 1)
    lines(here / "d" / "train-1.jsonl", 2)
    lines(here / "d" / "validation.jsonl", 3)
    lines(here / "d" / "test" / "contest.jsonl", 4)
    assert read("d") == [1, 2]
    assert read("d", split="train") == [1, 2]
    assert read("d", split="validation") == [3]
    assert read("d", split="test") == [4]
    assert read("d", default_split="test") == [4]
    lines(here / "plain" / "x.jsonl", 1)
    assert read("plain", default_split="test") == [1]
    assert "`plain` has no split `test`. It has: train." in refused("plain", split="test")


def test_one_file_has_one_split(here: Path) -> None:
    lines(here / "a.jsonl", 1)
    lines(here / "my_test.jsonl", 2)
    assert read("a.jsonl", split="train") == [1]
    assert read("a.jsonl", default_split="test") == [1]
    assert read("my_test.jsonl", split="test") == [2]
    assert "`a.jsonl` is one file and has no split `test`" in refused("a.jsonl", split="test")


def test_saved_datasets(here: Path) -> None:
    Dataset.from_dict({"a": list(range(10))}).save_to_disk("d", num_shards=3)
    assert read("d") == list(range(10))
    assert read("d", split="train[2:4]") == [2, 3]
    parts = {"train": Dataset.from_dict({"a": [1]}), "test": Dataset.from_dict({"a": [2]})}
    DatasetDict(parts).save_to_disk("dd")
    assert (read("dd"), read("dd", split="test"), read("dd", default_split="test")) == ([1], [2], [2])
    assert "`dd` has no split `dev`. It has: train, test." in refused("dd", split="dev")
    next((here / "d").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="`d` misses files"):
        read("d")


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train", range(40)),
        ("train[:5]", range(5)),
        ("train[35:]", range(35, 40)),
        ("train[-3:]", range(37, 40)),
        ("train[:-38]", range(2)),
        ("train[10%:20%]", range(4, 8)),
        ("train[:50%]", range(20)),
        ("train[-10%:]", range(36, 40)),
        ("train[:2]+train[38:]", [0, 1, 38, 39]),
        ("train[5:]+train[:5]", [*range(5, 40), *range(5)]),
        ("train[:]", range(40)),
    ],
)
def test_slices(here: Path, split: str, rows: Any) -> None:
    lines(here / "d" / "a.jsonl", *range(25))
    lines(here / "d" / "b.jsonl", *range(25, 40))
    assert read("d", split=split) == list(rows)
    opened = source("d", split=split)
    assert opened.rows == len(rows)
    assert [row["a"] for _, row in opened.stream(1)] == list(rows)[1:]


def test_slices_that_cannot_be(here: Path) -> None:
    lines(here / "a.jsonl", *range(4))
    assert "`train[:5]` asks for more rows than `a.jsonl` has: 4." in refused("a.jsonl", split="train[:5]")
    assert "leave no row" in refused("a.jsonl", split="train[2:2]")
    assert "cannot be read" in refused("a.jsonl", split="train[5]")
    assert "joins several splits" in refused("a.jsonl", split="train+test")


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 500))
def test_percentages_tile_the_rows(one: int, other: int, total: int) -> None:
    a, b = sorted((one, other))
    parts = parse_split(f"train[:{a}%]+train[{a}%:{b}%]+train[{b}%:]", PLACE)
    found, short = ranges(parts, total)
    assert short is None
    assert [i for start, stop in found for i in range(start, stop)] == list(range(total))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(0, 3))
def test_shards_share_out_the_rows(
    tmp_path_factory: pytest.TempPathFactory, total: int, shards: int, seed: int
) -> None:
    path = lines(tmp_path_factory.mktemp("shards") / "a.jsonl", *range(total))
    opened = [source(path, shards=shards, shards_idx=i, seed=seed) for i in range(shards) if total >= shards]
    found = [[row["a"] for _, row in s.stream()] for s in opened]
    if found:
        assert sorted(value for part in found for value in part) == list(range(total))
        assert [s.rows for s in opened] == [len(f) for f in found]
        assert max(map(len, found)) - min(map(len, found)) <= 1
        assert all(f == sorted(f) for f in found)


def test_shards_hold_the_rows_that_datasets_would_choose(here: Path) -> None:
    lines(here / "a.jsonl", *range(50))
    for index in range(3):
        theirs = Dataset.from_dict({"a": list(range(50))}).shuffle(seed=42).shard(3, index)["a"]
        assert read("a.jsonl", shards=3, shards_idx=index) == sorted(theirs)
    half = Dataset.from_dict({"a": list(range(20))}).shuffle(seed=42).shard(2, 0)["a"]
    assert read("a.jsonl", split="train[:20]", shards=2) == sorted(half)
    assert len(read("a.jsonl", split="train[:2]+train[:2]", shards=1)) == 4
    assert "not among 3 shards" in refused("a.jsonl", shards=3, shards_idx=3)
    assert "`shards` is not" in refused("a.jsonl", shards_idx=3)


def test_missing_files(here: Path) -> None:
    lines(here / "train_data.jsonl", 1)
    message = refused("traindata.jsonl")
    assert "`traindata.jsonl` does not exist. Did you mean `train_data.jsonl`?" in message
    assert str(here) in message
    assert "Did you mean `train_data.jsonl`?" in refused("nothing_like_it.csv")
    assert "The folder `no/such` does not exist." in refused("no/such/file.jsonl")
    assert "does not exist" in refused("./word")
    assert "does not exist" in refused(here / "sub" / "word")


def test_empty_files(here: Path) -> None:
    (here / "empty.jsonl").write_text("")
    (here / "blank.jsonl").write_text("\n \n")
    (here / "list.json").write_text("[]")
    (here / "head.csv").write_text("a,b\n")
    for name in ("empty.jsonl", "blank.jsonl", "list.json", "head.csv"):
        assert f"nothing can be read from `{name}`: it has no rows" in refused(name)
    for name in ("empty.jsonl", "blank.jsonl", "list.json"):
        with pytest.raises(DataError, match="it has no rows"):
            _ = source(name).columns


def test_a_bad_line_is_told_when_the_columns_are_asked_for(here: Path) -> None:
    (here / "a.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(DataError) as caught:
        _ = source("a.jsonl").columns
    assert caught.value.problems[0].places[0].line == 2


def test_no_path(here: Path) -> None:
    with pytest.raises(ConfigError, match="has no `path`"):
        open_source(DatasetEntry(type="alpaca"), DataSection(), PLACE)


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("org/name", False),
        ("name", False),
        ("org/name.jsonl", True),
        ("org/name.v2", False),
        ("./org/name", True),
        ("/org/name", True),
        ("~/name", True),
        ("a/b/c", True),
        ("data/*.jsonl", True),
        ("x.parquet", True),
        ("x.json.gz", True),
    ],
)
def test_what_looks_local_never_goes_to_the_hub(here: Path, path: str, local: bool) -> None:
    assert is_local(path, DatasetEntry(path=path)) is local


def test_fingerprints(here: Path) -> None:
    lines(here / "d" / "a.jsonl", 1)
    lines(here / "d" / "b.jsonl", 2)
    before = source("d").fingerprint_parts()
    assert list(before) == ["d/a.jsonl", "d/b.jsonl"]
    lines(here / "d" / "b.jsonl", 3)
    after = source("d").fingerprint_parts()
    assert [before[k] == after[k] for k in before] == [True, False]


def test_file_urls(here: Path) -> None:
    lines(here / "a b.jsonl", 1)
    assert read((here / "a b.jsonl").as_uri()) == [1]


def test_synthetic_rows() -> None:
    entry = {"type": "_synthetic", "length": 3, "sequence_length": 5, "min_input_id": 7, "max_input_id": 9}
    rows = [row for _, row in source("synthetic", **entry).stream()]
    assert rows == [row for _, row in source("synthetic", **entry).stream()]
    assert rows[1:] == [row for _, row in source("synthetic", **entry).stream(1)]
    assert all(len(row["input_ids"]) == 5 and set(row["input_ids"]) <= {7, 8} for row in rows)
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert rows[0] != rows[1] or rows[1] != rows[2]
    assert "needs `max_input_id`" in refused("synthetic", type="_synthetic")
    assert "is not below" in refused("synthetic", type="_synthetic", max_input_id=50)


def test_local_files_need_neither_torch_nor_datasets(here: Path) -> None:
    lines(here / "a.jsonl", 1)
    code = (
        "import sys; from axolotl.config.data import *; from axolotl.data.sources import *; "
        "from axolotl.errors import Place; "
        "print(list(open_source(DatasetEntry(path='a.jsonl'), DataSection(), Place('c')).stream())); "
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[1] == "[]"


def test_skipping_does_not_read(here: Path) -> None:
    lines(here / "a.jsonl", *range(10))
    opened = source("a.jsonl")
    assert isinstance(opened, FileSource)
    stream = opened.stream(9)
    assert next(stream)[0].row == 10
    assert np.array([row["a"] for _, row in opened.stream(4)]).tolist() == [4, 5, 6, 7, 8, 9]
