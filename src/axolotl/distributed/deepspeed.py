"""DeepSpeed's ZeRO while a run is built: what has to stand before the weights are loaded, and access to divided weights.

ZeRO: https://arxiv.org/abs/1910.02054. Stage 3 divides the weights as they are loaded, so that no process ever holds the
whole model.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from axolotl.config.config import Config
from axolotl.config.resolve import Hardware
from axolotl.console import note
from axolotl.distributed.world import world
from axolotl.distributed.zero import completed, read_zero
from axolotl.errors import EnvironmentProblem
from axolotl.registry import require_extra

STALE = 30 * 60.0  # seconds; no part takes as long to compile
_held: list[Any] = []


def begin_zero(cfg: Config, hardware: Hardware) -> None:
    """Lets models that are loaded from here on be divided, where the config asks for ZeRO stage 3.

    To be called after the processes have met. Raises EnvironmentProblem where DeepSpeed is missing or does not start.
    """
    zero = read_zero(cfg)
    if zero is None:
        return
    if hardware.device == "cpu":
        # Named, so that it does not look for one, and says nothing about that.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # accelerate counts micro batches for itself, transformers for both.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if world().local_rank == 0:
        free_stale_locks(
            Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
        )
    try:
        package = require_extra("deepspeed", "deepspeed", "`deepspeed:`", "deepspeed")
    except (ImportError, RuntimeError, OSError) as error:
        raise EnvironmentProblem(
            cfg.problem(
                f"DeepSpeed is installed, but cannot be imported: {str(error).splitlines()[0]}",
                "It looks for the CUDA toolkit under CUDA_HOME (`nvcc --version`), whose version should be torch's.",
                "deepspeed",
                kind="environment",
            )
        ) from error
    if zero.stage == 3:
        # Who started us has said where all meet; DeepSpeed would look for MPI otherwise.
        package.init_distributed(auto_mpi_discovery=False, verbose=False)
        # transformers looks for it while it loads; it knows it as long as somebody holds it.
        _held[:] = [HfDeepSpeedConfig(completed(cfg, zero, hardware, world().size))]


def free_stale_locks(folder: Path) -> None:
    """Removes locks of compilations that were killed: DeepSpeed compiles parts of itself, and would wait for them forever."""
    for lock in folder.glob("**/lock"):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > STALE:
                lock.unlink()
                note(f"`{lock}` was left by a compilation that was broken off; it is removed.")


def divided() -> bool:
    """Whether models that are loaded now have their weights divided among the processes."""
    return bool(is_deepspeed_zero3_enabled())


@contextlib.contextmanager
def whole(weights: Sequence[torch.Tensor], *, write: bool = False) -> Iterator[None]:
    """Within it, these weights are whole on every process; with `write`, what the first one has written stays.

    Does nothing for weights that are not divided. Every process has to come here.
    """
    mine = [each for each in weights if hasattr(each, "ds_id")]
    if not mine:
        yield
        return
    zero: Any = require_extra("deepspeed", "deepspeed", "ZeRO stage 3")
    with zero.zero.GatheredParameters(mine, modifier_rank=0 if write else None):
        yield


def consolidated(engine: Any, *, of_checkpoint: bool) -> dict[str, torch.Tensor] | None:
    """The weights of a model that is divided by stage 3, put together layer by layer in the first process's CPU memory.

    Under an adapter those that are trained. None in the other processes, which have to come here as well, and where a
    checkpoint is to do without.
    """
    if of_checkpoint and not engine.zero_gather_16bit_weights_on_model_save():
        return None
    adapter = hasattr(engine.module, "peft_config")
    found: dict[str, torch.Tensor] | None = engine._zero3_consolidated_16bit_state_dict(
        exclude_frozen_parameters=adapter
    )
    return found


def shape_of(weight: torch.Tensor) -> torch.Size:
    """The shape of the whole weight, wherever its parts lie."""
    found: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return found
