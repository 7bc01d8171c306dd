"""From dataset entries to tokenised rows on disk: source → format → render → filter → shards, once for each key.

Only one process prepares at a time; others that want the same data wait and find it. What a killed run has finished is
kept and continued.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl.console import note, show_problem, warn
from axolotl.data import cache
from axolotl.data.dropped import check_dropped, nothing_left
from axolotl.data.filters import SeenRows, drop_rows
from axolotl.data.formats.watch import Watch, unseen_problems
from axolotl.data.ledger import (
    LEDGER_SCHEMA,
    ROWS_SCHEMA,
    Counts,
    DatasetSummary,
    Reason,
    Remarks,
    summary_lines,
    write_parquet,
)
from axolotl.data.mixture import held_out
from axolotl.data.prepared import Prepared
from axolotl.data.progress import Progress
from axolotl.data.shards import (
    Part,
    PartWriter,
    arrange,
    data_file,
    disk_errors_told,
    finished_parts,
    part_batches,
    reveal,
    sync_folder,
    write_whole,
)
from axolotl.data.sources import Source
from axolotl.data.tasks import Task, fingerprint_parts, open_tasks
from axolotl.data.work import Row, row_problem
from axolotl.data.workers import Engine, worker_count
from axolotl.errors import DataError, Place, Problem

if TYPE_CHECKING:
    from axolotl.config.data import DataSection

CHUNK_ROWS = 512
"""Input rows that are rendered together. Part of the layout on disk: a change needs a new FORMAT_VERSION."""
MOST_FAILURES = 20
"""Rows that are named before the search for more ends."""


def prepare(
    data: DataSection,
    tokenizer: Any,
    *,
    seed: int = 42,
    places: Callable[[str], Place] | None = None,
    workers: int | None = None,
) -> Prepared:
    """Prepares the datasets of a config, or finds them prepared.

    `places` tells where a key stands in the config; `workers` overrides dataset_num_proc and the number of CPUs. The
    result is the same for any number of workers.

    Raises DataError for data that cannot be used (up to 20 rows are named), ConfigError for options that do not fit it,
    and EnvironmentProblem for a disk that is full; nothing is then left that looks finished.
    """
    root = Path(data.dataset_prepared_path or cache.DEFAULT_FOLDER)
    tasks = open_tasks(data, tokenizer, places or (lambda key: Place(key)), seed)
    parts = fingerprint_parts(data, tokenizer, tasks, seed, root)
    name = cache.fingerprint(parts)
    final = root / name
    manifest = cache.read_manifest(final)
    reused = manifest is not None
    if manifest is None:
        why = cache.explain_miss(root, name, parts)
        if why:
            note(f"preparing again: {why}")
        with cache.preparing(
            root, name, lambda: note("another process prepares this data; waiting for it")
        ) as partial:
            manifest = cache.read_manifest(final)
            if manifest is None:
                if final.exists():
                    note(f"the prepared data in {final} is damaged; preparing it again")
                    cache.remove(final)
                manifest = prepare_tasks(
                    data, tasks, parts, partial, workers or worker_count(data.dataset_num_proc)
                )
                finish(partial, final, manifest)
    summaries = tuple(DatasetSummary.from_dict(s) for s in manifest["datasets"])
    if reused:
        note(f"prepared data found in {final}")
    for line in summary_lines(summaries):
        note(line)
    tell_remarks(tasks, summaries)
    check_dropped(data, summaries)
    train = sum(s.counts.rows for s in summaries if s.set == "train")
    if train and not data.dataset_shard_num:
        held_out(train, data.val_set_size)
    return Prepared(final, name, data, seed, summaries, reused)


def prepare_tasks(
    data: DataSection, tasks: list[Task], parts: dict[str, str], partial: Path, workers: int
) -> dict[str, Any]:
    """Does the work in `partial` and returns the manifest. Finished shards of an earlier run are taken over."""
    with disk_errors_told(partial):
        started = _read_json(partial / cache.MANIFEST)
        if started is not None:  # killed while it was tidying up: all rows are there
            return started
        engine = Engine([task.job for task in tasks], workers)
        failures: list[Problem] = []
        try:
            for set_name in dict.fromkeys(task.set_name for task in tasks):
                mine = [t for t in tasks if t.set_name == set_name]
                _prepare_set(
                    partial / set_name, mine, engine, bool(data.dataset_exact_deduplication), failures
                )
            if failures:
                raise DataError(_told(failures))
            _check_unseen(tasks)
        except DataError:
            # Shards of data that has to change are of no use to anyone.
            cache.remove(partial)
            raise
        finally:
            engine.close()
        summaries = [_summary(task) for task in tasks]
        try:
            _check_empty(partial, tasks, summaries)
            _check_unchanged(tasks, parts)
        except DataError:
            cache.remove(partial)
            raise
        check_dropped(data, summaries)
        return _write_manifest(partial, tasks, summaries, parts)


def _prepare_set(
    folder: Path, tasks: list[Task], engine: Engine, deduplicate: bool, failures: list[Problem]
) -> None:
    """Writes the shards of one set (train, test_0, ...). What cannot be used is added to `failures`."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.new"):
        left.unlink()
    for task in tasks:
        task.parts = finished_parts(folder, task.number)
    taken = [p for task in tasks for p in task.parts]
    seen = SeenRows(folder / "seen.sqlite") if deduplicate else None
    if taken:
        note(f"going on after {sum(p.counts.read for p in taken):,} rows that an earlier run had prepared")
        for batch in part_batches(folder, taken, "rows") if seen else ():
            seen.add(batch.column("key").to_numpy())  # type: ignore[union-attr]
    totals = Counts()
    for task in tasks:
        totals = sum((p.counts for p in task.parts), totals)
        if not (task.parts and task.parts[-1].last):
            totals = _prepare_dataset(folder, task, engine, seen, totals, failures)
    if seen:
        seen.close()


