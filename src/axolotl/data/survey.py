"""What is known of a dataset without preparing it: a finished preparation of it, or a look at its first rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl.data import cache
from axolotl.data.ledger import DatasetSummary
from axolotl.data.prepare import CHUNK_ROWS, chunks
from axolotl.data.prepared import Prepared
from axolotl.data.tasks import Task, fingerprint_parts, open_tasks
from axolotl.data.work import ChunkWorker
from axolotl.errors import Place

if TYPE_CHECKING:
    from axolotl.config.data import DataSection

SAMPLED_ROWS = 2 * CHUNK_ROWS
"""Input rows of each dataset that are looked at."""


@dataclass(frozen=True)
class Sample:
    """The first rows of each dataset of a set, rendered: `ids` and `labels` of row i end at `ends[i]`."""

    ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray
    """Trained tokens of each row."""
    read: int
    """Input rows that were looked at."""
    of: int | None
    """Input rows that there are, where that is known without reading them."""

    @property
    def share(self) -> float:
        """The part of the input that was looked at; 1 where its size is not known."""
        return self.read / self.of if self.of else 1.0


def find_prepared(
    data: DataSection, tokenizer: Any, *, seed: int = 42, places: Callable[[str], Place] | None = None
) -> tuple[Prepared | None, list[Task]]:
    """A finished preparation of these datasets, or None; and the datasets, opened.

    Raises DataError for data that cannot be opened.
    """
    root = Path(data.dataset_prepared_path or cache.DEFAULT_FOLDER)
    tasks = open_tasks(data, tokenizer, places or (lambda key: Place(key)), seed)
    name = cache.fingerprint(fingerprint_parts(data, tokenizer, tasks, seed, root))
    manifest = cache.read_manifest(root / name)
    if manifest is None:
        return None, tasks
    summaries = tuple(DatasetSummary.from_dict(s) for s in manifest["datasets"])
    return Prepared(root / name, name, data, seed, summaries, True), tasks


def sample(tasks: list[Task], set_name: str = "train", rows: int = SAMPLED_ROWS) -> Sample:
    """The first rows of each dataset of a set, as training would see them; nothing is written."""
    worker = ChunkWorker([task.job for task in tasks])
    found = []
    read, total = 0, 0
    known = True
    for index, task in enumerate(tasks):
        if task.set_name != set_name:
            continue
        for chunk in islice(chunks(task.source, 0), max(1, rows // CHUNK_ROWS)):
            found.append(worker.process(index, chunk).rows)
            read += len(chunk)
        known = known and task.source.rows is not None
        total += task.source.rows or 0
    empty = np.zeros(0, np.int32)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(each, name) for each in found] or [empty])

    return Sample(
        joined("ids"), joined("labels"), joined("lengths"), joined("trained"), read, total if known else None
    )
