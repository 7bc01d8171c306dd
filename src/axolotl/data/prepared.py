"""A finished preparation: where its rows are, what became of the input, and the datasets that training reads."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from axolotl.data.ledger import DatasetSummary
from axolotl.data.mixture import Mixture, mix
from axolotl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from axolotl.config.data import DataSection


@dataclass(frozen=True)
class Prepared:
    """Prepared data in `root`. Nothing is read before it is asked for; rows stay on disk (memory-mapped)."""

    root: Path
    fingerprint: str
    data: DataSection
    seed: int
    summaries: tuple[DatasetSummary, ...]
    reused: bool
    """True when it was there already."""

    @property
    def train(self) -> Path:
        """Folder of all training rows before split and packing, as `datasets.load_from_disk` takes it."""
        return self.root / "train"

    @property
    def tests(self) -> list[Path]:
        """The folder of each entry of `test_datasets`."""
        return [self.root / f"test_{i}" for i in range(len(self.data.test_datasets))]

    @property
    def ledger(self) -> Path:
        """Parquet file with one line per input row."""
        return self.root / "ledger.parquet"

    @property
    def summary(self) -> Path:
        """JSON file with the counts of each dataset."""
        return self.root / "summary.json"

    def row_index(self, set_name: str = "train") -> dict[str, np.ndarray]:
        """For each saved row of a set: dataset, ledger (line), length, trained (tokens), key. NumPy arrays, K long."""
        table = pq.read_table(self.root / f"{set_name}.rows.parquet")
        return {name: table.column(name).to_numpy() for name in table.column_names}

    @cached_property
    def mixture(self) -> Mixture:
        """Rows that are trained on and rows that are held out, in order."""
        weights = [float(entry.weight or 1.0) for entry in self.data.datasets]
        mixture = mix(self.row_index()["dataset"], self.data, self.seed, weights)
        if not len(mixture.train):
            raise DataError(
                "no rows are left to train on.",
                "Look at `dataset_shard_num` and the weights of the datasets.",
            )
        return mixture

    def saved(self, set_name: str = "train") -> Dataset:
        """All saved rows of a set, in the order of their sources."""
        return self._load(self.root / set_name)

    def train_lengths(self) -> np.ndarray:
        """Tokens of each row of `train_dataset()`, in its order."""
        return self.row_index()["length"][self.mixture.train]

    def eval_lengths(self) -> np.ndarray:
        """Tokens of each row of `eval_dataset()`, in its order; empty where there is none."""
        if self.tests:
            return np.concatenate([self.row_index(path.name)["length"] for path in self.tests])
        return self.row_index()["length"][self.mixture.held_out]

    def train_dataset(self) -> Dataset:
        """The training rows in their order: input_ids, attention_mask, labels."""
        return _select(self._load(self.train), self.mixture.train)

    def eval_dataset(self) -> Dataset | None:
        """The rows of `test_datasets` one after the other, else those that `val_set_size` holds out, else None."""
        if self.tests:
            return _datasets().concatenate_datasets([self._load(path) for path in self.tests])
        if not len(self.mixture.held_out):
            return None
        return _select(self._load(self.train), self.mixture.held_out)

    def _load(self, folder: Path) -> Dataset:
        keep = self.data.dataset_keep_in_memory or None
        return _datasets().load_from_disk(str(folder), keep_in_memory=keep)


def _datasets() -> Any:
    # It takes a second to import, and `preprocess` does without it.
    return importlib.import_module("datasets")


def _select(dataset: Dataset, rows: np.ndarray) -> Dataset:
    if len(rows) == len(dataset) and (rows == np.arange(len(rows))).all():
        return dataset
    return dataset.select(rows)
