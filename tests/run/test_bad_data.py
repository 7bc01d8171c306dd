"""Bad data through the verb `preprocess`: an error with file and row, or handled; never a cache that looks finished."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from axolotl.config import load_config
from axolotl.errors import DataError
from axolotl.run.preprocess import preprocess
from preparing import FIXTURES, alpaca

TABLE = pa.Table.from_pylist(alpaca(3000))
GOOD = alpaca(2)


def config(folder: Path, path: Path, kind: str = "alpaca", **values: Any) -> Any:
    plain = {
        "base_model": str(FIXTURES / "tiny-llama3"),
        "chat_template": "llama3",
        "datasets": [{"path": str(path), "type": kind}],
        "sequence_len": 256,
        "learning_rate": 1e-3,
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        **values,
    }
    file = folder / "config.yml"
    file.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return load_config(file)


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(path: Path) -> bytes:
    pq.write_table(TABLE, path, row_group_size=500)
    return path.read_bytes()


def arrow(path: Path, opening: Callable[..., Any]) -> bytes:
    with pa.OSFile(str(path), "wb") as file, opening(file, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=500)
    return path.read_bytes()


def talk(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


CHAT = talk(("user", "q"), ("assistant", "a"))
BAD: dict[str, tuple[str, Callable[[Path], bytes], str, list[int]]] = {
    "cut gzip": ("a.jsonl.gz", lambda p: gzip.compress(lines(*alpaca(2000)))[:5000], "alpaca", []),
    "cut parquet": ("a.parquet", lambda p: parquet(p)[:20_000], "alpaca", []),
    "cut arrow": ("a.arrow", lambda p: arrow(p, pa.ipc.new_file)[:20_000], "alpaca", []),
    "cut arrow stream": ("a.arrow", lambda p: arrow(p, pa.ipc.new_stream)[:20_001], "alpaca", []),
    "cut line": ("a.jsonl", lambda p: lines(*GOOD) + b'{"instruction": "x', "alpaca", [3]),
    "latin-1": ("a.jsonl", lambda p: lines(*GOOD) + b'{"instruction": "caf\xe9"}\n', "alpaca", [3]),
    "utf-16": ("a.jsonl", lambda p: lines(*GOOD).decode().encode("utf-16"), "alpaca", [1]),
    "mixed": ("a.jsonl", lambda p: lines(*GOOD, {"question": "x"}, CHAT), "alpaca", [3, 4]),
    "mixed chats": (
        "a.jsonl",
        lambda p: lines(CHAT, {"conversations": []}, {"messages": "x"}),
        "chat_template",
        [2, 3],
    ),
    "null": ("a.jsonl", lambda p: lines(*GOOD, {"instruction": None, "output": "x"}), "alpaca", [3]),
    "null chats": (
        "a.jsonl",
        lambda p: lines(CHAT, {"messages": None}, {"messages": [None]}, talk(("user", None))),
        "chat_template",
        [2, 3, 4],
    ),
    "unknown role": ("a.jsonl", lambda p: lines(CHAT, talk(("narrator", "x"))), "chat_template", [2]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_an_error_with_its_place(tmp_path: Path, case: str) -> None:
    name, make, kind, rows = BAD[case]
    path = tmp_path / name
    path.write_bytes(make(path))
    with pytest.raises(DataError) as caught:
        preprocess(config(tmp_path, path, kind))
    places = [place for problem in caught.value.problems for place in problem.places]
    assert {place.file for place in places} == {str(path)}
    assert [place.line for place in places if place.line] == rows
    assert not list(tmp_path.rglob("state.json"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"\xef\xbb\xbf" + lines(*GOOD)),
        ("a.json", b"\xef\xbb\xbf" + json.dumps(GOOD).encode()),
        ("a.csv", b"\xef\xbb\xbfinstruction,output\nq,a\np,b\n"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    prepared = preprocess(config(tmp_path, path))
    assert prepared is not None and len(prepared.train_dataset()) == 2


@pytest.mark.parametrize("kind", ["alpaca", "chat_template"])
def test_a_tokenizer_without_special_tokens(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(FIXTURES / "tiny-llama3", model)
    file = model / "tokenizer_config.json"
    kept = {
        k: v
        for k, v in json.loads(file.read_text()).items()
        if k not in ("bos_token", "eos_token", "pad_token")
    }
    file.write_text(json.dumps(kept))
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*(GOOD if kind == "alpaca" else [CHAT, CHAT])))
    prepared = preprocess(config(tmp_path, path, kind, base_model=str(model)))
    assert prepared is not None and len(prepared.train_dataset()) == 2
    assert ("no EOS token" in capfd.readouterr().err) == (kind == "alpaca")


@pytest.mark.slow
def test_one_huge_row_and_one_conversation_without_end_take_time_in_proportion(tmp_path: Path) -> None:
    """100,000 turns against 20,000: five times the work, and not twenty-five times; 20 MB of text in one row."""
    took = []
    for turns in (20_000, 100_000):
        path = tmp_path / f"{turns}.jsonl"
        path.write_bytes(lines(talk(*(("user", "Is it far?"), ("assistant", "No.")) * (turns // 2)), CHAT))
        cfg = config(tmp_path, path, "chat_template", sequence_len=10_000_000)
        began = time.process_time()
        prepared = preprocess(cfg)
        took.append(time.process_time() - began)
        assert prepared is not None and prepared.summaries[0].counts.rows == 2
    assert took[1] < 10 * took[0]
    path = tmp_path / "huge.jsonl"
    path.write_bytes(lines({"instruction": "x", "output": "word and " * 2_200_000}, *GOOD))
    prepared = preprocess(config(tmp_path, path))
    assert prepared is not None
    assert prepared.summaries[0].counts.dropped == {"longer than sequence_len": 1}
