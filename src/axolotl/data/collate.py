"""Collating: the rows of a batch become tensors, either padded side by side or packed without a border in sight.

Shapes: B rows of a batch, T tokens of a row. Every batch carries `token_counts`, the real and the trained tokens as
plain ints, so that nobody has to ask the device for them; the trainer takes it out before the model sees the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from axolotl.data.types import IGNORE_INDEX

Row = tuple[np.ndarray, np.ndarray]
"""Token ids and labels of one row, both of the same length."""
Batch = dict[str, Any]


def padded_length(longest: int, multiple_of: int | None, pad_to: int | None) -> int:
    """The length that rows are filled up to: at least `pad_to`, and a multiple of `multiple_of`."""
    length = max(longest, pad_to or 0, 1)
    return math.ceil(length / multiple_of) * multiple_of if multiple_of else length


@dataclass(frozen=True)
class PaddedCollator:
    """Rows side by side, filled up at the right: input_ids, labels [B,T], and attention_mask where anything is filled.

    Each bin holds one row. The first label of a row is never a target, and is masked so that counting labels counts
    predictions.
    """

    pad_token_id: int
    pad_to: int | None = None
    multiple_of: int | None = None

    def __call__(self, bins: Sequence[Sequence[Row]]) -> Batch:
        rows = [row for each in bins for row in each]
        T = padded_length(max((len(ids) for ids, _ in rows), default=1), self.multiple_of, self.pad_to)
        B = max(len(rows), 1)
        input_ids = np.full((B, T), self.pad_token_id, dtype=np.int64)
        labels = np.full((B, T), IGNORE_INDEX, dtype=np.int64)
        mask = np.zeros((B, T), dtype=np.int64)
        tokens = 0
        for i, (ids, targets) in enumerate(rows):
            n = len(ids)
            input_ids[i, :n] = ids
            labels[i, 1:n] = targets[1:]
            mask[i, :n] = 1
            tokens += n
        batch: Batch = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        if tokens < B * T:
            # A row of nothing but padding would have no key to attend to.
            mask[:, 0] = 1
            batch["attention_mask"] = torch.from_numpy(mask)
        batch["token_counts"] = (tokens, int((labels != IGNORE_INDEX).sum()))
        return batch


@dataclass(frozen=True)
class PackedCollator:
    """Rows one after the other, each a document with positions of its own.

    `joined`: all bins become one row [1,T] with the documents' borders as `cu_seq_lens_q`, as variable-length
    attention wants them. Otherwise each bin is a row [B,T], and `position_ids`, which start over at each document,
    tell transformers where the borders are. There is never an attention_mask: with one, transformers would let the
    documents see each other. Padding at the end is a document of its own that is not trained.
    """

    pad_token_id: int
    joined: bool
    pad_to: int | None = None
    """Tokens that each row is filled up to."""
    multiple_of: int | None = None

    def __call__(self, bins: Sequence[Sequence[Row]]) -> Batch:
        lines = (
            [[row for each in bins for row in each]]
            if self.joined or not bins
            else [list(each) for each in bins]
        )
        longest = max(sum(len(ids) for ids, _ in line) for line in lines)
        T = padded_length(longest, self.multiple_of, self.pad_to)
        B = len(lines)
        input_ids = np.full((B, T), self.pad_token_id, dtype=np.int64)
        labels = np.full((B, T), IGNORE_INDEX, dtype=np.int64)
        positions = np.empty((B, T), dtype=np.int64)
        borders, tokens = [0], 0
        for i, line in enumerate(lines):
            at = 0
            for ids, targets in line:
                end = at + len(ids)
                input_ids[i, at:end] = ids
                # The token before the first one belongs to another document and must not predict it.
                labels[i, at + 1 : end] = targets[1:]
                positions[i, at:end] = np.arange(end - at)
                borders.append(i * T + end)
                at = end
            tokens += at
            if at < T:
                positions[i, at:] = np.arange(T - at)
                borders.append((i + 1) * T)
        batch: Batch = {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }
        if self.joined:
            cu = torch.tensor(borders, dtype=torch.int32)
            longest_document = int(np.diff(borders).max())
            batch |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
            batch |= {"max_length_q": longest_document, "max_length_k": longest_document}
        batch["token_counts"] = (tokens, int((labels != IGNORE_INDEX).sum()))
        return batch


@dataclass(frozen=True)
class SharedCollator:
    """Of every row of a batch only the part of one process, where `size` processes share each row.

    `labels` keep their place; `shift_labels` holds what each token has to predict, also where that is the next
    part's first token. `position_ids` say where the part stands; documents' borders stay those of the whole row. The
    tokens are counted by the first process alone. There is no attention_mask: padding stands at the right.
    """

    inner: PaddedCollator | PackedCollator
    place: int
    size: int

    def __call__(self, bins: Sequence[Sequence[Row]]) -> Batch:
        whole = dataclasses.replace(self.inner, multiple_of=math.lcm(self.inner.multiple_of or 1, self.size))
        batch = whole(bins)
        labels: torch.Tensor = batch["labels"]
        B, T = labels.shape
        targets = torch.full_like(labels, IGNORE_INDEX)
        targets[:, :-1] = labels[:, 1:]
        batch["shift_labels"] = targets
        if "position_ids" not in batch:
            batch["position_ids"] = torch.arange(T).expand(B, T)
        batch.pop("attention_mask", None)
        part = slice(self.place * T // self.size, (self.place + 1) * T // self.size)
        for name in ("input_ids", "labels", "shift_labels", "position_ids"):
            batch[name] = batch[name][:, part].contiguous()
        if self.place:
            batch["token_counts"] = (0, 0)
        return batch
