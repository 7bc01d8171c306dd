"""Where rows went: a dataset of which none is left, and one that lost more than the config allows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from axolotl.data.filters import Limits
from axolotl.data.ledger import Counts, DatasetSummary, Reason
from axolotl.errors import DataError, Problem

if TYPE_CHECKING:
    from axolotl.config.data import DataSection


def nothing_left(name: str, key: str, counts: Counts, tokens: np.ndarray, limits: Limits) -> Problem:
    """The mistake of a dataset without a row that is left. `tokens`: lengths of rows that it had, before any was cut."""
    if not counts.read:
        return Problem(
            f"`{name}` has no rows.", "Check the file, and `split`.", kind="data", keys=(key,) if key else ()
        )
    dropped = sorted(counts.dropped.items(), key=lambda item: -item[1])
    why = ", ".join(f"{n:,} {reason}" for reason, n in dropped)
    message = f"no row of `{name}` is left: {why}."
    most = dropped[0][0] if dropped else ""
    tokens = tokens[tokens > 0]
    if len(tokens) and most in (Reason.LONG.text, Reason.SHORT.text, Reason.UNTRAINED_AFTER_CUT.text):
        message += (
            f" They have {int(tokens.min()):,} to {int(tokens.max()):,} tokens, {int(np.median(tokens)):,} in the "
            f"middle; `sequence_len` is {limits.longest:,}, `min_sample_len` {limits.shortest:,}."
        )
    return Problem(message, _remedy(most, tokens), kind="data", keys=(key,) if key else ())


def _remedy(most: str, tokens: np.ndarray) -> str:
    longest = int(tokens.max()) if len(tokens) else 0
    middle = int(np.median(tokens)) if len(tokens) else 0
    return {
        Reason.LONG.text: f"`sequence_len: {longest}` keeps all of them, {middle} half; or set "
        "`excess_length_strategy: truncate`.",
        Reason.SHORT.text: f"Lower `min_sample_len`: to {middle} for half of them.",
        Reason.UNTRAINED.text: "Check that answers are not empty, and `roles_to_train`, `train_on_inputs` and the "
        "rows' own training marks.",
        Reason.UNTRAINED_AFTER_CUT.text: f"Raise `sequence_len`: the answers begin after it. {longest} keeps all rows "
        "whole.",
        Reason.DUPLICATE.text: "All its rows occur in an earlier dataset: remove the entry.",
    }.get(most, "Check the file, and `split`.")


def check_dropped(data: DataSection, summaries: Iterable[DatasetSummary]) -> None:
    """Raises DataError for each dataset that lost a larger share of its rows than max_dropped_fraction."""
    limit = data.max_dropped_fraction
    if limit is None:
        return
    problems = []
    for s in summaries:
        c = s.counts
        if c.dropped_rows > limit * c.read:
            why = ", ".join(f"{n:,} {reason}" for reason, n in sorted(c.dropped.items()))
            problems.append(
                Problem(
                    f"{c.dropped_rows:,} of {c.read:,} rows of `{s.name}` were dropped ({c.dropped_rows / c.read:.1%}: "
                    f"{why}), more than `max_dropped_fraction` {limit:g} allows.",
                    "Mend the data or the limits that dropped them, or raise `max_dropped_fraction`.",
                    kind="data",
                    keys=("max_dropped_fraction",),
                )
            )
    if problems:
        raise DataError(problems)
