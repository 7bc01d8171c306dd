"""What our trainers do differently when FSDP2 has sharded the model: each process writes and reads its own parts."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import Trainer

from axolotl.config.distributed import FsdpConfig
from axolotl.distributed.fsdp import Sharding
from axolotl.distributed.states import (
    OPTIMIZER,
    WEIGHTS,
    load_optimizer,
    load_weights,
    save_optimizer,
    save_weights,
    weights_of,
)
from axolotl.errors import CheckpointError
from axolotl.train.checkpoint import described
from axolotl.train.snapshot import SCHEDULE
from axolotl.weights.whole import whole, write_whole

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


def on_this_course(schedule: Any) -> None:
    """Sets the learning rates of a schedule that was loaded to what its own course has for the next step.

    A checkpoint holds the rate that the run which saved it would have gone on with. Where that run ended there and this
    one is longer, it is the end of the old course, mostly 0, and the first step would change nothing. Where nothing
    has changed, the rates come out the same to the bit.
    """
    if not isinstance(schedule, LambdaLR):
        return  # others reckon from the rate before
    rates = [
        base * factor(schedule.last_epoch)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    schedule._last_lr = rates


def for_these_groups(saved: dict[str, Any], schedule: Any) -> dict[str, Any]:
    """The state of a schedule, with what it says of each group of weights left out where the groups are others now.

    Weights that are divided otherwise are of groups of their own.
    """
    groups = len(schedule.base_lrs)
    if len(saved.get("base_lrs", ())) == groups:
        return saved
    rates = [group["lr"] for group in schedule.optimizer.param_groups]
    # The functions of a schedule have no state of their own.
    functions = {"lr_lambdas": [None] * groups} if "lr_lambdas" in saved else {}
    return saved | {"base_lrs": schedule.base_lrs, "_last_lr": rates} | functions


class Sharded(_Base):
    """The part of our trainers that knows sharded models. Without `parts.sharding` it does nothing."""

    parts: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    writes_final = False
    """What is saved is the finished model, not a checkpoint."""

    @property
    def sharding(self) -> Sharding | None:
        """How the model is sharded; None for one that every process holds."""
        found: Sharding | None = self.parts.sharding
        return found

    def mark_sharded(self) -> None:
        """After the trainer is made: it neither wraps nor moves the model."""
        if self.sharding is None:
            return
        # transformers' own marks for models that are sharded before they come to it.
        self.is_distributed_loading_by_transformers = True
        self.model._is_fsdp_managed_module = True

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if self.sharding is None:
            super()._move_model_to_device(model, device)

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        assert self.sharding is not None
        with self.sharding.not_the_last():
            yield

    def _has_mixed_mesh_grads(self, model: Any) -> bool:
        # The way for several meshes is right for one as well, and gives a norm that every process has whole.
        return self.sharding is not None or super()._has_mixed_mesh_grads(model)

    # Saving

    @property
    def _adapts(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def _whole(self) -> bool:
        """Whether what is being saved now shall be whole files that any program loads."""
        distributed = self.parts.distributed
        options = distributed.fsdp_config or FsdpConfig()
        if self.writes_final:
            final = distributed.fsdp_final_state_dict_type or options.final_state_dict_type
            return final in (None, "FULL_STATE_DICT")
        return options.state_dict_type == "FULL_STATE_DICT"

    def _together(self, action: Callable[[], Any]) -> None:
        """Does what each process (or the first alone) writes by itself. Where one fails, all raise: what comes next is
        a work of all.
        """
        trouble: Exception | None = None
        try:
            action()
        except Exception as error:
            trouble = error
        said: list[str | None] = [None] * self.args.world_size
        dist.all_gather_object(said, None if trouble is None else str(trouble) or type(trouble).__name__)
        if trouble is not None:
            raise trouble
        if any(said):
            raise OSError(errno.EIO, next(filter(None, said)))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.sharding is None:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        self._together(lambda: folder.mkdir(parents=True, exist_ok=True))
        if not (self.writes_final and self._whole):
            # A checkpoint always has them: training goes on from these, on any number of processes.
            save_weights(self.model, folder / WEIGHTS, trained_only=self._adapts)
        gathered = None
        if self._adapts:
            gathered = {
                name: whole(tensor, keep=self.args.should_save)
                for name, tensor in weights_of(self.model, trained_only=True).items()
            }
        elif self._whole:
            write_whole(self.model, folder)
        self._together(lambda: self._save_beside(folder, gathered) if self.args.should_save else None)

    def _save_beside(self, folder: Path, adapter: dict[str, torch.Tensor] | None) -> None:
        """What the first process writes: the adapter, or the model's configuration; the tokenizer."""
        if adapter is not None:
            self.model.save_pretrained(str(folder), state_dict=adapter)
        else:
            config = self.model.config
            config.dtype = str(self.model.dtype).removeprefix("torch.")
            config.architectures = [type(self.model).__name__.removeprefix("FSDP")]
            config.save_pretrained(str(folder))
            if self.model.can_generate():
                self.model.generation_config.save_pretrained(str(folder))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharding is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer(self.model, self.optimizer, Path(output_dir) / OPTIMIZER)
        file, state = os.path.join(output_dir, SCHEDULE), self.lr_scheduler.state_dict()
        self._together(lambda: torch.save(state, file) if self.args.should_save else None)

    def written_by_all(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and hash of the parts, each looked at by the process that wrote it."""
        if self.sharding is None:
            return {}
        rank = self.args.process_index
        mine = [p.relative_to(folder).as_posix() for p in folder.glob(f"*/__{rank}_*.distcp")]
        found: list[dict[str, Any]] = [{}] * self.args.world_size
        dist.all_gather_object(found, described(folder, mine))
        return {name: facts for each in found for name, facts in each.items()}

    # Loading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        parts = Path(resume_from_checkpoint) / WEIGHTS
        if parts.is_dir():
            # Any number of processes reads them, sharded or not.
            load_weights(self.model, parts, trained_only=self._adapts)
        elif self.sharding is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            raise CheckpointError(
                f"`{resume_from_checkpoint}` was saved without FSDP, and this run shards the model.",
                "Resume without `fsdp_config`, or start anew from its weights: `base_model` (or `lora_model_dir`) is "
                "this folder then.",
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        parts = Path(checkpoint or "") / OPTIMIZER
        if checkpoint is None or not parts.is_dir():
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            load_optimizer(self.model, self.optimizer, parts)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                saved = torch.load(Path(checkpoint) / SCHEDULE, weights_only=True)
                self.lr_scheduler.load_state_dict(for_these_groups(saved, self.lr_scheduler))
        if checkpoint is not None:
            on_this_course(self.lr_scheduler)

    def _load_best_model(self) -> None:
        if self.sharding is None:
            super()._load_best_model()
            return
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
