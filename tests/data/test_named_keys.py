"""Options that name what no row has, templates that write nothing, ids that no model knows: told, never passed over."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from axolotl.config.data import DataSection
from axolotl.data import prepare as preparation
from axolotl.data import shards
from axolotl.data.prepare import prepare
from axolotl.data.stream import open_stream
from axolotl.errors import DataError, Place
from preparing import llama3, write_rows

TOKENIZER = llama3()


def chats(count: int, **more: Any) -> list[dict[str, Any]]:
    answer = {"role": "assistant", "content": "yes", **more}
    return [{"messages": [{"role": "user", "content": f"ask {i}"}, answer]} for i in range(count)]


def section(tmp_path: Path, rows: list[dict[str, Any]], entry: dict[str, Any], **values: Any) -> DataSection:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return DataSection.model_validate(
        {
            "datasets": [{"path": str(path), "type": "chat_template", **entry}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "sequence_len": 128,
            "chat_template": "llama3",
            **values,
        }
    )


def places(key: str) -> Place:
    return Place(f"c.yml:{key}")


@pytest.mark.parametrize("option", ["message_field_training", "message_field_training_detail"])
def test_a_misspelt_mark_of_training_is_an_error(tmp_path: Path, option: str) -> None:
    data = section(tmp_path, chats(5, train=False), {option: "trian"})
    with pytest.raises(DataError) as caught:
        prepare(data, TOKENIZER, places=places, workers=1)
    [problem] = caught.value.problems
    assert "`trian`" in problem.message
    assert "`train`" in problem.remedy
    assert problem.places == (Place(f"c.yml:datasets[0].{option}"),)
    assert not list((tmp_path / "prepared").glob("*/manifest.json"))


@pytest.mark.parametrize(
    "entry",
    [{"message_field_training": "zzz"}, {"message_property_mappings": {"name": "zzz"}}],
)
def test_a_key_that_no_message_has_is_told(tmp_path: Path, entry: dict[str, Any], capsys) -> None:  # type: ignore[no-untyped-def]
    prepare(section(tmp_path, chats(5), entry), TOKENIZER, places=places, workers=1)
    told = " ".join(capsys.readouterr().err.split())
    assert "`zzz`, which" in told
    assert f"c.yml:datasets[0].{next(iter(entry))}" in told


def test_what_was_told_is_told_again_of_rows_that_are_there_already(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    tool = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    rows = [row | {"tools": [tool]} for row in chats(5)]
    entry = {"message_field_training": "zzz"}
    data = section(tmp_path, rows, entry, chat_template="gemma", eot_tokens=["<|eot_id|>"])
    path = Path(str(data.datasets[0].path))
    path.write_text(path.read_text() + "\n\n")
    told = []
    for reused in (False, True):
        assert prepare(data, TOKENIZER, places=places, workers=1).reused == reused
        told.append([line for line in capsys.readouterr().err.splitlines() if "found in" not in line])
    assert told[0] == told[1]
    for expected in (
        "`zzz`, which",
        "does not write the tools on offer (5 times)",
        "2 blank lines skipped",
        "c.yml:eot_tokens: warning: the chat template `gemma` never writes `<|eot_id|>`",
        "`<start_of_turn>`, which this tokenizer does not know",
        "Answers end with such, `<end_of_turn>`: generation does not stop there.",
    ):
        assert expected in "\n".join(told[0])


def test_what_an_interrupted_run_had_read_is_remembered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    rows = [row | {"tools": [tool]} for row in chats(1)] + chats(40, train=False)
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 8)
    monkeypatch.setattr(preparation, "CHUNK_ROWS", 4)
    data = section(tmp_path, rows, {"message_field_training": "train"}, chat_template="gemma")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_check_unseen", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, TOKENIZER, workers=1)
    capsys.readouterr()
    prepare(data, TOKENIZER, workers=1)
    told = capsys.readouterr().err
    assert "going on after 41 rows" in told
    assert "does not write the tools on offer (1 times)" in told
    assert "no message" not in told


def test_a_key_that_the_template_never_reads_is_told(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    data = section(tmp_path, chats(5), {"message_property_mappings": {"rol": "role"}})
    prepare(data, TOKENIZER, places=places, workers=1)
    told = " ".join(capsys.readouterr().err.split())
    assert "c.yml:datasets[0].message_property_mappings" in told
    assert "Did you mean `role`?" in told


@pytest.mark.parametrize("workers", [1, 2])
def test_a_key_that_one_late_message_has_is_no_mistake(tmp_path: Path, workers: int, capsys) -> None:  # type: ignore[no-untyped-def]
    rows = [*chats(3000), *chats(1, train=False), *chats(10)]
    prepare(section(tmp_path, rows, {"message_field_training": "train"}), TOKENIZER, workers=workers)
    assert "no message" not in capsys.readouterr().err


def test_a_stream_tells_after_its_first_rows(tmp_path: Path) -> None:
    data = section(
        tmp_path,
        chats(40, train=False),
        {"message_field_training": "trian"},
        streaming=True,
        streaming_multipack_buffer_size=8,
    )
    with pytest.raises(DataError, match="`trian`"):
        list(
            itertools.islice(
                open_stream(data, TOKENIZER).buffers(open_stream(data, TOKENIZER).beginning()), 2
            )
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [("input_ids", 10**6), ("input_ids", -1), ("labels", 10**6), ("labels", -1), ("labels", -101)],
)
def test_ids_outside_the_vocabulary_are_named(tmp_path: Path, field: str, value: int) -> None:
    good = {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}
    bad = {**good, field: [*good[field][:2], value, 4]}
    data = section(tmp_path, [good, bad], {})
    with pytest.raises(DataError) as caught:
        prepare(data, TOKENIZER, workers=1)
    [problem] = caught.value.problems
    assert problem.places[0].line == 2
    assert f"`{field}` holds {value}" in problem.message


@pytest.mark.parametrize(
    "body", ["{{ m.contnt }}{{ eos_token }}", "{{ m.role }}{{ eos_token }}", "", "hello"]
)
def test_a_template_that_writes_nothing_is_refused(tmp_path: Path, body: str) -> None:
    jinja = "{% for m in messages %}" + body + "{% endfor %}"
    data = section(tmp_path, chats(5), {}, chat_template="jinja", chat_template_jinja=jinja)
    with pytest.raises(DataError, match="writes nothing of the content"):
        prepare(data, TOKENIZER, workers=1)


def test_a_template_of_roles_of_its_own_is_none_that_writes_nothing(tmp_path: Path) -> None:
    jinja = "{% for m in messages %}{% if m.role == 'pupil' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    rows = [{"messages": [{"role": "pupil", "content": f"yes {i}"}]} for i in range(5)]
    data = section(
        tmp_path,
        rows,
        {"roles_to_train": ["pupil"], "roles": {"pupil": ["pupil"]}},
        chat_template="jinja",
        chat_template_jinja=jinja,
    )
    assert prepare(data, TOKENIZER, workers=1).summaries[0].counts.trained_tokens > 0
