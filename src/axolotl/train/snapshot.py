"""All that a checkpoint holds, copied into CPU memory at one moment, so that it can be written while training goes on."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.trainer_callback import ExportableState, TrainerState

from axolotl.train.checkpoint import RunState

if TYPE_CHECKING:
    from axolotl.train.trainer import TrainerMixin

OPTIMIZER, SCHEDULE, SCALER, RANDOM = "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"
"""The names under which transformers looks for them."""


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of its run, apart from weights and the states of optimizer and random numbers."""

    step: int
    state: TrainerState
    run: RunState
    place: dict[str, str]
    """File name → text: where in the data the next step begins."""


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory."""

    facts: Facts
    weights: dict[str, Any]
    """As `model.state_dict()`; weights that do not change are the model's own."""
    files: dict[str, Any]
    """File name → what `torch.save` writes there."""
    complete: Callable[[], None]
    """Waits until everything has arrived from the GPU."""


class Copies:
    """Copies of tensors in CPU memory, which is kept and used again for the next ones.

    On a GPU the copies are made beside the computation, into page-locked memory: what is copied must not change before
    `hold` was called. Memory: as much as is copied, once (page-locked blocks are rounded up to a power of two).
    """

    def __init__(self, device: torch.device) -> None:
        self._kept: dict[str, torch.Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arrived: torch.cuda.Event | None = None
        self._held = True

    def begin(self) -> None:
        """Begins a new set of copies over the old ones."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def of(self, name: str, tensor: torch.Tensor, *, changes_any_time: bool = False) -> torch.Tensor:
        """A copy of a tensor, in memory that belongs to `name`."""
        tensor = tensor.detach()
        if type(tensor) is not torch.Tensor:
            return self._of_parts(name, tensor)
        on_gpu = self._stream is not None and tensor.device.type == "cuda"
        kept = self._kept.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
            self._kept[name] = kept
        if not on_gpu:
            kept.copy_(tensor)
        elif changes_any_time:
            kept.copy_(tensor, non_blocking=True)
        else:
            with torch.cuda.stream(self._stream):
                kept.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._stream)  # type: ignore[arg-type]
        return kept

    def _of_parts(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor that is made of others, such as an 8-bit state: codes and scales."""
        if not is_traceable_wrapper_subclass(tensor):
            return copy.deepcopy(tensor).cpu()
        inner, context = tensor.__tensor_flatten__()
        parts = {part: self.of(f"{name} {part}", getattr(tensor, part)) for part in inner}
        kind: Any = type(tensor)
        made: torch.Tensor = kind.__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
        return made

    def end(self) -> Callable[[], None]:
        """Ends the set; what is returned waits until all of it has arrived."""
        if self._stream is None:
            return lambda: None
        # The few copies that were made on the computing stream count as well.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        arrived = torch.cuda.Event()
        arrived.record(self._stream)
        self._arrived, self._held = arrived, False
        return arrived.synchronize

    def hold(self) -> None:
        """From here on the GPU (not this process) waits for the copies: what was copied may change now."""
        if not self._held and self._arrived is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._arrived)
        self._held = True

    def bytes(self) -> int:
        """Memory that is kept for copies."""
        return sum(each.numel() * each.element_size() for each in self._kept.values())


def take(trainer: TrainerMixin, copies: Copies) -> Snapshot:
    """Copies what a checkpoint of the present step holds. Every rank has to call it; the first one's is whole."""
    copies.begin()
    states = [random_state(trainer)]
    if trainer.args.world_size > 1:
        states = gather_object(states)
    weights, files = {}, {}
    if trainer.args.should_save:
        weights = _weights(trainer.model, copies)
        if not trainer.args.save_only_model:
            files[OPTIMIZER] = _copied(trainer.optimizer.state_dict(), "optimizer", copies)
            files[SCHEDULE] = copy.deepcopy(trainer.lr_scheduler.state_dict())
            scaler = getattr(trainer.accelerator, "scaler", None)
            if scaler is not None:
                files[SCALER] = copy.deepcopy(scaler.state_dict())
            stem, _, ending = RANDOM.partition(".")
            alone = len(states) == 1
            files |= {RANDOM if alone else f"{stem}_{i}.{ending}": each for i, each in enumerate(states)}
    complete = copies.end()
    if callable(getattr(trainer.optimizer, "train", None)):
        # It changes the weights outside of its steps too.
        copies.hold()
    _ask_callbacks(trainer)
    return Snapshot(facts(trainer), weights, files, complete)


def _ask_callbacks(trainer: TrainerMixin) -> None:
    """Puts the states of callbacks that have one into the trainer's, as transformers does when it saves."""
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            states: dict[str, Any] = trainer.state.stateful_callbacks  # type: ignore[assignment]
            name = type(callback).__name__
            known = states.get(name)
            states[name] = [*known, callback.state()] if isinstance(known, list) else callback.state()


def facts(trainer: TrainerMixin) -> Facts:
    """What a checkpoint of the present step says of its run; nothing in it changes afterwards."""
    state = trainer.state
    # Its lines are added to, never changed.
    frozen = copy.copy(state)
    frozen.log_history = list(state.log_history)
    frozen.stateful_callbacks = copy.deepcopy(state.stateful_callbacks)
    batch = state.global_step * trainer.args.gradient_accumulation_steps * trainer.parts.axes.data_ranks
    return Facts(state.global_step, frozen, trainer.run_state(), trainer.parts.batches.place(batch))


def random_state(trainer: TrainerMixin) -> dict[str, Any]:
    """The states of all random numbers of this process, as transformers reads them."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        several = trainer.args.world_size > 1
        state["cuda"] = torch.cuda.get_rng_state_all() if several else torch.cuda.get_rng_state()
    return state


def _weights(model: torch.nn.Module, copies: Copies) -> dict[str, Any]:
    """The model's state: copies of what training changes, tied weights once, and the rest as it is."""
    buffers = {name for name, _ in model.named_buffers()}
    found: dict[str, Any] = {}
    copied: dict[int, torch.Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            found[name] = value
        elif not value.requires_grad and name not in buffers:
            found[name] = value.detach()
        else:
            if id(value) not in copied:
                copied[id(value)] = copies.of(f"weight {name}", value, changes_any_time=name in buffers)
            found[name] = copied[id(value)]
    return found


def _copied(value: Any, name: str, copies: Copies) -> Any:
    """A deep copy of nested states, tensors in CPU memory."""
    if isinstance(value, torch.Tensor):
        return copies.of(name, value)
    if isinstance(value, dict):
        new = copy.copy(value)
        for key in value:
            new[key] = _copied(value[key], f"{name} {key}", copies)
        return new
    if type(value) in (list, tuple):
        return type(value)(_copied(each, f"{name} {i}", copies) for i, each in enumerate(value))
    return copy.deepcopy(value)
