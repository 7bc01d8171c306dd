"""The first rows of a stream, prepared on disk, so that they can be looked at as all other data is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from axolotl.console import note
from axolotl.data import cache
from axolotl.data.ledger import DatasetSummary, summary_lines
from axolotl.data.prepare import finish, prepare_tasks, tell_remarks
from axolotl.data.prepared import Prepared
from axolotl.data.readers import RowId
from axolotl.data.sources import Row, Source, size
from axolotl.data.stream import Stream, streamed_entries, without_streams

if TYPE_CHECKING:
    from axolotl.config.data import DataSection

FOLDER = "stream-sample"
SAMPLE_ROWS = 1000
SAMPLE_SIZE = 1 << 24
"""Characters of text after which a sample ends, however few rows it has."""


class Head(Source):
    """The first rows of a source, after those that `skip` leaves out."""

    def __init__(self, source: Source, skip: int) -> None:
        self.source, self.skip, self.label = source, skip, source.label

    @property
    def columns(self) -> tuple[str, ...]:
        return self.source.columns

    def fingerprint_parts(self) -> dict[str, str]:
        return {}  # made anew each time

    def stream(self, start: int = 0) -> Iterator[tuple[RowId, Row]]:
        held = 0
        for item in islice(self.source.stream(self.skip + start), max(0, SAMPLE_ROWS - start)):
            yield item
            held += size(item[1])
            if held >= SAMPLE_SIZE:
                return


def prepare_sample(stream: Stream, data: DataSection, *, seed: int) -> Prepared:
    """Prepares the first rows of each streamed dataset in a folder of their own, which the next sample replaces.

    Raises what `prepare` raises.
    """
    root = Path(data.dataset_prepared_path or cache.DEFAULT_FOLDER)
    final = root / FOLDER
    for task, skip in zip(stream.tasks, stream.skips, strict=True):
        task.source = Head(task.source, skip)
    entries = [entry for _, entry, _ in streamed_entries(data)]
    held = without_streams(data).model_copy(
        update={"datasets": entries, "test_datasets": [], "val_set_size": 0}
    )
    with cache.preparing(
        root, FOLDER, lambda: note("another process takes a sample here; waiting for it")
    ) as partial:
        for left in partial.iterdir():
            if left.is_dir():
                cache.remove(left)
        manifest = prepare_tasks(held, stream.tasks, cache.option_parts(held), partial, workers=1)
        cache.remove(final)
        finish(partial, final, manifest)
    summaries = tuple(DatasetSummary.from_dict(s) for s in manifest["datasets"])
    note("of the stream, its first rows:")
    for line in summary_lines(summaries):
        note(line)
    tell_remarks(stream.tasks, summaries)
    return Prepared(final, FOLDER, held, seed, summaries, False)
