"""The ledger's Arrow form and its sums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from axolotl.data.ledger import (
    LEDGER_SCHEMA,
    Counts,
    DatasetSummary,
    LedgerRows,
    Outcome,
    Reason,
    summary_lines,
    write_parquet,
)


def some_rows() -> LedgerRows:
    """Five rows: kept, dropped, split in three, truncated, dropped."""
    return LedgerRows(
        files=["b.jsonl", "a.jsonl"],
        file=np.array([0, 0, 1, 1, 1], np.int32),
        row=np.array([7, 9, 1, 2, 3], np.int64),
        outcome=np.array(
            [Outcome.KEPT, Outcome.DROPPED, Outcome.SPLIT, Outcome.TRUNCATED, Outcome.DROPPED], np.int8
        ),
        reason=np.array([Reason.NONE, Reason.LONG, Reason.NONE, Reason.LONG, Reason.DUPLICATE], np.int8),
        tokens=np.array([10, 99, 30, 20, 5], np.int64),
        trained=np.array([4, 0, 30, 8, 0], np.int64),
        cut=np.array([0, 99, 0, 3, 5], np.int64),
        pieces=np.array([1, 0, 3, 1, 0], np.int32),
    )


def test_lines_tell_where_their_rows_are() -> None:
    lines = some_rows().batch("train", 2, first_row=100).to_pylist()
    assert [line["first_row"] for line in lines] == [100, -1, 101, 104, -1]
    assert lines[1] == {
        "set": "train",
        "dataset": 2,
        "file": "b.jsonl",
        "row": 9,
        "outcome": "dropped",
        "reason": "longer than sequence_len",
        "tokens": 99,
        "trained_tokens": 0,
        "cut_tokens": 99,
        "first_row": -1,
        "rows": 0,
    }
    assert [line["outcome"] for line in lines] == ["kept", "dropped", "split", "truncated", "dropped"]


def test_counts_add_up() -> None:
    counts = Counts()
    counts.add(some_rows())
    assert (counts.read, counts.kept, counts.truncated, counts.split, counts.rows) == (5, 1, 1, 1, 5)
    assert counts.dropped == {"longer than sequence_len": 1, "duplicate": 1}
    assert counts.kept + counts.truncated + counts.split + counts.dropped_rows == counts.read
    assert (counts.tokens, counts.trained_tokens, counts.cut_tokens) == (57, 42, 107)
    double = counts + counts
    assert double.read == 10
    assert double.dropped["duplicate"] == 2
    assert counts.read == 5, "a sum leaves its terms alone"


def test_the_summary_names_every_loss() -> None:
    counts = Counts()
    counts.add(some_rows())
    (line,) = summary_lines([DatasetSummary("train", 0, "a.jsonl", "alpaca", counts)])
    for part in (
        "a.jsonl",
        "5 rows",
        "1 truncated",
        "1 split",
        "1 dropped (duplicate)",
        "57 tokens",
        "42 trained (74%)",
    ):
        assert part in line
    again = DatasetSummary.from_dict(DatasetSummary("train", 0, "a.jsonl", "alpaca", counts).as_dict())
    assert again.counts == counts


def test_batches_with_other_files_share_one_table(tmp_path: Path) -> None:
    first = some_rows()
    second = first._replace(files=["c.jsonl"], file=np.zeros(5, np.int32))
    batches = [rows.batch("train", 0, 0) for rows in (first, second)]
    write_parquet(tmp_path / "ledger.parquet", LEDGER_SCHEMA, iter(batches))
    table = pq.read_table(tmp_path / "ledger.parquet")
    assert table["file"].to_pylist() == ["b.jsonl"] * 2 + ["a.jsonl"] * 3 + ["c.jsonl"] * 5
