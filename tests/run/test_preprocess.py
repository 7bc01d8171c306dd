"""`preprocess` as a verb: how many processes it uses, and what it shows of data that is streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from axolotl.config import load_config
from axolotl.data.sample import SAMPLE_ROWS
from axolotl.run import preprocess as verb
from preparing import FIXTURES, alpaca, write_rows


def config(folder: Path, **values: Any) -> Any:
    plain = {
        "base_model": str(FIXTURES / "tiny-llama3"),
        "sequence_len": 256,
        "learning_rate": 1e-3,
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        **values,
    }
    file = folder / "config.yml"
    file.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return load_config(file)


def streamed(folder: Path, rows: int = 30, **values: Any) -> Any:
    path = write_rows(folder / "a.jsonl", ({"text": f"row {i}"} for i in range(rows)))
    entry = {"path": str(path), "skip": 5}
    return config(folder, pretraining_dataset=[entry], max_steps=3, **values)


def test_all_cpus_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(verb, "worker_count", lambda wanted: 7)
    monkeypatch.setattr(verb, "prepare", lambda data, *_, **__: asked.append(data.dataset_num_proc))
    path = write_rows(tmp_path / "a.jsonl", alpaca(3))
    entry = {"path": str(path), "type": "alpaca"}
    for values in ({}, {"dataset_num_proc": 2}):
        verb.preprocess(config(tmp_path, datasets=[entry], **values))
    assert asked == [7, 2]


def test_a_stream_is_left_alone_unless_it_is_to_be_shown(tmp_path: Path) -> None:
    assert verb.preprocess(streamed(tmp_path)) is None
    assert not (tmp_path / "prepared").exists()


def test_a_sample_of_a_stream_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for count in (30, 2 * SAMPLE_ROWS):  # the second replaces the first
        assert verb.preprocess(streamed(tmp_path, count), debug_text_only=True, report=True) is None
        printed = capsys.readouterr()
        assert (
            f"{tmp_path}/a.jsonl:6): " in printed.out
            and "⟦‹<|begin_of_text|>›row 5‹<|end_of_text|>›⟧" in printed.out
        )
        assert f"{min(count - 5, SAMPLE_ROWS):,} rows" in printed.err
        page = (tmp_path / "prepared" / "stream-sample" / "report.html").read_text(encoding="utf-8")
        assert "row 5" in page
    assert [p.name for p in (tmp_path / "prepared").iterdir()] == ["stream-sample"]


def test_test_sets_of_a_stream_are_prepared_beside_its_sample(tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "b.jsonl", alpaca(4))
    cfg = streamed(tmp_path, test_datasets=[{"path": str(held_out), "type": "alpaca"}])
    prepared = verb.preprocess(cfg, debug=True)
    assert prepared is not None and [p.name for p in prepared.tests] == ["test_0"]
    assert (tmp_path / "prepared" / "stream-sample" / "train").is_dir()


def test_rows_of_random_tokens(tmp_path: Path) -> None:
    entry = {
        "path": "synthetic",
        "type": "_synthetic",
        "length": 20,
        "sequence_length": 32,
        "max_input_id": 4000,
    }
    prepared = verb.preprocess(config(tmp_path, datasets=[entry]))
    assert prepared is not None
    assert [len(row["input_ids"]) for row in prepared.train_dataset()] == [32] * 20
