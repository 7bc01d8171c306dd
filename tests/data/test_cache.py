"""The cache of prepared data: found again when nothing that matters changed, told why when something did."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from axolotl.data import cache
from axolotl.data.prepare import prepare
from axolotl.data.readers import Reader
from preparing import alpaca, llama3, section, write_rows


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return llama3()


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "a.jsonl", alpaca(12))


def test_the_second_time_it_is_found(
    tmp_path: Path, data_file: Path, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    first = prepare(section(data_file, folder=tmp_path / "p"), tokenizer)
    capfd.readouterr()
    second = prepare(section(data_file, folder=tmp_path / "p"), tokenizer)
    assert second.reused
    assert second.summaries == first.summaries
    told = capfd.readouterr().err
    assert "found" in told
    assert "12 rows" in told


@pytest.mark.parametrize(
    "options",
    [
        {"val_set_size": 0.5},
        {"sample_packing": True},
        {"shuffle_merged_datasets": False},
        {"dataset_num_proc": 3},
        {"pad_to_sequence_len": True},
        {"group_by_length": True},
    ],
    ids=lambda o: next(iter(o)),
)
def test_what_only_orders_rows_needs_no_new_preparation(
    tmp_path: Path, data_file: Path, tokenizer: Any, options: dict[str, Any]
) -> None:
    first = prepare(section(data_file, folder=tmp_path / "p"), tokenizer)
    again = prepare(section(data_file, folder=tmp_path / "p", **options), tokenizer, seed=99)
    assert again.reused
    assert again.root == first.root


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sequence_len": 300}, "`sequence_len` was 256, is now 300"),
        ({"train_on_inputs": True}, "`train_on_inputs` was not set, is now true"),
        ({"min_sample_len": 5}, "`min_sample_len` was not set, is now 5"),
        ({"excess_length_strategy": "truncate"}, '`excess_length_strategy` was not set, is now "truncate"'),
        ({"dataset_exact_deduplication": True}, "`dataset_exact_deduplication`"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_an_option_that_changes_rows_is_named(
    tmp_path: Path,
    data_file: Path,
    tokenizer: Any,
    options: dict[str, Any],
    told: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    prepare(section(data_file, folder=tmp_path / "p"), tokenizer)
    capfd.readouterr()
    again = prepare(section(data_file, folder=tmp_path / "p", **options), tokenizer)
    assert not again.reused
    assert f"preparing again: {told}" in capfd.readouterr().err


def test_new_content_is_noticed_whatever_the_time_stamp(
    tmp_path: Path, data_file: Path, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare(section(data_file, folder=tmp_path / "p"), tokenizer)
    before = data_file.stat()
    text = data_file.read_text()
    data_file.write_text(text.replace("Count to 3", "Count on 3"))
    os.utime(data_file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert data_file.stat().st_size == before.st_size
    again = prepare(section(data_file, folder=tmp_path / "p"), tokenizer)
    assert not again.reused
    assert f"the content of {data_file} changed" in capfd.readouterr().err


def test_a_touched_file_with_the_same_content_is_found(
    tmp_path: Path, data_file: Path, tokenizer: Any
) -> None:
    prepare(section(data_file, folder=tmp_path / "p"), tokenizer)
    os.utime(data_file)
    assert prepare(section(data_file, folder=tmp_path / "p"), tokenizer).reused


def test_another_tokenizer_is_noticed(
    tmp_path: Path, data_file: Path, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare(section(data_file, folder=tmp_path / "p"), tokenizer)
    for change in ({"eos_token": "<|eot_id|>"}, {"additional_special_tokens": ["<extra>"]}):
        other = llama3()
        other.add_special_tokens(change)
        assert not prepare(section(data_file, folder=tmp_path / "p"), other).reused
        assert "the tokenizer changed" in capfd.readouterr().err


def test_the_tokenizer_that_training_saves_finds_the_same_data(tmp_path: Path, data_file: Path) -> None:
    """Training writes the template of the data onto it, and libraries leave their padding and truncation behind."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    tokenizer = llama3()
    tokenizer.pad_token = "<|finetune_right_pad_id|>"
    chats = write_rows(tmp_path / "chat.jsonl", [{"messages": messages}] * 3)
    entries = [{"path": str(data_file), "type": "alpaca"}, {"path": str(chats), "type": "chat_template"}]
    options: dict[str, Any] = {"datasets": entries, "chat_template": "llama3"}
    prepare(section(folder=tmp_path / "p", **options), tokenizer)
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages }}"
    other(["one", "one and two"], padding=True, truncation=True, max_length=2)
    other.save_pretrained(tmp_path / "saved")
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert prepare(section(folder=tmp_path / "p", **options), saved).reused
    assert prepare(section(folder=tmp_path / "p", **options), other).reused


