"""Which rows enter the data: the limits, the order in which they apply, and that every token is accounted for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl.data.filters import FilteredRows, Limits, SeenRows, drop_rows, filter_rows
from axolotl.data.ledger import Outcome, Reason
from axolotl.data.types import IGNORE_INDEX, Rendered


def rendered(length: int, trained_from: int = 0, first: int = 1) -> Rendered:
    ids = list(range(first, first + length))
    return Rendered(ids, [IGNORE_INDEX if i < trained_from else t for i, t in enumerate(ids)])


def filtered(pieces: list[list[Rendered]], limits: Limits) -> FilteredRows:
    rows, overlong = filter_rows(pieces, [("a.jsonl", i + 1) for i in range(len(pieces))], limits)
    assert not overlong
    return rows


def outcomes(rows: FilteredRows) -> list[tuple[str, str]]:
    return [
        (Outcome(o).word, Reason(r).text)
        for o, r in zip(rows.ledger.outcome, rows.ledger.reason, strict=True)
    ]


def test_both_ends_of_the_limits_are_kept() -> None:
    rows = filtered([[rendered(n)] for n in (1, 2, 8, 9)], Limits(2, 8))
    assert rows.lengths.tolist() == [2, 8]
    assert outcomes(rows) == [
        ("dropped", "shorter than min_sample_len"),
        ("kept", ""),
        ("kept", ""),
        ("dropped", "longer than sequence_len"),
    ]


def test_rows_without_a_trained_token_are_dropped() -> None:
    rows = filtered(
        [[rendered(5, trained_from=5)], [rendered(5, trained_from=4)], [Rendered([], [])], []], Limits(2, 8)
    )
    assert rows.owner.tolist() == [1]
    assert rows.trained.tolist() == [1]
    assert outcomes(rows)[0] == ("dropped", "nothing in it is trained")
    assert outcomes(rows)[2:] == [("dropped", "nothing in it is trained")] * 2


def test_truncation_cuts_the_right_end_and_counts_it() -> None:
    rows = filtered([[rendered(12, trained_from=3)]], Limits(2, 8, "truncate"))
    assert rows.ids.tolist() == list(range(1, 9))
    assert rows.labels.tolist() == [IGNORE_INDEX] * 3 + [4, 5, 6, 7, 8]
    assert outcomes(rows) == [("truncated", "longer than sequence_len")]
    assert rows.ledger.cut.tolist() == [4]
    assert rows.ledger.tokens.tolist() == [12]


def test_truncation_that_leaves_nothing_trained_drops_the_row() -> None:
    rows = filtered([[rendered(12, trained_from=8)]], Limits(2, 8, "truncate"))
    assert not len(rows.lengths)
    assert outcomes(rows) == [("dropped", "nothing trained is left after truncation")]


def test_raise_names_the_rows() -> None:
    pieces = [[rendered(3)], [rendered(9)], [rendered(1)], [rendered(20)]]
    _, overlong = filter_rows(pieces, [("a", i) for i in range(4)], Limits(2, 8, "raise"))
    assert overlong == [1, 3]


def test_a_row_of_several_pieces_is_split_even_if_one_is_too_short() -> None:
    rows = filtered([[rendered(8), rendered(8), rendered(1)], [rendered(4)]], Limits(2, 8))
    assert outcomes(rows)[0] == ("split", "shorter than min_sample_len")
    assert rows.ledger.pieces.tolist() == [2, 1]
    assert rows.ledger.cut.tolist() == [1, 0]


def test_dropping_duplicates_keeps_the_ledger_right() -> None:
    rows = filtered(
        [[rendered(4)], [rendered(8), rendered(8, first=50)], [rendered(4)], [rendered(12)]],
        Limits(2, 10, "truncate"),
    )
    rows = drop_rows(rows, np.array([False, True, False, True, False]), Reason.DUPLICATE)
    assert outcomes(rows) == [
        ("kept", ""),
        ("split", "duplicate"),
        ("dropped", "duplicate"),
        ("truncated", "longer than sequence_len"),
    ]
    assert rows.ledger.cut.tolist() == [0, 8, 4, 2]
    assert rows.ids.tolist() == [1, 2, 3, 4, *range(50, 58), *range(1, 11)]


PIECES = st.lists(
    st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=9).map(
            lambda row: Rendered([t for t, _ in row], [t if yes else IGNORE_INDEX for t, yes in row])
        ),
        max_size=3,
    ),
    max_size=8,
)


@given(PIECES, st.integers(0, 4), st.integers(0, 5), st.sampled_from(["drop", "truncate"]))
def test_every_row_and_token_is_accounted_for(
    pieces: list[list[Rendered]], shortest: int, room: int, too_long: str
) -> None:
    longest = max(1, shortest + room)
    limits = Limits(shortest, longest, too_long)  # type: ignore[arg-type]
    rows = filtered(pieces, limits)
    ledger = rows.ledger
    assert ((rows.lengths >= shortest) & (rows.lengths <= longest) & (rows.trained > 0)).all()
    assert len(rows.ids) == len(rows.labels) == rows.lengths.sum()
    assert (ledger.tokens == [sum(len(p.input_ids) for p in row) for row in pieces]).all()
    assert (ledger.tokens - ledger.cut).sum() == rows.lengths.sum()
    assert ledger.trained.sum() == rows.trained.sum() == (rows.labels != IGNORE_INDEX).sum()
    assert (ledger.pieces == np.bincount(rows.owner, minlength=len(pieces))).all()
    assert ((ledger.outcome == Outcome.DROPPED) == (ledger.pieces == 0)).all()
    assert ((ledger.reason != Reason.NONE) | (ledger.cut == 0)).all(), "what is lost has a reason"
    ends = np.cumsum(rows.lengths)
    for end, length, owner in zip(ends, rows.lengths, rows.owner, strict=True):
        ids, labels = rows.ids[end - length : end].tolist(), rows.labels[end - length : end].tolist()
        assert any(p.input_ids[:longest] == ids and p.labels[:longest] == labels for p in pieces[owner])


def test_keys_tell_ids_and_labels_apart() -> None:
    masked = Rendered([1, 2, 3], [IGNORE_INDEX, 2, 3])
    rows = filtered([[rendered(3)], [rendered(3)], [masked], [rendered(2)]], Limits(2, 8))
    first, second, third, fourth = rows.keys.tolist()
    assert first == second
    assert len({first, third, fourth}) == 3


def test_seen_rows_remembers_across_calls(tmp_path: Path) -> None:
    seen = SeenRows(tmp_path / "seen.sqlite")
    big = np.uint64(2**64 - 1)
    assert seen.add(np.array([1, 2, 1, big], np.uint64)).tolist() == [False, False, True, False]
    assert seen.add(np.array([big, 3, 2], np.uint64)).tolist() == [True, False, True]
    seen.close()


@pytest.mark.parametrize("count", [0, 1])
def test_empty_chunks_are_fine(count: int) -> None:
    rows = filtered([[rendered(1)]] * count, Limits(2, 8))
    assert len(rows.lengths) == 0
    assert len(rows.ledger.row) == count
