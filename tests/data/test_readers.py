"""Readers: rows and their line numbers, every kind of damage with its place, bounded memory."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.data import columnar
from axolotl.data.columnar import ArrowReader, ParquetReader
from axolotl.data.json_readers import JsonLinesReader, JsonReader
from axolotl.data.readers import CsvReader, Reader, TextReader
from axolotl.errors import DataError, Problem


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def problems(reader: Reader) -> tuple[Problem, ...]:
    with pytest.raises(DataError) as caught:
        list(reader.rows())
    return caught.value.problems


def where(problem: Problem) -> tuple[int | None, int | None]:
    (place,) = problem.places
    return place.line, place.column


def test_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": 1}\n\n  \r\n{"a": "\u2028", "b": null}\r\n{"c": []}')
    reader = JsonLinesReader(path)
    assert list(reader.rows()) == [(1, {"a": 1}), (4, {"a": "\u2028", "b": None}), (5, {"c": []})]
    assert reader.blank_lines == 2
    assert reader.columns() == ["a", "b", "c"]
    assert reader.count() == 3
    assert list(reader.rows(1)) == [(4, {"a": "\u2028", "b": None}), (5, {"c": []})]


def test_all_bad_lines_are_told_with_a_caret(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": oops}\n[1]\n{"a": 2}\n{"a": "\n"x"\n')
    told = problems(JsonLinesReader(path, "my.jsonl"))
    assert [where(p) for p in told] == [(2, 7), (3, None), (5, 8), (6, None)]
    assert str(told[0].places[0]) == "my.jsonl:2:7"
    line, caret = told[0].excerpt.split("\n")
    assert line[caret.index("^")] == "o"
    assert "the row is a list" in told[1].message
    assert "Invalid control character" in told[2].message
    assert "the row is text" in told[3].message


def test_a_long_bad_line_is_shown_around_its_mistake(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": "' + "x" * 500 + '", "b": !, "c": "' + "y" * 500 + '"}\n')
    (told,) = problems(JsonLinesReader(path))
    line, caret = told.excerpt.split("\n")
    assert len(line) < 100
    assert line[caret.index("^")] == "!"


def test_twenty_bad_lines_are_enough(tmp_path: Path) -> None:
    told = problems(JsonLinesReader(write(tmp_path / "a.jsonl", "x\n" * 50)))
    assert len([p for p in told if p.fatal]) == 20
    assert "only the first 20 bad lines" in told[-1].message


def test_a_cut_off_last_line(tmp_path: Path) -> None:
    (told,) = problems(JsonLinesReader(write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": "abc')))
    assert told.message == "the last line is cut off."
    assert where(told)[0] == 2
    (told,) = problems(JsonLinesReader(write(tmp_path / "b.jsonl", '{"a": 1}\n{"a": abc}')))
    assert "not valid JSON" in told.message or "cut off" in told.message


def test_other_encodings(tmp_path: Path) -> None:
    raw = '{"a": "é"}\n{"a": "ok"}\n'.encode() + '{"a": "café"}\n'.encode("latin-1")
    (told,) = problems(JsonLinesReader(write(tmp_path / "a.jsonl", raw)))
    assert where(told) == (3, 11)
    assert f"byte 0xe9 at offset {raw.index(0xE9)} of the file" in told.message
    assert "caf\\xe9" in told.excerpt
    (told,) = problems(JsonLinesReader(write(tmp_path / "b.jsonl", '{"a": 1}\n'.encode("utf-16"))))
    assert "is UTF-16 text" in told.message


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": "\\ud83d\\ude00"}\n{"a": "\\ud83d"}\n')
    (told,) = problems(JsonLinesReader(path))
    assert where(told)[0] == 2
    assert "surrogate" in told.message


@pytest.mark.parametrize(
    ("name", "content", "at"),
    [
        (
            "a.jsonl",
            '{"a": 1}\n{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}\n{"a": 1, "a": 1}\n',
            [(2, 32), (3, 10)],
        ),
        (
            "a.json",
            '[\n{"a": 1},\n{\n "a": 1,\n "b": [{"é": 1, "é": 2}]}, {"a": 3, "a": 3, "b": {"a": 3}}]\n',
            [(5, 17), (5, None)],
        ),
        ("b.json", '{\n "data": [\n  {"a": 1,\n   "a": 2}\n ]\n}\n', [(4, 4)]),
    ],
)
def test_a_key_that_stands_twice_in_an_object(
    tmp_path: Path, name: str, content: str, at: list[tuple[int, int | None]]
) -> None:
    """The last value would be taken, and the other lost without a word."""
    path = write(tmp_path / name, content)
    told = problems(JsonLinesReader(path) if name.endswith("l") else JsonReader(path))
    assert [where(p) for p in told] == at
    assert all("stands twice in one object" in p.message for p in told)
    for problem in told:
        if problem.excerpt:
            line, caret = problem.excerpt.split("\n")
            assert line[caret.index("^")] == '"'


def test_nesting_without_end(tmp_path: Path) -> None:
    (told,) = problems(JsonLinesReader(write(tmp_path / "a.jsonl", '{"a": ' + "[" * 200_000 + "\n")))
    assert where(told)[0] == 1


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('[{"a": 1},\n {"a": 2}\n]\n', [(1, {"a": 1}), (2, {"a": 2})]),
        ("[]", []),
        (" \n[ ]", []),
        ('{"a": 1}\n{"a": 2}\n', [(1, {"a": 1}), (2, {"a": 2})]),
        ('{"a": 1}', [(1, {"a": 1})]),
        ('{"a": 1}\n\n', [(1, {"a": 1})]),
        ('{"data": [{"a": 1}, {"a": 2}]}', [(1, {"a": 1}), (2, {"a": 2})]),
        ('{\n "version": 1,\n "data": [\n  {"a": 1}\n ]\n}', [(1, {"a": 1})]),
        ('{"messages": [{"role": "user"}]}', [(1, {"messages": [{"role": "user"}]})]),
        ('\ufeff[{"a": "é"}]', [(1, {"a": "é"})]),
    ],
)
def test_json(tmp_path: Path, content: str, rows: list[Any]) -> None:
    reader = JsonReader(write(tmp_path / "a.json", content))
    assert list(reader.rows()) == rows
    assert list(reader.rows(1)) == rows[1:]
    assert reader.count() == len(rows)


def test_json_with_the_rows_under_a_named_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '{"items": [{"a": 1}], "data": [{"a": 2}]}')
    assert list(JsonReader(path, field="items").rows()) == [(1, {"a": 1})]
    assert list(JsonReader(path).rows()) == [(1, {"a": 2})]


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ('[\n{"a": 1},\n{"a": oops}\n]', 3, "not valid JSON"),
        ('[\n{"a": 1}\n{"a": 2}\n]', 3, "a comma or `]` is expected here"),
        ('[\n{"a": 1},\n{"a": "x', 3, "the file is cut off"),
        ('[\n{"a": 1},', 2, "the file is cut off"),
        ('[\n{"a": 1}', 2, "the file is cut off"),
        ('[\n{"a": 1},\n]', 3, "not valid JSON"),
        ('[{"a": 1},\n3,\n"x"]', 2, "row 2 is a number"),
        ('{\n"a": [1,\n oops]}', 3, "not valid JSON"),
        ('{\n"a": [1,\n', 3, "the file is cut off"),
        ('{"data": [3]}', None, "row 1 is a number"),
        ("3", 1, "the row is a number"),
        ("hello\n", 1, "not valid JSON"),
    ],
)
def test_json_damage(tmp_path: Path, content: str, line: int | None, message: str) -> None:
    told = problems(JsonReader(write(tmp_path / "a.json", content)))
    assert message in told[0].message
    assert where(told[0])[0] == line


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=3), st.none() | st.integers() | st.text() | st.lists(st.text()), max_size=3
        )
    ),
    st.integers(1, 40),
    st.sampled_from([None, 1, 3]),
    st.booleans(),
)
def test_a_list_is_read_in_chunks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], size: int, indent: int | None, ascii_only: bool
) -> None:
    content = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    path = write(tmp_path_factory.mktemp("json") / "a.json", content)
    reader = JsonReader(path)
    reader.CHUNK = size
    assert [row for _, row in reader.rows()] == rows


def test_wrong_encoding_inside_a_list(tmp_path: Path) -> None:
    raw = '[\n{"a": "é"},\n'.encode() + '{"a": "è"}\n]'.encode("latin-1")
    (told,) = problems(JsonReader(write(tmp_path / "a.json", raw)))
    assert where(told) == (3, 8)
    assert f"offset {raw.index(0xE8)} " in told.message


def test_a_list_is_not_kept_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("w") as file:
        file.write("[")
        for i in range(40):
            file.write(("," if i else "") + json.dumps({"a": "x" * 1_000_000}))
        file.write("]")
    tracemalloc.start()
    assert sum(1 for _ in JsonReader(path).rows()) == 40
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15_000_000


def test_text(tmp_path: Path) -> None:
    reader = TextReader(write(tmp_path / "a.txt", "one \n\n  two\r\nthree"))
    assert list(reader.rows()) == [(1, {"text": "one "}), (3, {"text": "  two"}), (4, {"text": "three"})]
    assert (reader.columns(), reader.count(), reader.blank_lines) == (["text"], 3, 1)
    raw = "one\nzw\u00f6lf\n".encode("latin-1")
    assert where(problems(TextReader(write(tmp_path / "b.txt", raw)))[0]) == (2, 3)


def test_csv(tmp_path: Path) -> None:
    content = '\ufeffinstruction,output\r\n"a, ""b""\r\nc",007\r\n\r\nNA,\r\n'
    reader = CsvReader(write(tmp_path / "a.csv", content))
    assert list(reader.rows()) == [
        (2, {"instruction": 'a, "b"\r\nc', "output": "007"}),
        (5, {"instruction": "NA", "output": ""}),
    ]
    assert reader.columns() == ["instruction", "output"]
    assert reader.count() == 2
    assert [n for n, _ in reader.rows(1)] == [5]
    tabs = CsvReader(write(tmp_path / "a.tsv", "a\tb\n1,\t2\n"), delimiter="\t")
    assert list(tabs.rows()) == [(2, {"a": "1,", "b": "2"})]


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("a,b\n1,2\n1\n1,2,3\n", 3, "1 values, and the header names 2 columns"),
        ("a,a\n1,2\n", 1, "the column `a` is there twice"),
        ('a,b\n1,2\n"x,2\n', 3, "not a row of a table"),
        ("a,b\n1,2\nx,\u00e9\n".encode("latin-1"), 3, "not UTF-8 text"),
    ],
)
def test_csv_damage(tmp_path: Path, content: str | bytes, line: int, message: str) -> None:
    told = problems(CsvReader(write(tmp_path / "a.csv", content)))
    assert message in told[0].message
    assert where(told[0])[0] == line


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a\n" + "x" * 1_000_000 + "\n")
    assert len(next(CsvReader(path).rows())[1]["a"]) == 1_000_000


LINES = b'{"a": 1}\n{"a": 2}\n'


@pytest.mark.parametrize(
    ("ending", "squeeze"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed(tmp_path: Path, ending: str, squeeze: Any) -> None:
    reader = JsonLinesReader(write(tmp_path / f"a.jsonl{ending}", squeeze(LINES)))
    assert list(reader.rows()) == [(1, {"a": 1}), (2, {"a": 2})]
    long = squeeze(b"".join(json.dumps({"a": str(hash(str(i)))}).encode() + b"\n" for i in range(5000)))
    (told,) = problems(JsonLinesReader(write(tmp_path / f"b.jsonl{ending}", long[: len(long) // 2])))
    assert "is damaged or cut off" in told.message
    (told,) = problems(JsonLinesReader(write(tmp_path / f"c.jsonl{ending}", LINES)))
    assert "is damaged or cut off" in told.message


def test_zstandard(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(LINES)
    assert [row for _, row in JsonLinesReader(path).rows()] == [{"a": 1}, {"a": 2}]
    (told,) = problems(JsonLinesReader(write(tmp_path / "b.jsonl.zst", path.read_bytes()[:-9])))
    assert "is damaged or cut off" in told.message


TABLE = pa.table({"a": list(range(2500)), "b": [[{"role": "user", "content": None}]] * 2500})


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE, path, row_group_size=900)
    reader = ParquetReader(path)
    rows = list(reader.rows())
    assert rows[0] == (1, {"a": 0, "b": [{"role": "user", "content": None}]})
    assert [n for n, _ in rows] == list(range(1, 2501))
    assert [row["a"] for _, row in reader.rows(2499)] == [2499]
    assert (reader.columns(), reader.count()) == (["a", "b"], 2500)
    (told,) = problems(ParquetReader(write(tmp_path / "b.parquet", path.read_bytes()[:-100])))
    assert "is damaged or cut off" in told.message


@pytest.mark.parametrize("opening", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow(tmp_path: Path, opening: Any) -> None:
    path = tmp_path / "a.arrow"
    with opening(str(path), TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=700)
    reader = ArrowReader(path)
    assert [(n, row["a"]) for n, row in reader.rows()] == [(i + 1, i) for i in range(2500)]
    assert [row["a"] for _, row in reader.rows(1399)] == list(range(1399, 2500))
    assert (reader.columns(), reader.count()) == (["a", "b"], 2500)
    (told,) = problems(
        ArrowReader(write(tmp_path / "b.arrow", path.read_bytes()[: path.stat().st_size // 2]))
    )
    assert "is damaged or cut off" in told.message


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_few_large_rows_of_a_table_are_read_at_once(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar, "_BATCH_BYTES", 1000)
    table, path = pa.table({"a": ["x" * 300] * 20}), tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, compression="none", use_dictionary=False)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    sizes = []
    slice_ = columnar._rows_at_once
    monkeypatch.setattr(columnar, "_rows_at_once", lambda *given: sizes.append(slice_(*given)) or sizes[-1])
    reader = ParquetReader(path) if kind == "parquet" else ArrowReader(path)
    assert [n for n, _ in reader.rows(2)] == list(range(3, 21))
    assert sizes and max(sizes) <= 4


def test_parquet_with_a_text_that_is_not_utf8(tmp_path: Path) -> None:
    column = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"a": column}), tmp_path / "a.parquet")
    (told,) = problems(ParquetReader(tmp_path / "a.parquet"))
    assert "not UTF-8" in told.message


def test_a_table_with_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the column `a` twice"):
        ParquetReader(tmp_path / "a.parquet").columns()


def test_damage_inside_of_a_table_is_told_with_the_rows_before_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [f"text {i}" for i in range(3000)]}), path, row_group_size=1000)
    at = pq.ParquetFile(path).metadata.row_group(1).column(0)
    raw = bytearray(path.read_bytes())
    raw[at.dictionary_page_offset : at.dictionary_page_offset + 200] = b"\xff" * 200
    (told,) = problems(ParquetReader(write(path, bytes(raw))))
    assert "damaged or cut off" in told.message and "(after row 1,000)" in told.message


def test_fingerprints_are_of_the_content(tmp_path: Path) -> None:
    one, same = write(tmp_path / "a.jsonl", LINES), write(tmp_path / "b.jsonl", LINES)
    other = write(tmp_path / "c.jsonl", LINES.replace(b"2", b"3"))
    prints = [JsonLinesReader(p).fingerprint() for p in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_what_a_line_lacks_at_its_end_is_shown_there(tmp_path: Path) -> None:
    told = problems(JsonLinesReader(write(tmp_path / "a.jsonl", '{"a": [1, 2\n{"a": 1}\n')))
    assert where(told[0]) == (1, 12)
