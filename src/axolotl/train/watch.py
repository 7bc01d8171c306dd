"""Watching the clock: the time that a run may take, and a run in which nothing moves any more."""

from __future__ import annotations

import faulthandler
import threading
import time
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback
from transformers.trainer_callback import TrainerControl as Control
from transformers.trainer_callback import TrainerState as State
from transformers.training_args import TrainingArguments as Args

from axolotl.config.train import TrainSection
from axolotl.console import note, warn
from axolotl.train.trainer import TrainerMixin


class TimeLimit(TrainerCallback):
    """Ends a run in good order before `max_time` is over: a checkpoint is saved, the same command goes on.

    The time counts from when this object is made. What a step and a save have taken so far is kept back for the last
    ones.
    """

    def __init__(self, train: TrainSection) -> None:
        self.limit = train.max_time
        self.since = time.monotonic()
        self.trainer: TrainerMixin | None = None
        self.reached = False
        self._longest, self._step_began = 0.0, 0.0

    def __call__(self) -> bool:
        """Whether the time is over."""
        if self.limit is None:
            return False
        save = self.trainer.save_seconds if self.trainer is not None else 0.0
        if time.monotonic() - self.since + self._longest + 1.5 * save >= self.limit:
            self.reached = True
        return self.reached

    def on_step_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self._step_began = time.monotonic()

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if self.limit is None:
            return
        self._longest = max(self._longest, time.monotonic() - self._step_began)
        over = self.trainer.asked_to_end if args.world_size > 1 and self.trainer is not None else self()
        if over and state.global_step < state.max_steps:
            if not control.should_training_stop:
                note(f"`max_time` is nearly over: saving at step {state.global_step} and ending.")
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True

    def on_evaluate(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if args.world_size <= 1 and self():
            control.should_save = True
            control.should_training_stop = True


class HangWatch(TrainerCallback):
    """Writes down what every thread is doing when no step has ended for `hang_timeout` seconds, and again after that.

    A run that hangs is left alone: whoever started it decides.
    """

    def __init__(self, train: TrainSection, output_dir: Path) -> None:
        self.timeout = train.hang_timeout
        self.file = output_dir / "stacks.txt"
        self.beat = time.monotonic()
        self.step = 0
        self._ended = threading.Event()

    def _alive(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.beat, self.step = time.monotonic(), state.global_step

    on_step_begin = on_step_end = on_prediction_step = on_evaluate = on_save = _alive

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self._alive(args, state, control)
        self._ended.clear()
        if self.timeout:
            threading.Thread(target=self._watch, name="hang watch", daemon=True).start()

    def on_train_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the watch."""
        self._ended.set()

    def _watch(self) -> None:
        told = self.beat
        while not self._ended.wait(max(0.05, min(self.timeout / 4, 30.0))):
            told = max(told, self.beat)
            if time.monotonic() - told < self.timeout:
                continue
            told = time.monotonic()
            warn(
                f"Nothing has moved for {told - self.beat:.0f} seconds since step {self.step}. What every thread is doing "
                f"is in {self.file}. [AX1408]"
            )
            try:
                with self.file.open("a", encoding="utf-8") as stream:
                    stream.write(f"No step for {told - self.beat:.0f} seconds after step {self.step}.\n")
                    stream.flush()
                    faulthandler.dump_traceback(stream, all_threads=True)
            except OSError:
                faulthandler.dump_traceback(all_threads=True)
