"""Experiment trackers: which ones a config asks for, and the environment in which they find their settings."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from axolotl.config.output import OutputSection
from axolotl.config.tracking import TrackingSection
from axolotl.errors import EnvironmentProblem, Problem

PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "trackio": "trackio",
}
"""Tracker, as transformers names it, and the package it needs."""


def trackers(tracking: TrackingSection) -> list[str]:
    """The trackers asked for, by transformers' names; none unless the config says so.

    Raises EnvironmentProblem, with all of them at once, for packages that are not installed.
    """
    asked = {
        "tensorboard": tracking.use_tensorboard,
        "wandb": bool(tracking.wandb_project) if tracking.use_wandb is None else tracking.use_wandb,
        "mlflow": bool(tracking.mlflow_experiment_name)
        if tracking.use_mlflow is None
        else tracking.use_mlflow,
        "comet_ml": bool(tracking.comet_project_name) if tracking.use_comet is None else tracking.use_comet,
        "trackio": bool(tracking.trackio_project_name)
        if tracking.use_trackio is None
        else tracking.use_trackio,
    }
    found = [name for name, on in asked.items() if on]
    missing = [name for name in found if importlib.util.find_spec(PACKAGES[name]) is None]
    if missing:
        raise EnvironmentProblem(
            Problem(
                f"Tracking with `{name}` needs the package `{PACKAGES[name]}`, which is not installed.",
                f"Install it with: pip install 'axolotl[{name.removesuffix('_ml')}]'",
                "environment",
            )
            for name in missing
        )
    return found


def tracking_environment(tracking: TrackingSection, output: OutputSection) -> dict[str, str]:
    """The variables that the trackers read. A key of the config wins over the environment."""
    values: Mapping[str, object] = {
        "WANDB_PROJECT": tracking.wandb_project,
        "WANDB_ENTITY": tracking.wandb_entity,
        "WANDB_NAME": tracking.wandb_name,
        "WANDB_RUN_ID": tracking.wandb_run_id,
        "WANDB_RESUME": "allow" if tracking.wandb_run_id else None,
        "WANDB_MODE": tracking.wandb_mode,
        "WANDB_WATCH": tracking.wandb_watch,
        "WANDB_LOG_MODEL": tracking.wandb_log_model,
        "MLFLOW_TRACKING_URI": tracking.mlflow_tracking_uri,
        "MLFLOW_EXPERIMENT_NAME": tracking.mlflow_experiment_name,
        "MLFLOW_RUN_NAME": tracking.mlflow_run_name,
        "HF_MLFLOW_LOG_ARTIFACTS": _flag(tracking.hf_mlflow_log_artifacts),
        "COMET_API_KEY": tracking.comet_api_key,
        "COMET_WORKSPACE": tracking.comet_workspace,
        "COMET_PROJECT_NAME": tracking.comet_project_name,
        "COMET_EXPERIMENT_KEY": tracking.comet_experiment_key,
        "COMET_START_MODE": tracking.comet_mode,
        "COMET_START_ONLINE": _flag(tracking.comet_online),
        "TRACKIO_PROJECT": tracking.trackio_project_name,
        "TRACKIO_RUN_NAME": tracking.trackio_run_name,
        "TRACKIO_SPACE_ID": tracking.trackio_space_id,
        "TENSORBOARD_LOGGING_DIR": str(Path(output.output_dir) / "runs")
        if tracking.use_tensorboard
        else None,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def start_tracking(tracking: TrackingSection, output: OutputSection) -> list[str]:
    """Sets the trackers' environment for this process and returns their names."""
    names = trackers(tracking)
    os.environ.update(tracking_environment(tracking, output))
    return names


def _flag(value: bool | None) -> str | None:
    return None if value is None else str(value).lower()
