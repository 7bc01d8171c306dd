"""Batches: what is padding, what is trained, and where one document ends and the next begins."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from axolotl.data.collate import PackedCollator, PaddedCollator, padded_length

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
