"""The datasets of a config, opened: what is known before any row is read, and what the prepared rows depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.config.secrets import without_secrets
from axolotl.console import show_problem
from axolotl.data import cache
from axolotl.data.filters import Limits
from axolotl.data.formats import Format, check_fields, resolve_format
from axolotl.data.render import Renderer, build_renderer
from axolotl.data.shards import Part
from axolotl.data.sources import FileSource, Source, open_source
from axolotl.data.work import ChunkWorker, Job, TokenizerFacts, row_problem
from axolotl.errors import DataError, Place, Problem, UserError

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry


FIRST_ROWS = 256
"""Rows of a dataset that are looked at where another one cannot be opened."""


@dataclass
class Task:
    """One dataset entry, opened."""

    key: str
    set_name: str
    number: int
    """Position of the entry in its list."""
    entry: DatasetEntry
    source: Source
    format: Format
    renderer: Renderer
    job: Job
    parts: list[Part] = field(default_factory=list)
    places: Callable[[str], Place] = Place
    """Where a key stands in the config."""

    @property
    def name(self) -> str:
        return str(without_secrets(self.entry.path) or self.key)


def open_tasks(
    data: DataSection, tokenizer: Any, places: Callable[[str], Place], seed: int, *, endless: bool = False
) -> list[Task]:
    """Opens every dataset and checks what can be known before its rows are read; all mistakes come together.

    `endless`: datasets of the Hub are read over the network as training goes on, instead of downloaded first.
    """
    tasks: list[Task] = []
    sound: list[Task] = []
    problems: list[Problem] = []
    facts = TokenizerFacts.of(tokenizer)
    eval_len = data.eval_sequence_len or data.sequence_len
    eval_data = data.model_copy(update={"sequence_len": eval_len})
    entries = [(f"datasets[{i}]", "train", i, e, data) for i, e in enumerate(data.datasets)]
    entries += [
        (f"test_datasets[{i}]", f"test_{i}", i, e, eval_data) for i, e in enumerate(data.test_datasets)
    ]
    for key, set_name, number, entry, section in entries:
        try:
            default = "train" if set_name == "train" else "test"
            source = open_source(
                entry, section, places(key), default_split=default, seed=seed, endless=endless
            )
            columns = list(source.columns)
            format_ = resolve_format(entry, columns, section, places(f"{key}.type"))
            renderer = build_renderer(facts, section, entry)
            unfit = check_fields(format_, columns, entry, places(key))
            found = (
                [unfit] if unfit else [of_entry(p, entry, key, places, section) for p in renderer.problems()]
            )
            problems += found
        except UserError as error:
            here = (places(key),)
            problems += [p if p.places or p.keys else replace(p, places=here) for p in error.problems]
            continue
        limits = Limits(
            2 if data.min_sample_len is None else data.min_sample_len,
            section.sequence_len,
            data.excess_length_strategy or "drop",
        )
        job = Job(section, entry, columns, limits, facts)
        task = Task(key, set_name, number, entry, source, format_, renderer, job, places=places)
        tasks.append(task)
        if not any(p.fatal for p in found):
            sound.append(task)
    problems = list(dict.fromkeys(problems))
    if any(p.fatal for p in problems):
        for task in sound:
            problems += _first_rows(task)
        raise DataError(problems)
    for problem in problems:
        show_problem(problem)
    if not tasks:
        raise DataError(
            "the config names no dataset.", "Add at least one entry under `datasets`.", places("datasets")
        )
    return tasks


def _first_rows(task: Task) -> list[Problem]:
    """What is wrong with the first rows of a dataset on this machine, told beside what is wrong with the others."""
    if not isinstance(task.source, FileSource):
        return []
    try:
        batch = next(task.source.batches(FIRST_ROWS), [])
        result = ChunkWorker([task.job]).process(
            0, [((row_id.file, row_id.row), row) for row_id, row in batch]
        )
    except UserError as error:
        return list(error.problems)
    return [row_problem(failure) for failure in result.failures]


def of_entry(
    problem: Problem, entry: DatasetEntry, key: str, places: Callable[[str], Place], data: DataSection
) -> Problem:
    """A problem of a dataset with the place of the option that the dataset itself sets, or else the whole config."""
    if problem.places:
        return problem
    own = next((k for k in problem.keys if k in entry.model_fields_set), None)
    if own is not None:
        return replace(problem, places=(places(f"{key}.{own}"),), keys=(f"{key}.{own}",))
    shared = next((k for k in problem.keys if k in data.model_fields_set), None)
    return problem if shared is None else replace(problem, places=(places(shared),))


def fingerprint_parts(
    data: DataSection, tokenizer: Any, tasks: list[Task], seed: int, root: Path
) -> dict[str, str]:
    """All that decides the prepared rows, by the names that a user is told when one changes."""
    parts = {
        "the version of the preparation": str(cache.FORMAT_VERSION),
        "the tokenizer": cache.tokenizer_digest(tokenizer),
        **cache.option_parts(data),
        **cache.template_parts(data),
    }
    for task in tasks:
        parts |= cache.entry_parts(task.entry, task.key)
        for what, value in cache.content_digests(task.source, root).items():
            parts[f"{cache.CONTENT}{what}"] = value
        if task.entry.shards:
            parts["the seed"] = str(seed)
        for what, value in task.renderer.fingerprint_parts().items():
            parts[f"{what} of {task.key}"] = cache.digest(value)
        parts |= cache.code_parts(task.entry)
    return parts