def _prepare_dataset(
    folder: Path,
    task: Task,
    engine: Engine,
    seen: SeenRows | None,
    totals: Counts,
    failures: list[Problem],
) -> Counts:
    """Writes the remaining shards of one dataset. `totals`: what the set's folder holds before; returns it with these.

    Nothing more is written once there are `failures`, to which those of this dataset are added.
    """
    already = sum(p.counts.read for p in task.parts)
    progress = Progress(f"preparing {task.name}", lambda: task.source.rows, already)
    writer: PartWriter | None = None

    def close(last: bool) -> None:
        nonlocal writer, totals
        if writer is None:
            writer = new_writer()
        if last:
            writer.part.remarks.blank_lines = task.source.blank_lines
        task.parts.append(writer.close(last))
        totals = totals + writer.part.counts
        writer = None

    def new_writer() -> PartWriter:
        return PartWriter(folder, task.set_name, task.number, len(task.parts), totals.rows, totals.read)

    try:
        for result in engine.map(task.job, chunks(task.source, already)):
            progress.advance(len(result.rows.ledger.row))
            failures += map(row_problem, result.failures)
            if len(failures) > MOST_FAILURES:
                break
            if failures:  # this data has to change first
                continue
            rows = (
                result.rows
                if seen is None
                else drop_rows(result.rows, seen.add(result.rows.keys), Reason.DUPLICATE)
            )
            writer = writer or new_writer()
            writer.add(rows)
            writer.part.remarks += Remarks(
                dict(result.notes), sorted(result.watch.unseen), sorted(result.watch.keys)
            )
            if writer.full:
                close(last=False)
        if not failures:
            close(last=True)
    except DataError as error:  # the file itself is damaged: the other datasets may have mistakes too
        failures += error.problems
    finally:
        if writer is not None:
            writer.abandon()
        progress.close()
    return totals


def chunks(source: Source, start: int) -> Iterator[list[Row]]:
    """The rows of a source after the first `start`, in chunks; row ids as plain tuples, which travel quickly."""
    for batch in source.batches(CHUNK_ROWS, start):
        yield [((row_id.file, row_id.row), row) for row_id, row in batch]


def _unseen(task: Task, remarks: Remarks) -> list[Problem]:
    watch = Watch(set(remarks.unseen or ()), set(remarks.keys))
    return unseen_problems(task.entry, watch, task.name, task.key, task.places)


def _check_unseen(tasks: list[Task]) -> None:
    """Raises DataError where a mark of training that no message has is a misspelt key of theirs."""
    problems = [p for task in tasks for p in _unseen(task, sum((q.remarks for q in task.parts), Remarks()))]
    if any(p.fatal for p in problems):
        raise DataError(problems)


def tell_remarks(tasks: Iterable[Task], summaries: Iterable[DatasetSummary]) -> None:
    """Tells what the user may not have meant, of rows that were prepared now or earlier."""
    for task, summary in zip(tasks, summaries, strict=True):
        remarks = summary.remarks
        for problem in _unseen(task, remarks):
            show_problem(problem)
        for what, turns in remarks.left_out.items():
            warn(f"{task.name}: {what} ({turns:,} times): they are not in the training text.")
        if remarks.blank_lines:
            note(f"{task.name}: {remarks.blank_lines:,} blank lines skipped")


