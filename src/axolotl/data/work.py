"""What is done to one chunk of input rows: format, render, filter. The same code runs in the program and in its workers.

This file and what it imports stay free of torch, transformers and datasets: a worker is small and starts quickly.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.data.filters import FilteredRows, Limits, filter_rows
from axolotl.data.formats import resolve_format
from axolotl.data.formats.watch import Watch
from axolotl.data.render import build_renderer
from axolotl.data.types import FormatValue, Rendered, RowProblem
from axolotl.errors import Place, Problem, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from axolotl.config.data import DataSection, DatasetEntry

Row = tuple[tuple[str, int], dict[str, Any]]
"""(file, row number) and the row."""


@dataclass(frozen=True)
class TokenizerFacts:
    """What rendering reads of a tokenizer. Unlike the tokenizer itself it can be sent to a worker that has no transformers."""

    backend_tokenizer: Tokenizer
    name_or_path: str
    chat_template: Any
    special_tokens_map: dict[str, Any]
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    pad_token_id: int | None

    @classmethod
    def of(cls, tokenizer: Any) -> TokenizerFacts:
        names = cls.__dataclass_fields__
        values: dict[str, Any] = {name: getattr(tokenizer, name, None) for name in names}
        return cls(**values)


@dataclass(frozen=True)
class Job:
    """One dataset entry with all that decides how its rows become tokens."""

    data: DataSection
    entry: DatasetEntry
    columns: list[str]
    limits: Limits
    tokenizer: TokenizerFacts


@dataclass(frozen=True)
class RowFailure:
    """A row that cannot be used, and why."""

    file: str
    row: int
    reason: str
    detail: str = ""
    remedy: str = ""


def row_problem(failure: RowFailure) -> Problem:
    """What is told about a row that cannot be used."""
    detail = f": {failure.detail}" if failure.detail else ""
    return Problem(
        f"row {failure.row}: {failure.reason}{detail}.",
        failure.remedy,
        kind="data",
        places=(Place(failure.file, failure.row),),
    )


@dataclass(slots=True)
class ChunkResult:
    """A chunk's rows, and those of its input rows that end the run."""

    rows: FilteredRows
    failures: list[RowFailure] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    """What the template left out of these rows: a sentence, and the number of turns."""
    watch: Watch = field(default_factory=Watch)
    """Keys of messages that options name and that had not come up after this chunk."""


class ChunkWorker:
    """Turns chunks of rows into tokens. Formats and renderers are built when the first chunk of their job comes."""

    def __init__(self, jobs: Sequence[Job], modules: Sequence[str] = ()) -> None:
        for name in modules:  # where plugins register their formats
            importlib.import_module(name)
        self.jobs = jobs
        self._built: dict[int, tuple[Any, Any]] = {}

    def _tools(self, index: int) -> tuple[Any, Any]:
        if index not in self._built:
            job = self.jobs[index]
            self._built[index] = (
                resolve_format(job.entry, job.columns, job.data),
                build_renderer(job.tokenizer, job.data, job.entry),
            )
        return self._built[index]

    def process(self, index: int, rows: Sequence[Row]) -> ChunkResult:
        """Converts, renders and filters the rows of job `index`."""
        format_, renderer = self._tools(index)
        limits = self.jobs[index].limits
        failures: list[RowFailure] = []
        ids: list[tuple[str, int]] = []
        values: list[FormatValue] = []
        for row_id, row in rows:
            try:
                values.append(format_.convert(row))
                ids.append(row_id)
            except RowProblem as problem:
                failures.append(_failure(row_id, problem))
            except UserError:  # about the format itself, not about this row
                raise
            except Exception as error:
                failures.append(_failure(row_id, _unexpected(f"the format `{format_.name}` failed", error)))
        rendered: list[Sequence[Rendered]] = []
        good: list[tuple[str, int]] = []
        for row_id, result in zip(ids, _render(renderer, values), strict=True):
            if isinstance(result, RowProblem):
                failures.append(_failure(row_id, result))
            else:
                rendered.append(result)
                good.append(row_id)
        filtered, overlong = filter_rows(rendered, good, limits)
        for i in overlong:
            file, number = good[i]
            count = int(filtered.ledger.tokens[i])
            failures.append(
                RowFailure(
                    file,
                    number,
                    "longer than `sequence_len`",
                    f"{count:,} tokens, {limits.longest:,} fit",
                    "Raise `sequence_len`, or set `excess_length_strategy` to `drop` or `truncate`.",
                )
            )
        return ChunkResult(filtered, failures, renderer.take_notes(), format_.watch.copy())


def _render(renderer: Any, values: list[FormatValue]) -> list[list[Rendered] | RowProblem]:
    if not values:
        return []
    try:
        return list(renderer.render_batch(values))
    except UserError:
        raise
    except Exception:
        results: list[list[Rendered] | RowProblem] = []
        for value in values:
            try:
                results += renderer.render_batch([value])
            except UserError:
                raise
            except Exception as error:
                results.append(_unexpected("rendering failed", error))
        return results


def _unexpected(what: str, error: Exception) -> RowProblem:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return RowProblem(what, f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")


def _failure(row_id: tuple[str, int], problem: RowProblem) -> RowFailure:
    return RowFailure(*row_id, problem.reason, problem.detail, problem.remedy)
