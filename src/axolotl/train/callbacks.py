"""What happens beside the training loop: order of rows, evaluating and saving in time, watching the loss, signals."""

from __future__ import annotations

import gc
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_callback import TrainerControl as Control
from transformers.trainer_callback import TrainerState as State
from transformers.training_args import TrainingArguments as Args

from axolotl.config.train import TrainSection
from axolotl.console import is_main_process, note
from axolotl.distributed.group import from_main
from axolotl.train.arguments import best_metric
from axolotl.train.cadence import Cadence
from axolotl.train.steps import TrainingDiverged
from axolotl.train.trainer import TrainerMixin

LOSS_PATIENCE = 3


class EpochOrder(TrainerCallback):
    """Tells the batch sampler which epoch begins, in a resumed run too."""

    def __init__(self, trainer: TrainerMixin) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if self.trainer.order is not None:
            self.trainer.order.set_epoch(state.global_step // self.trainer.parts.volume.steps_per_epoch)

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.trainer.clock.start(state.num_input_tokens_seen, state.global_step)


class AtSteps(TrainerCallback):
    """Evaluates and saves at the steps that were computed beforehand."""

    def __init__(self, cadence: Cadence) -> None:
        self.cadence = cadence

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if state.global_step in self.cadence.evaluate:
            control.should_evaluate = True
        if state.global_step in self.cadence.save:
            control.should_save = True


class LossWatch(TrainerCallback):
    """Ends a run whose loss is above `loss_watchdog_threshold` in several log lines on end.

    `numbers`: also one whose loss is not finite; for runs in which steps are not checked one by one. It reads them from the history that a checkpoint keeps, so it needs no state of its own.
    """

    def __init__(self, train: TrainSection, *, numbers: bool = False) -> None:
        self.numbers = numbers
        self.threshold = train.loss_watchdog_threshold
        self.patience = train.loss_watchdog_patience or LOSS_PATIENCE

    def on_log(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        losses: list[float] = []
        for line in reversed(state.log_history):
            if "loss" in line:
                losses.append(line["loss"])
            if len(losses) == self.patience:
                break
        if len(losses) < self.patience or "loss" not in state.log_history[-1]:
            return
        if self.numbers and not any(map(math.isfinite, losses)):
            raise TrainingDiverged(
                f"The loss was not a finite number {self.patience} times on end, at step {state.global_step} the last "
                "time. Lower `learning_rate`, raise `warmup_steps`, or train in bf16 instead of fp16; then resume from "
                "a checkpoint before it.",
                code="AX1208",
            )
        if self.threshold is not None and min(losses) > self.threshold:
            raise TrainingDiverged(
                f"The loss was above `loss_watchdog_threshold: {self.threshold}` {self.patience} times on end, at step "
                f"{state.global_step} the last time ({losses[0]:.4g}). Lower `learning_rate`, or look at the data.",
                code="AX1207",
            )


class EarlyStopping(TrainerCallback):
    """Ends training after so many evaluations without improvement; counted in the history, so resuming goes on."""

    def __init__(self, train: TrainSection) -> None:
        self.patience = train.early_stopping_patience or 0
        self.metric, self.more = best_metric(train)

    def on_evaluate(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        values = [line[self.metric] for line in state.log_history if self.metric in line]
        if not self.patience or not values:
            return
        best = max(values) if self.more else min(values)
        since = len(values) - 1 - values.index(best)
        if since >= self.patience:
            note(f"{since} evaluations without a better {self.metric} than {best:.4f}: training ends here.")
            control.should_training_stop = True


class CheckpointOnRequest(TrainerCallback):
    """Saves when a file appears, and removes the file."""

    def __init__(self, train: TrainSection, output_dir: Path) -> None:
        wish = train.dynamic_checkpoint
        self.every = wish.check_interval if wish and wish.enabled else 0
        name = wish.trigger_file_path if wish and wish.trigger_file_path else "axolotl_checkpoint.save"
        self.file = output_dir / name

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0 and from_main(self.file.exists):
            self.file.unlink(missing_ok=True)
            note(f"{self.file.name} asks for a checkpoint at step {state.global_step}.")
            control.should_save = True


class CollectGarbage(TrainerCallback):
    """Collects Python's garbage every so many steps; with -1 before evaluations and at the end of each epoch."""

    def __init__(self, train: TrainSection) -> None:
        self.every = train.gc_collect_steps or 0

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if (self.every > 0 and state.global_step % self.every == 0) or (
            self.every < 0 and control.should_evaluate
        ):
            gc.collect()

    def on_epoch_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if self.every < 0:
            gc.collect()


class Profile(TrainerCallback):
    """Records some steps with PyTorch's profiler, as a trace for chrome://tracing in output_dir."""

    def __init__(self, train: TrainSection, output_dir: Path) -> None:
        self.steps, self.first = train.profiler_steps or 0, train.profiler_steps_start
        self.file = output_dir / "profile.json"
        self.profiler: Any = None

    def on_step_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if self.steps and self.profiler is None and state.global_step == self.first:
            self.profiler = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self.profiler.start()

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if state.global_step >= self.first + self.steps:
            self._end(state)

    def on_train_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        # A profiler that is still running when the process ends crashes it.
        self._end(state)

    def _end(self, state: State) -> None:
        if self.profiler is None:
            return
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(self.file))
        self.profiler, self.steps = None, 0
        note(f"Profile of the steps up to {state.global_step}: {self.file}")


class Signals(TrainerCallback):
    """Ends a run in good order when a signal asks for it: the step is finished and a checkpoint saved.

    SIGINT (Ctrl-C) twice stops at once. SIGTERM and SIGUSR1 are how schedulers announce the end of a job.
    """

    LISTENED = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, n))

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.trainer: TrainerMixin | None = None
        """Set where several ranks have to end at the same step."""

    def __call__(self) -> bool:
        return self.received is not None

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if not is_main_process():
            return
        # Written directly: a handler may run inside a print of the main program.
        os.write(2, f"\n{self.received.name}: finishing this step, then saving a checkpoint.\n".encode())

    def _ends(self, args: Args) -> bool:
        if args.world_size > 1 and self.trainer is not None:
            if self.trainer.asked_to_end and self.received is None:
                self.received = signal.SIGTERM  # another rank got it
            return self.trainer.asked_to_end
        return self.received is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over, and gives them back at the end. Does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._take) for number in self.LISTENED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        # After the last step the evaluation belongs to the run's end; it breaks off for itself (see on_evaluate).
        if self._ends(args) and state.global_step < state.max_steps:
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True

    def on_evaluate(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if args.world_size <= 1 and self.received is not None:
            control.should_save = True
            control.should_training_stop = True