def tell_unseen(task: Task, watch: Watch) -> None:
    """Tells of keys that options name and no message has. Raises DataError where one is a mark of training misspelt."""
    problems = unseen_problems(task.entry, watch, task.name, task.key, task.places)
    if any(p.fatal for p in problems):
        raise DataError(problems)
    for problem in problems:
        show_problem(problem)


def _told(failures: list[Problem]) -> list[Problem]:
    """The first problems, and a word where there are more."""
    if len(failures) <= MOST_FAILURES:
        return failures
    more = Problem("more rows cannot be used; the search stopped here.", kind="data")
    return [*failures[:MOST_FAILURES], more]


def _summary(task: Task) -> DatasetSummary:
    counts = sum((p.counts for p in task.parts), Counts())
    remarks = sum((p.remarks for p in task.parts), Remarks())
    return DatasetSummary(task.set_name, task.number, task.name, task.format.name, counts, remarks)


def _check_empty(partial: Path, tasks: list[Task], summaries: list[DatasetSummary]) -> None:
    """Raises DataError for each dataset of which no row is left."""
    problems = []
    for task, summary in zip(tasks, summaries, strict=True):
        if summary.counts.rows:
            continue
        lines = part_batches(partial / task.set_name, task.parts, "ledger")
        tokens = [batch.column("tokens").to_numpy() for batch in lines]
        lengths = np.concatenate([np.empty(0, np.int64), *tokens])
        problems.append(nothing_left(task.name, task.key, summary.counts, lengths, task.job.limits))
    if problems:
        raise DataError(problems)


def _check_unchanged(tasks: list[Task], parts: dict[str, str]) -> None:
    """Raises DataError where a file is no longer what the key says: its rows may be of both states."""
    for task in tasks:
        for what, value in task.source.fingerprint_parts().items():
            if parts.get(f"{cache.CONTENT}{what}") != value:
                raise DataError(f"`{what}` changed while it was read.", "Start again when it is complete.")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return value
    except (OSError, ValueError):
        return None


def _write_manifest(
    partial: Path, tasks: list[Task], summaries: list[DatasetSummary], parts: dict[str, str]
) -> dict[str, Any]:
    """Writes ledger, lengths, summary, and last the manifest: with it, all that is left to do is to rename."""
    sets: dict[str, list[Part]] = {}
    for task in tasks:
        sets.setdefault(task.set_name, []).extend(task.parts)
    ledger = (b for name, ps in sets.items() for b in part_batches(partial / name, ps, "ledger"))
    write_parquet(partial / "ledger.parquet", LEDGER_SCHEMA, ledger)
    for name, ps in sets.items():
        write_parquet(partial / f"{name}.rows.parquet", ROWS_SCHEMA, part_batches(partial / name, ps, "rows"))
    described = [s.as_dict() for s in summaries]
    write_whole(partial / "summary.json", json.dumps({"datasets": described}, indent=2, ensure_ascii=False))
    files: dict[str, int] = {}
    for name, ps in sets.items():
        shards = arrange_names(ps)
        files |= {f"{name}/{target}": part.sizes["arrow"] for target, part in shards}
        files[f"{name}.rows.parquet"] = (partial / f"{name}.rows.parquet").stat().st_size
    manifest = {
        "version": cache.FORMAT_VERSION,
        "parts": parts,
        "datasets": described,
        "sets": {name: [p.stem for p in ps if p.counts.rows] for name, ps in sets.items()},
        "files": files,
    }
    write_whole(partial / cache.MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False))
    return manifest


def arrange_names(parts: list[Part]) -> list[tuple[str, Part]]:
    """The shards that hold rows, with their final names."""
    shards = [p for p in parts if p.counts.rows]
    return [(data_file(i, len(shards)), part) for i, part in enumerate(shards)]


def finish(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Renames shards and folder; may be interrupted and repeated at any point."""
    with disk_errors_told(partial):
        for name, stems in manifest["sets"].items():
            arrange(partial / name, stems, final.name)
        now = time.time_ns()
        for i, name in enumerate(manifest["sets"]):
            reveal(partial / name, now + i * 1_000_000)
        sync_folder(partial)
        partial.rename(final)
        sync_folder(final.parent)
