"""Experiment trackers: which ones a config asks for, where they find their settings, and how they cannot stop a run."""

from __future__ import annotations

import copy
import os
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import TrainerCallback

from axolotl.config.output import OutputSection
from axolotl.config.tracking import TrackingSection
from axolotl.errors import EnvironmentProblem, Problem
from axolotl.registry import missing_extra
from axolotl.train.provenance import RECORDERS, finish

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
    missing = check(tracking)
    if missing:
        raise EnvironmentProblem(missing)
    return list(_asked(tracking))


def check(tracking: TrackingSection) -> list[Problem]:
    """What this machine lacks for the trackers that were asked for."""
    return [
        problem
        for name, key in _asked(tracking).items()
        for problem in missing_extra(
            PACKAGES[name], name.removesuffix("_ml"), f"Tracking with `{name}` (`{key}`)", key
        )
    ]


def _asked(tracking: TrackingSection) -> dict[str, str]:
    """The trackers asked for, each with the key that asks: a switch, or the name of a project where it is not set."""
    asked = {"tensorboard": "use_tensorboard"} if tracking.use_tensorboard else {}
    for name, switch, project in (
        ("wandb", "use_wandb", "wandb_project"),
        ("mlflow", "use_mlflow", "mlflow_experiment_name"),
        ("comet_ml", "use_comet", "comet_project_name"),
        ("trackio", "use_trackio", "trackio_project_name"),
    ):
        wanted = getattr(tracking, switch)
        if wanted or (wanted is None and getattr(tracking, project)):
            asked[name] = switch if wanted else project
    return asked


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


def guarded(
    names: list[str], tracking: TrackingSection, facts: Mapping[str, Any], tell: Callable[[str], None]
) -> list[Guarded]:
    """The trackers as callbacks that cannot stop a run: each works in a thread of its own.

    `facts` about the run are recorded with each (see `provenance`).
    """
    return [
        Guarded(name, tell, arguments=_arguments(name, tracking), facts=facts, wait=tracking.tracker_timeout)
        for name in names
    ]


def _arguments(name: str, tracking: TrackingSection) -> dict[str, Any]:
    """The training arguments that a tracker's callback reads, where they are not the environment's."""
    names = {
        "wandb": tracking.wandb_name,
        "mlflow": tracking.mlflow_run_name,
        "trackio": tracking.trackio_run_name,
    }
    values: dict[str, Any] = {"run_name": names.get(name)}
    if name == "trackio":
        values |= {"project": tracking.trackio_project_name, "trackio_space_id": tracking.trackio_space_id}
        # Without a Space nothing is to be published at the end.
        values |= {} if tracking.trackio_space_id else {"trackio_static_space_id": False}
    return {key: value for key, value in values.items() if value is not None}


class Guarded(TrainerCallback):
    """Passes on to a tracker what happens, in a thread of its own.

    A tracker that raises is told of and left out after three times; one that does not answer is left behind.
    """

    PATIENCE = 3
    QUEUED = 10_000

    def __init__(
        self,
        name: str,
        tell: Callable[[str], None],
        make: Callable[[], TrainerCallback] | None = None,
        *,
        arguments: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        wait: float = 60.0,
    ) -> None:
        self.name, self.tell, self.wait = name, tell, wait
        self.make = make or (lambda: get_reporting_integration_callbacks([name])[0]())
        self.arguments, self.facts = arguments or {}, facts
        self.failures, self.off = 0, False
        self.deferred = False
        """Checkpoints are written by a thread, which says when one is there (see `saved`)."""
        self.orders: queue.Queue[Any] = queue.Queue(self.QUEUED)
        self.done = threading.Event()
        self.thread: threading.Thread | None = None

    @property
    def stuck(self) -> bool:
        """It was left behind in the middle of something, which may keep the process from ending."""
        return self.off and self.thread is not None and self.thread.is_alive()

    def _work(self) -> None:
        try:
            tracker = self.make()
        except BaseException as error:
            return self._leave(f"cannot be started: {type(error).__name__}: {error}")
        while not self.off:
            order = self.orders.get()
            if order is None:
                self.done.set()
                continue
            event, args, state, control, kwargs = order
            try:
                getattr(tracker, event)(args, state, control, **kwargs)
                if event == "on_train_begin" and self.facts is not None:
                    RECORDERS[self.name](tracker, self.facts)
                elif event == "on_train_end":
                    finish(self.name)
                self.failures = 0
            except BaseException as error:
                self.failures += 1
                if self.failures >= self.PATIENCE:
                    return self._leave(
                        f"failed {self.failures} times on end: {type(error).__name__}: {error}"
                    )
        return None

    def _leave(self, why: str) -> None:
        self.off = True
        self.done.set()
        self.tell(f"The tracker {self.name} {why}. Training goes on without it; run.jsonl has every figure.")

    def _pass(self, event: str, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        if self.off:
            return
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
            self.thread.start()
        if self.arguments:
            args = copy.copy(args)
            for key, value in self.arguments.items():
                setattr(args, key, value)
        # The training loop goes on writing into these.
        kwargs = {k: copy.copy(v) if k in ("logs", "metrics") else v for k, v in kwargs.items()}
        try:
            self.orders.put_nowait((event, args, copy.copy(state), copy.copy(control), kwargs))
        except queue.Full:
            self._leave("does not answer")

    def _wait(self) -> None:
        if self.off:
            return
        self.done.clear()
        self.orders.put(None)
        if not self.done.wait(self.wait):
            self._leave(f"has not answered for {self.wait:.0f} seconds")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass("on_train_begin", args, state, control, kwargs)
        self._wait()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass("on_train_end", args, state, control, kwargs)
        self._wait()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass("on_log", args, state, control, kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass("on_evaluate", args, state, control, kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.deferred:
            self._pass("on_save", args, state, control, kwargs)

    def saved(self, args: Any, state: Any, control: Any) -> None:
        """A checkpoint of this state is on the disk."""
        self._pass("on_save", args, state, control, {})
