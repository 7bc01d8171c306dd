"""What can be wrong with a run's data, files and tokenizer and be seen before any row is prepared; imports no trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from axolotl.config import Config
from axolotl.config.datasets import DatasetEntry
from axolotl.data import templates
from axolotl.data.filters import Limits
from axolotl.data.formats import check_fields, resolve_format
from axolotl.data.ledger import Reason
from axolotl.data.render import build_renderer
from axolotl.data.sources import Source, open_source
from axolotl.data.stream import streamed_entries, streams
from axolotl.data.tasks import of_entry
from axolotl.data.work import ChunkWorker, Job, TokenizerFacts, row_problem
from axolotl.errors import Problem, UserError
from axolotl.model import tokenizer
from axolotl.model.files import check_base_model, local_folder
from axolotl.model.hub import check_hub
from axolotl.model.tokenizer import load_tokenizer
from axolotl.run.parallel_beforehand import facts_of
from axolotl.run.ready import check_folder, placed

FIRST_ROWS = 256
"""Rows of each dataset that are rendered."""


def data_problems(cfg: Config) -> list[Problem]:
    """All mistakes that keep rows from being prepared; where there are any, datasets are opened as well, so that their
    mistakes are told with them."""
    problems = [
        *check_folder(cfg, "dataset_prepared_path", cfg.data.dataset_prepared_path),
        *check_base_model(cfg.model),
        *check_length(cfg),
        *tokenizer.check(cfg.model),
        *templates.check(cfg.data),
    ]
    if any(p.fatal for p in problems):
        problems += [*check_hub(cfg.model.base_model), *dataset_problems(cfg)]
    return [placed(cfg, problem) for problem in problems]


def check_length(cfg: Config) -> Iterator[Problem]:
    """A warning where rows may be longer than the positions that a model on this machine was made for."""
    facts = facts_of(cfg)
    longest = facts.get("max_position_embeddings")
    rope = facts.get("rope_scaling") or facts.get("rope_parameters")
    scaled = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) != "default"
    if not isinstance(longest, int) or scaled or cfg.data.sequence_len <= longest:
        return
    yield cfg.problem(
        f"`sequence_len` is {cfg.data.sequence_len:,}, and the model was made for {longest:,} positions "
        "(`max_position_embeddings`).",
        f"Set `sequence_len: {longest}`, or scale the positions with `overrides_of_model_config: {{rope_scaling: ...}}`.",
        "sequence_len",
        kind="warning",
    )


def dataset_problems(cfg: Config, *, rows: bool = True) -> Iterator[Problem]:
    """What is wrong with the datasets: their files, columns and, where `rows` are looked at, first rows."""
    entries = [(key, entry) for key, entry, _ in streamed_entries(cfg.data)]
    entries += [(f"test_datasets[{i}]", e) for i, e in enumerate(cfg.data.test_datasets)]
    facts = _tokenizer(cfg) if rows else None
    for key, entry in entries:
        try:
            place = cfg.place(f"{key}.path")
            source = open_source(entry, cfg.data, place, endless=streams(cfg.data))
            columns = list(source.columns)
            format_ = resolve_format(entry, columns, cfg.data, cfg.place(f"{key}.type"))
            unfit = check_fields(format_, columns, entry, cfg.place(key))
            found = [unfit] if unfit else first_rows(cfg, key, entry, source, facts) if facts else []
        except UserError as error:
            yield from error.problems
        else:
            yield from found


def _tokenizer(cfg: Config) -> TokenizerFacts | None:
    """The tokenizer, where it lies on this machine; None where it is elsewhere, or is told to be wrong already."""
    if local_folder(cfg.model.tokenizer_config or cfg.model.base_model) is None:
        return None
    try:
        return TokenizerFacts.of(load_tokenizer(cfg.model))
    except UserError:
        return None


def first_rows(
    cfg: Config, key: str, entry: DatasetEntry, source: Source, facts: TokenizerFacts
) -> list[Problem]:
    """What is wrong with the template and the first rows of a dataset on this machine, rendered as training would.

    Raises UserError for an entry that cannot be rendered at all. Reads nothing over a network.
    """
    if not entry.path or not Path(entry.path).expanduser().exists():
        return []
    data = cfg.data
    problems = [
        of_entry(p, entry, key, cfg.place, data) for p in build_renderer(facts, data, entry).problems()
    ]
    if any(p.fatal for p in problems):
        return problems
    batch = next(iter(source.batches(FIRST_ROWS, 0)), [])
    limits = Limits(2, data.sequence_len, data.excess_length_strategy or "drop")
    worker = ChunkWorker([Job(data, entry, list(source.columns), limits, facts)])
    result = worker.process(0, [((row_id.file, row_id.row), row) for row_id, row in batch[:FIRST_ROWS]])
    problems += [row_problem(failure) for failure in result.failures]
    problems += [
        Problem(
            f"`{entry.path}`: {what} ({turns:,} times in the first {len(batch):,} rows): they are not in the training text.",
            "Choose a `chat_template` that writes them: docs/templates.md says which do.",
            kind="warning",
            places=(cfg.place(key),),
        )
        for what, turns in result.notes.items()
    ]
    ledger = result.rows.ledger
    untrained = (Reason.UNTRAINED, Reason.UNTRAINED_AFTER_CUT)
    if len(ledger.row) and all(reason in untrained for reason in ledger.reason):
        problems.append(
            Problem(
                f"nothing is trained in the first {len(ledger.row)} rows of `{entry.path}`.",
                "Look at `roles_to_train`, at marks of training in the rows, and whether `sequence_len` cuts answers off.",
                kind="warning",
                places=(cfg.place(key),),
            )
        )
    return problems
