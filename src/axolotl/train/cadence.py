"""At which steps a run evaluates and saves: exact step numbers, computed from the exact length of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from axolotl.config.train import TrainSection
from axolotl.errors import ConfigError, Problem


@dataclass(frozen=True)
class Cadence:
    """Steps, counted from 1, after which something happens."""

    evaluate: frozenset[int]
    save: frozenset[int]


def cadence(train: TrainSection, steps_per_epoch: int, total_steps: int, *, has_eval_data: bool) -> Cadence:
    """When a run of `total_steps` evaluates and saves.

    `n` times per epoch means at the n equal parts of each epoch, its end included. Whoever evaluates or saves at all
    does so after the last step too. With eval data and no word on when, there is one evaluation per epoch; with no
    word on saving, one checkpoint per epoch. Raises ConfigError for `steps` without a number of steps.
    """
    evaluate = frozenset[int]()
    if has_eval_data:
        evaluate = _points(
            train.eval_strategy, train.eval_steps, train.evals_per_epoch, "eval", steps_per_epoch, total_steps
        )
    save = frozenset[int]()
    if train.save_strategy != "best":
        save = _points(
            train.save_strategy, train.save_steps, train.saves_per_epoch, "save", steps_per_epoch, total_steps
        )
        if save and train.load_best_model_at_end:
            # The best evaluation can only be returned to where its weights were saved.
            save |= evaluate
    if train.save_first_step:
        save |= {1}
    return Cadence(evaluate, save)


def _points(
    strategy: str | None,
    steps: float | None,
    per_epoch: int | None,
    word: str,
    steps_per_epoch: int,
    total_steps: int,
) -> frozenset[int]:
    if strategy == "no" or per_epoch == 0:
        return frozenset()
    if steps is not None:
        interval = math.ceil(round(total_steps * steps, 6)) if steps < 1 else int(steps)
        return frozenset(range(interval, total_steps + 1, interval)) | {total_steps}
    if strategy == "steps":
        raise ConfigError(
            Problem(
                f"`{word}_strategy: steps` does not say how many.",
                f"Set `{word}_steps`, or use `{word}s_per_epoch`.",
                "missing",
                (f"{word}_strategy", f"{word}_steps"),
            )
        )
    parts = per_epoch or 1
    epochs = math.ceil(total_steps / steps_per_epoch)
    # Half a step is rounded up; more parts than steps mean every step.
    points = {max(1, (2 * k * steps_per_epoch + parts) // (2 * parts)) for k in range(1, epochs * parts + 1)}
    return frozenset(p for p in points if p <= total_steps) | {total_steps}
