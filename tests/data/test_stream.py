"""Streams: rows in buffers that are cut at the same rows in every run, from wherever it reads on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from axolotl.config.data import DataSection
from axolotl.data import remote, stream
from axolotl.data.sources import open_source
from axolotl.data.stream import Buffer, Stream, open_stream, streamed_entries
from axolotl.errors import ConfigError, DataError, Place
from preparing import llama3, write_rows

TOKENIZER = llama3()


def corpus(path: Path, count: int, words: int = 5) -> Path:
    return write_rows(path, ({"body": f"{path.stem} {i} " + "so " * (i % words)} for i in range(count)))


def section(*entries: dict[str, Any], buffer: int = 8, **values: Any) -> DataSection:
    return DataSection.model_validate(
        {
            "pretraining_dataset": [{"text_column": "body", **e} for e in entries],
            "sequence_len": 64,
            "streaming_multipack_buffer_size": buffer,
            **values,
        }
    )


def texts(buffer: Buffer) -> list[str]:
    ends = buffer.lengths.cumsum()
    rows = [buffer.ids[e - n : e].tolist() for e, n in zip(ends, buffer.lengths, strict=True)]
    return [TOKENIZER.decode(r, skip_special_tokens=True).split(" so")[0].strip() for r in rows]


def take(found: Stream, count: int, start: Any = None) -> list[Buffer]:
    return list(itertools.islice(found.buffers(start or found.beginning()), count))


def test_rows_come_in_order_and_begin_again(tmp_path: Path) -> None:
    path = corpus(tmp_path / "a.jsonl", 20)
    found = take(open_stream(section({"path": str(path), "skip": 3}), TOKENIZER), 4)
    assert [texts(b) for b in found] == [
        [f"a {i}" for i in rows] for rows in (range(3, 11), range(11, 19), [19], range(3, 11))
    ]
    assert [b.start[0].passes for b in found] == [0, 0, 0, 1]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("names", ["a", "ab"])
def test_reading_on_gives_what_reading_through_gives(tmp_path: Path, names: str, workers: int) -> None:
    entries = [{"path": str(corpus(tmp_path / f"{n}.jsonl", 30 + 11 * k))} for k, n in enumerate(names)]
    through = take(open_stream(section(*entries), TOKENIZER), 14)
    for k in (1, 5, 12):
        again = open_stream(section(*entries), TOKENIZER, workers=workers)
        rest = take(again, 14 - k, through[k].start)
        assert [(b.start, b.ids.tolist(), b.labels.tolist()) for b in rest] == [
            (b.start, b.ids.tolist(), b.labels.tolist()) for b in through[k:]
        ]


def test_datasets_are_mixed_by_size_and_weight(tmp_path: Path) -> None:
    entries = [
        {
            "path": str(corpus(tmp_path / f"{n}.jsonl", count)),
            "type": "completion",
            "field": "body",
            "weight": w,
        }
        for n, count, w in (("a", 400, None), ("b", 100, 2.0))
    ]
    data = DataSection.model_validate(
        {"datasets": entries, "streaming": True, "streaming_multipack_buffer_size": 10, "sequence_len": 64}
    )
    seen = [t for b in take(open_stream(data, TOKENIZER), 30) for t in texts(b)]
    share = sum(t.startswith("b") for t in seen) / len(seen)
    assert 200 / 600 - 0.05 < share < 200 / 600 + 0.05


def test_a_long_text_is_cut_and_ends_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"body": "river stone " * 100}])
    [buffer] = take(open_stream(section({"path": str(path)}, sequence_len=32), TOKENIZER), 1)
    ids = buffer.ids.tolist()
    assert max(buffer.lengths) == 32
    assert ids.count(TOKENIZER.eos_token_id) == 1 and ids[-1] == TOKENIZER.eos_token_id
    assert ids.count(TOKENIZER.bos_token_id) == 1
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "river stone " * 100


def test_long_texts_end_a_buffer_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "TOKENS_PER_BUFFER", 50)
    monkeypatch.setattr(stream, "CHUNK_ROWS", 2)
    path = write_rows(tmp_path / "a.jsonl", [{"body": "word " * 30} for _ in range(10)])
    assert all(len(b.lengths) == 2 for b in take(open_stream(section({"path": str(path)}), TOKENIZER), 3))


def test_a_bad_row_is_told_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "good"}\n{"body": {"a": 1}}\n')
    with pytest.raises(DataError) as told:
        take(open_stream(section({"path": str(path)}), TOKENIZER), 1)
    assert told.value.problems[0].places == (Place(str(path), 2),)


def test_a_stream_of_which_nothing_is_left_ends(tmp_path: Path) -> None:
    path = corpus(tmp_path / "a.jsonl", 30)
    data = section({"path": str(path)}, min_sample_len=60, excess_length_strategy="drop")
    told = r"no row of .* is left: 30 shorter .* They have \d+ to \d+ tokens, \d+ in the middle; .*`min_sample_len` 60"
    with pytest.raises(DataError, match=told):
        take(open_stream(data, TOKENIZER), 1)


def test_skipping_everything_is_an_error(tmp_path: Path) -> None:
    path = corpus(tmp_path / "a.jsonl", 5)
    with pytest.raises(DataError, match="no rows after the 5 that `skip` leaves out"):
        take(open_stream(section({"path": str(path), "skip": 5}), TOKENIZER), 1)


def test_rows_that_are_dropped_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"body": "fine words here"}, {"body": "x"}] * 20
    path = write_rows(tmp_path / "a.jsonl", rows)
    found = open_stream(section({"path": str(path)}, min_sample_len=4), TOKENIZER)
    take(found, 3)
    assert capsys.readouterr().err.count("rows are dropped from the stream: shorter than min_sample_len") == 1
    assert "dropped (shorter than min_sample_len)" in found.summary()[0]


def test_too_many_dropped_rows_end_the_stream(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"body": "fine words here"}, {"body": "x"}] * 600)
    data = section({"path": str(path)}, min_sample_len=4, max_dropped_fraction=0.1, buffer=2000)
    with pytest.raises(DataError, match="max_dropped_fraction"):
        take(open_stream(data, TOKENIZER), 1)


def test_entries_keep_their_options() -> None:
    data = section(
        {"path": "a", "name": "n", "split": "s", "data_files": ["f"]}, {"path": "b", "type": "alpaca"}
    )
    (key, first, _), (_, second, _) = streamed_entries(data)
    assert (key, first.type, first.field) == ("pretraining_dataset[0]", "completion", "body")
    assert (first.name, first.split, first.data_files) == ("n", "s", ["f"])
    assert second.type == "alpaca"


def test_the_digest_follows_files_and_options(tmp_path: Path) -> None:
    path = corpus(tmp_path / "a.jsonl", 20)
    digests = [open_stream(section({"path": str(path)}, **more), TOKENIZER).digest() for more in ({}, {})]
    digests.append(open_stream(section({"path": str(path)}, sequence_len=63), TOKENIZER).digest())
    corpus(path, 21)
    digests.append(open_stream(section({"path": str(path)}), TOKENIZER).digest())
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_the_hub_is_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = corpus(tmp_path / "a.jsonl", 30)
    load = datasets.load_dataset
    asked: dict[str, Any] = {}

    def fake(name: str, config: Any, split: str, streaming: bool, **options: Any) -> Any:
        asked.update(options, name=name, streaming=streaming)
        return load("json", data_files=str(path), split=split, streaming=streaming)

    class Api:
        def __init__(self, **_: Any) -> None: ...

        def dataset_info(self, *_: Any, **__: Any) -> Any:
            return type("Info", (), {"sha": "abc"})()

    monkeypatch.setattr(remote.datasets, "load_dataset", fake)
    monkeypatch.setattr(remote.huggingface_hub, "HfApi", Api)
    found = open_stream(section({"path": "me/texts", "split": "train"}), TOKENIZER)
    through = take(found, 5)
    assert asked == {"name": "me/texts", "streaming": True, "revision": "abc", "token": None}
    assert [texts(b)[0] for b in through] == ["a 0", "a 8", "a 16", "a 24", "a 0"]
    assert texts(take(found, 1, through[2].start)[0]) == texts(through[2])


def test_a_lost_connection_names_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost:
        column_names = ("text",)

        def __iter__(self) -> Any:
            yield {"text": "one"}
            raise ConnectionError("reset by peer")

    with pytest.raises(DataError, match="lost after 1 rows"):
        list(remote.HubStream("me/texts", Lost(), "abc").stream())  # type: ignore[arg-type]


def test_a_slice_of_the_hub_is_not_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = section({"path": "me/texts", "split": "train[:10]"})
    monkeypatch.setattr(remote, "open_hub", lambda *_: "downloaded")
    [(_, converted, _)] = streamed_entries(entry)
    assert open_source(converted, entry, Place("x"), endless=True) == "downloaded"


def test_columns_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"other": "text"}))
    with pytest.raises((DataError, ConfigError), match="body"):
        open_stream(section({"path": str(path)}), TOKENIZER)


def test_a_tokenizer_without_eos_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = llama3()
    tokenizer.eos_token = None
    path = corpus(tmp_path / "a.jsonl", 9)
    [buffer] = take(open_stream(section({"path": str(path)}), tokenizer), 1)
    assert "no EOS token" in capsys.readouterr().err
    assert TOKENIZER.eos_token_id not in buffer.ids
