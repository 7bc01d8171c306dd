"""Training on a Ray cluster (`use_ray: true`): ray.train places the workers and lets them meet; each trains as a process
of a launcher does. https://docs.ray.io/en/latest/train/train.html
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from axolotl import console
from axolotl.config import Config
from axolotl.distributed.failure import lost_a_peer
from axolotl.distributed.group import TIMEOUT
from axolotl.distributed.launch import defaults_for_processes
from axolotl.errors import AxolotlError, EnvironmentProblem, UserError
from axolotl.registry import require_extra
from axolotl.run.train import train

_SETTINGS = {
    # Paths of the config are seen from where `axolotl` was started.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    # What workers print comes here once, as it is.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


def run_on_ray(cfg: Config) -> int:
    """Trains with `ray_num_workers` workers; returns the exit code. What went wrong in a worker is told here, once.

    Raises what the user can mend as UserError, EnvironmentProblem where Ray does not start or has too little.
    """
    os.environ.update(_SETTINGS)
    ray = require_extra("ray", "ray", "`use_ray: true`", "use_ray")
    parts = require_extra("ray.train", "ray", "`use_ray: true`", "use_ray")
    on_torch = require_extra("ray.train.torch", "ray", "`use_ray: true`", "use_ray")
    already, joined = ray.is_initialized(), elsewhere()
    try:
        if not already:
            # Without its dashboard Ray would warn each second that it cannot ask it.
            ray.init(logging_level="error", logging_config=ray.LoggingConfig(log_level="ERROR"))
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise EnvironmentProblem(
            cfg.problem(
                f"Ray does not start, or cannot be reached: {str(error).splitlines()[0]}",
                "`ray status` tells of a cluster; RAY_ADDRESS names another one. Without one, Ray is started here.",
                "use_ray",
                kind="environment",
            )
        ) from error
    try:
        resources, gpus = _resources(cfg, dict(ray.cluster_resources()), may_grow=joined or already)
        trainer = on_torch.TorchTrainer(
            _worker,
            train_loop_config={"cfg": cfg, "folder": os.getcwd()},
            scaling_config=parts.ScalingConfig(
                num_workers=cfg.distributed.ray_num_workers,
                use_gpu=gpus,
                resources_per_worker=resources,
            ),
            run_config=parts.RunConfig(
                name=cfg.distributed.ray_run_name
                or f"axolotl-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
                storage_path=str(Path(cfg.output.output_dir).absolute() / "ray"),
            ),
            torch_config=on_torch.TorchConfig(
                backend="cpu:gloo,cuda:nccl" if gpus else "gloo",
                timeout_s=cfg.distributed.ddp_timeout or TIMEOUT,
            ),
        )
        try:
            trainer.fit()
        except KeyboardInterrupt:
            console.note(
                "Stopped. `--auto-resume-from-checkpoints` goes on from the last checkpoint: Ray gives its workers no "
                "time for another."
            )
            return 128 + signal.SIGINT
        except parts.TrainingFailedError as error:
            return _told(error)
        return 0
    finally:
        if not already:
            ray.shutdown()


def _resources(
    cfg: Config, there: dict[str, float], *, may_grow: bool
) -> tuple[dict[str, float] | None, bool]:
    """What each worker asks for (None: Ray's usual), and whether that is a GPU.

    Raises EnvironmentProblem where a Ray that was started here will never have it; a cluster may grow.
    """
    asked, workers = cfg.distributed.resources_per_worker, cfg.distributed.ray_num_workers
    each = {str(name): float(count) for name, count in (asked or {}).items()}
    gpus = each.get("GPU", 0) > 0 if asked else there.get("GPU", 0) > 0
    needed = each if asked else {"GPU": 1.0} if gpus else {"CPU": 1.0}
    short = {
        name: count for name, count in needed.items() if count and count * workers > there.get(name, 0.0)
    }
    if short:
        name, count = next(iter(short.items()))
        message = f"`ray_num_workers: {workers}` with {count:g} {name} each: Ray has {there.get(name, 0.0):g} {name} in all."
        if not may_grow:
            remedy = "Lower `ray_num_workers` or `resources_per_worker`, or name a cluster with RAY_ADDRESS."
            raise EnvironmentProblem(
                cfg.problem(message, remedy, "ray_num_workers", "resources_per_worker", kind="environment")
            )
        console.warn(f"{message} The workers wait until the cluster has more.")
    return each or None, gpus


def elsewhere() -> bool:
    """Whether there is a cluster to join; without one, Ray is started on this machine."""
    temporary = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    return bool(os.environ.get("RAY_ADDRESS")) or (temporary / "ray" / "ray_current_cluster").exists()


class WorkerFailed(Exception):
    """Carries what a worker died of to where it is told. Ray logs each error by itself, and this one says nothing."""

    def __init__(self, cause: Exception, text: str) -> None:
        super().__init__(cause, text)
        self.cause, self.text = cause, text

    def __str__(self) -> str:
        return "the reason is told at the end"


def _worker(given: dict[str, Any]) -> None:
    """Runs in each worker, whose place Ray has written into the environment. Raises WorkerFailed."""
    try:
        _train_here(given)
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        try:
            pickle.dumps(error)
        except Exception:
            error = RuntimeError(str(error))
        raise WorkerFailed(error, text) from None


def _train_here(given: dict[str, Any]) -> None:
    for name, value in defaults_for_processes().items():
        os.environ.setdefault(name, value)
    os.chdir(given["folder"])
    result = train(given["cfg"])
    parts = require_extra("ray.train", "ray", "`use_ray: true`", "use_ray")
    parts.report({"steps": result.steps, **({} if result.loss is None else {"loss": result.loss})})


def _told(error: Any) -> int:
    """Tells the first failure of a worker that is one of its own, and returns the exit code."""
    failures: dict[int, Any] = getattr(error, "worker_failures", {})
    raised = {rank: getattr(each, "_base_exc", each) for rank, each in failures.items()}
    found = {rank: each.cause if isinstance(each, WorkerFailed) else each for rank, each in raised.items()}
    own = {rank: each for rank, each in found.items() if not lost_a_peer(each)} or found
    if not own:
        why = getattr(error, "controller_failure", error)
        raise EnvironmentProblem(f"Ray could not train: {str(why).strip().splitlines()[-1]}") from None
    users = {rank: each for rank, each in own.items() if isinstance(each, UserError)}
    rank, cause = next(iter((users or own).items()))
    console.stderr().print(f"On rank {rank}:", style="red", markup=False)
    if isinstance(cause, UserError):
        raise cause from None
    text = raised[rank].text if isinstance(raised[rank], WorkerFailed) else str(failures[rank])
    console.stderr().print(text.strip(), style="red", markup=False)
    sys.stderr.flush()
    return cause.exit_code if isinstance(cause, AxolotlError) else 1
