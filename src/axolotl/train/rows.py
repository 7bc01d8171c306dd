"""Reading prepared rows fast: token ids straight from Arrow's memory, without a Python object per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from axolotl.data.collate import Row


class _Column:
    """A column of lists as flat values with offsets, chunk by chunk; nothing is copied."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.values: list[np.ndarray] = []
        self.offsets: list[np.ndarray] = []
        for chunk in column.chunks:
            if not len(chunk):
                continue
            self.offsets.append(chunk.offsets.to_numpy())
            self.values.append(chunk.values.to_numpy(zero_copy_only=chunk.values.null_count == 0))
        sizes = [len(o) - 1 for o in self.offsets]
        self.first = np.cumsum([0, *sizes])

    def lengths(self) -> np.ndarray:
        return np.concatenate([np.diff(o) for o in self.offsets] or [np.zeros(0)]).astype(np.int64)

    def __getitem__(self, i: int) -> np.ndarray:
        c = 0 if len(self.offsets) == 1 else int(np.searchsorted(self.first, i, side="right")) - 1
        k = i - int(self.first[c])
        return self.values[c][self.offsets[c][k] : self.offsets[c][k + 1]]


class TokenRows(torch.utils.data.Dataset[Any]):
    """The rows of a prepared dataset, addressed bin by bin: `rows.__getitems__([[3, 1], [7]])` reads three rows.

    `dataset` has the columns input_ids and labels. A selection or a shuffle of it is followed without copying.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset
        self._open()

    def _open(self) -> None:
        table = self.dataset.data
        self._ids, self._labels = _Column(table.column("input_ids")), _Column(table.column("labels"))
        chosen = getattr(self.dataset, "_indices", None)
        self._chosen = None if chosen is None else chosen.column(0).to_numpy()
        lengths = self._ids.lengths()
        self.lengths: np.ndarray = lengths if self._chosen is None else lengths[self._chosen]
        """Tokens of each row."""

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes open the memory map for themselves.
        return {"dataset": self.dataset}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.dataset = state["dataset"]
        self._open()

    def __len__(self) -> int:
        return len(self.lengths)

    def saved_row(self, i: int) -> int:
        """Where a row stands in the saved dataset, of which this may be a selection."""
        return i if self._chosen is None else int(self._chosen[i])

    def row(self, i: int) -> Row:
        """Token ids and labels of one row."""
        at = self.saved_row(i)
        return self._ids[at], self._labels[at]

    def __getitem__(self, bin_: Sequence[int]) -> list[Row]:
        return [self.row(i) for i in bin_]

    def __getitems__(self, bins: Sequence[Sequence[int]]) -> list[list[Row]]:
        return [self[each] for each in bins]
