"""Batches: what is padding, what is trained, and where one document ends and the next begins."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axolotl.data.collate import PackedCollator, PaddedCollator, SharedCollator, padded_length

PAD = 9


def row(*ids: int, masked: int = 0):
    ids_array = np.array(ids, dtype=np.int32)
    labels = ids_array.astype(np.int64).copy()
    labels[:masked] = -100
    return ids_array, labels


A, B, C = row(1, 2, 3, masked=1), row(4, 5), row(6, 7, 8, 6)


def test_padded_rows_stand_side_by_side():
    batch = PaddedCollator(PAD)([[A], [B]])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, PAD]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["token_counts"] == (5, 3)


def test_the_mask_is_left_out_where_nothing_is_filled():
    assert "attention_mask" not in PaddedCollator(PAD)([[A], [A]])
    assert "attention_mask" in PaddedCollator(PAD, pad_to=4)([[A]])


@pytest.mark.parametrize(
    ("multiple", "pad_to", "length"), [(None, None, 3), (4, None, 4), (None, 7, 7), (4, 5, 8)]
)
def test_rows_are_filled_to_the_length_asked_for(multiple, pad_to, length):
    batch = PaddedCollator(PAD, pad_to, multiple)([[A], [B]])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, length)
    assert padded_length(3, multiple, pad_to) == length


def test_joined_rows_carry_their_borders():
    batch = PackedCollator(PAD, joined=True)([[A, B], [C]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 9]
    assert batch["max_length_q"] == batch["max_length_k"] == 4
    assert batch["token_counts"] == (9, 6)
    assert "attention_mask" not in batch


def test_the_first_token_of_a_document_is_never_predicted_from_the_one_before():
    batch = PackedCollator(PAD, joined=True)([[A, B, C]])
    starts = batch["position_ids"][0] == 0
    assert (batch["labels"][0][starts] == -100).all()
    assert batch["labels"][0].tolist() == [-100, 2, 3, -100, 5, -100, 7, 8, 6]


def test_padding_of_a_packed_row_is_a_document_of_its_own():
    batch = PackedCollator(PAD, joined=True, pad_to=12)([[A, B, C]])
    assert batch["input_ids"].shape == (1, 12)
    assert batch["position_ids"][0, -3:].tolist() == [0, 1, 2]
    assert batch["labels"][0, -3:].tolist() == [-100] * 3
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 9, 12]
    assert batch["token_counts"] == (9, 6)


def test_separate_rows_have_restarting_positions_and_no_borders():
    batch = PackedCollator(PAD, joined=False, pad_to=6)([[A, B], [C]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, PAD], [6, 7, 8, 6, PAD, PAD]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]]
    assert not {"cu_seq_lens_q", "attention_mask"} & set(batch)


@pytest.mark.parametrize(
    "collator", [PaddedCollator(PAD), PackedCollator(PAD, True), PackedCollator(PAD, False)]
)
def test_a_batch_without_rows_trains_nothing(collator):
    batch = collator([])
    assert batch["input_ids"].unique().tolist() == [PAD]
    assert batch["labels"].unique().tolist() == [-100]
    assert batch["token_counts"] == (0, 0)


def test_collators_travel_to_worker_processes():
    for collator in (PaddedCollator(PAD, 5, 2), PackedCollator(PAD, True)):
        assert pickle.loads(pickle.dumps(collator)) == collator


@given(
    st.lists(
        st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=9), min_size=1, max_size=3), max_size=3
    ),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from(["padded", "joined", "rows"]),
)
def test_the_parts_of_shared_rows_are_the_rows(bins, size, kind):
    made = [[row(*ids, masked=len(ids) // 3) for ids in (b[:1] if kind == "padded" else b)] for b in bins]
    inner = PaddedCollator(PAD) if kind == "padded" else PackedCollator(PAD, kind == "joined")
    whole = inner(made)
    parts = [SharedCollator(inner, place, size)(made) for place in range(size)]
    T = whole["labels"].shape[1]

    def joined(name):
        return torch.cat([part[name] for part in parts], dim=1)

    assert len({part["input_ids"].shape for part in parts}) == 1
    assert joined("input_ids")[:, :T].equal(whole["input_ids"])
    assert (joined("input_ids")[:, T:] == PAD).all()
    # Every token has to predict the next one's label, whichever part that is in; nothing else is trained.
    targets = joined("shift_labels")
    assert targets[:, : T - 1].equal(whole["labels"][:, 1:])
    assert (targets[:, T - 1 :] == -100).all()
    assert (
        tuple(map(sum, zip(*(part["token_counts"] for part in parts), strict=True))) == whole["token_counts"]
    )
    positions = joined("position_ids")[:, :T]
    assert positions.equal(
        whole["position_ids"] if "position_ids" in whole else torch.arange(T).expand_as(positions)
    )
    if kind == "joined" and bins:
        for part in parts:
            borders = part["cu_seq_lens_q"].tolist()
            assert borders[: len(whole["cu_seq_lens_q"])] == whole["cu_seq_lens_q"].tolist()
            assert borders[-1] == joined("input_ids").shape[1]
    assert all("attention_mask" not in part for part in parts)
