"""What a tracker is told about a run beside its figures: config, fingerprint of the data, git state, environment."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

MLFLOW_BATCH, MLFLOW_LONGEST = 100, 500  # parameters in one call, and characters in one of them


def flat(values: Mapping[str, Any], above: str = "axolotl") -> dict[str, Any]:
    """Nested mappings as one, names joined by slashes: `axolotl/data/plan`. Lists become JSON."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}/{key}"
        if isinstance(value, Mapping):
            found |= flat(value, name)
        elif isinstance(value, list | tuple):
            found[name] = json.dumps(value, ensure_ascii=False, default=str)
        else:
            found[name] = value
    return found


def _tensorboard(tracker: Any, facts: Mapping[str, Any]) -> None:
    rows = "\n".join(f"| {name} | {value} |" for name, value in flat(facts).items())
    tracker.tb_writer.add_text("axolotl", f"| what | value |\n|---|---|\n{rows}")
    tracker.tb_writer.flush()


def _wandb(tracker: Any, facts: Mapping[str, Any]) -> None:
    sys.modules["wandb"].config.update(flat(facts), allow_val_change=True)


def _trackio(tracker: Any, facts: Mapping[str, Any]) -> None:
    sys.modules["trackio"].config.update(flat(facts), allow_val_change=True)


def _mlflow(tracker: Any, facts: Mapping[str, Any]) -> None:
    items = [(name, str(value)[:MLFLOW_LONGEST]) for name, value in flat(facts).items()]
    for at in range(0, len(items), MLFLOW_BATCH):
        sys.modules["mlflow"].log_params(dict(items[at : at + MLFLOW_BATCH]))


def _comet(tracker: Any, facts: Mapping[str, Any]) -> None:
    tracker._experiment.log_parameters(flat(facts))


RECORDERS: Mapping[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
    "comet_ml": _comet,
}
"""Tracker, as transformers names it → how it takes them, given its callback after the run has begun there."""


def finish(name: str) -> None:
    """Ends a tracker's run where its callback leaves it open, so that the next one of this process is another."""
    if name == "wandb":
        sys.modules["wandb"].finish()