def test_the_tokenizers_own_template_counts_where_it_is_used(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chats = write_rows(tmp_path / "chat.jsonl", [{"messages": messages}] * 3)
    options: dict[str, Any] = {"datasets": [{"path": str(chats), "type": "chat_template"}]}
    tokenizer = llama3()
    prepare(section(folder=tmp_path / "p", **options), tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("trim", "upper")
    assert not prepare(section(folder=tmp_path / "p", **options), tokenizer).reused
    assert "preparing again: chat_template of datasets[0] changed" in capfd.readouterr().err


def test_a_template_file_and_own_code_are_part_of_the_key(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": messages}] * 3)
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    options: dict[str, Any] = {
        "datasets": [{"path": str(path), "type": "chat_template"}],
        "chat_template": "jinja",
        "chat_template_jinja": str(template),
    }
    prepare(section(folder=tmp_path / "p", **options), tokenizer)
    template.write_text(template.read_text().replace(": ", " says "))
    assert not prepare(section(folder=tmp_path / "p", **options), tokenizer).reused
    assert "mine.jinja changed" in capfd.readouterr().err

    module = tmp_path / "rows_of_mine.py"
    module.write_text("def load(row):\n    return {'text': row['messages'][0]['content'] + ' one'}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    options["datasets"] = [{"path": str(path), "type": "rows_of_mine.load"}]
    prepare(section(folder=tmp_path / "q", **options), tokenizer)
    assert prepare(section(folder=tmp_path / "q", **options), tokenizer).reused
    module.write_text(module.read_text().replace("one", "two"))
    assert not prepare(section(folder=tmp_path / "q", **options), tokenizer).reused
    assert "the code of rows_of_mine changed" in capfd.readouterr().err


def test_unrelated_data_in_the_folder_is_not_called_a_change(
    tmp_path: Path, data_file: Path, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    other = write_rows(tmp_path / "b.jsonl", [{"text": "something"}] * 3)
    entry = {"path": str(other), "type": "completion", "field": "text"}
    prepare(section(folder=tmp_path / "p", datasets=[entry], sequence_len=32, min_sample_len=1), tokenizer)
    prepare(section(data_file, folder=tmp_path / "p"), tokenizer)
    assert "preparing again" not in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["shard", "torn", "manifest", "state"])
def test_damaged_data_is_prepared_again(tmp_path: Path, data_file: Path, tokenizer: Any, damage: str) -> None:
    first = prepare(section(data_file, folder=tmp_path / "p"), tokenizer)
    shard = next(first.train.glob("*.arrow"))
    if damage == "shard":
        shard.unlink()
    elif damage == "torn":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        (first.root / "manifest.json" if damage == "manifest" else first.train / "state.json").unlink()
    again = prepare(section(data_file, folder=tmp_path / "p"), tokenizer)
    assert not again.reused
    assert len(again.train_dataset()) == 12


def test_a_stale_lock_file_holds_nobody_up(tmp_path: Path, data_file: Path, tokenizer: Any) -> None:
    """What a killed process leaves is a file; the lock itself died with it."""
    data = section(data_file, folder=tmp_path / "p")
    name = prepare(data, tokenizer).fingerprint
    cache.remove(tmp_path / "p" / name)
    partial = tmp_path / "p" / f"{name}.partial"
    partial.mkdir()
    (partial / "lock").touch()
    assert not prepare(data, tokenizer).reused
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == [name]


def test_large_files_are_not_hashed_twice(
    tmp_path: Path, data_file: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_LARGE", 1)
    monkeypatch.setattr(cache, "_SETTLED_NS", 0)
    data = section(data_file, folder=tmp_path / "p")
    prepare(data, tokenizer)
    hashed: list[str] = []
    fingerprint = Reader.fingerprint

    def counted(reader: Reader) -> str:
        hashed.append(reader.label)
        return fingerprint(reader)

    monkeypatch.setattr(Reader, "fingerprint", counted)
    assert prepare(data, tokenizer).reused
    assert not hashed
    before = data_file.stat()
    data_file.write_text(data_file.read_text().replace("Count to 3", "Count on 3"))
    os.utime(data_file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not prepare(data, tokenizer).reused
    assert hashed


def test_the_manifest_names_the_parts(tmp_path: Path, data_file: Path, tokenizer: Any) -> None:
    prepared = prepare(section(data_file, folder=tmp_path / "p"), tokenizer)
    parts = json.loads((prepared.root / "manifest.json").read_text())["parts"]
    assert cache.fingerprint(parts) == prepared.fingerprint
    assert {"the tokenizer", "`sequence_len`", "`datasets[0].type`", f"the content of {data_file}"} <= set(
        parts
    )
