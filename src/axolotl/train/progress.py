"""What a run tells while it goes on: one live line for a person, and run.jsonl for programs.

run.jsonl has one JSON object per line; a resumed run cuts it back to the step it continues from. Every line has
`kind` (train, eval, event, sample or end), `step` (counted from 1; 0 before the first), `epoch` and `time` (seconds since 1970).

train   loss (mean over trained tokens), ppl, grad_norm (before clipping), learning_rate, tokens (seen so far, without
        padding), trained_tokens, tokens_per_second (without padding, all ranks, evaluation and saving not counted),
        seconds_per_step, peak_memory_gib; data_, forward_, backward_, optimizer_, save_ and evaluate_seconds since the
        line before, as this process saw them (a GPU works on behind its back)
eval    eval_loss (mean over all trained tokens of the set), eval_ppl, eval_runtime, ...
event   message: a warning, such as of a save that failed or a step that was left out
sample  row (of the evaluation data), prompt, answer, expected: with `generate_samples`
end     train_runtime (seconds), train_loss (mean of this process's steps), ...
A number that is not finite is written as null.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.text import Text
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_callback import TrainerControl as Control
from transformers.trainer_callback import TrainerState as State
from transformers.training_args import TrainingArguments as Args

from axolotl.console import is_main_process, stderr, warn

REFRESH = 0.1  # seconds between two redrawings of the live line


class RunLog(TrainerCallback):
    """Writes run.jsonl."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.open = False
        self.waiting = bytearray()
        """Lines that the disk did not take yet."""
        self.troubled = False
        self.lock = threading.Lock()
        """Trackers tell of their troubles from threads of their own."""

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if is_main_process():
            self.open = True
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                cut_back(self.file, state.global_step)
            except OSError as error:
                warn(f"{self.file} cannot be written ({error.strerror}); its lines wait.")

    def on_log(
        self, args: Args, state: State, control: Control, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs:
            self._add({"kind": kind_of(logs), "step": state.global_step, **logs})

    def event(self, step: int, epoch: float | None, message: str) -> None:
        """A line of kind `event`."""
        self._add({"kind": "event", "step": step, "epoch": epoch, "message": message})

    def sample(self, step: int, epoch: float | None, values: dict[str, Any]) -> None:
        """A line of kind `sample`."""
        self._add({"kind": "sample", "step": step, "epoch": epoch, **values})

    def _add(self, line: dict[str, Any]) -> None:
        if not self.open:
            return
        line["time"] = time.time()
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with self.lock:
            self.waiting += (json.dumps(finite, default=str) + "\n").encode()
            self._write()

    def _write(self) -> None:
        """Appends what waits; where the disk refuses, it goes on waiting, and training goes on."""
        try:
            handle = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            if not self.file.parent.exists():
                with contextlib.suppress(OSError):
                    self.file.parent.mkdir(parents=True)
            self._told(error)
            return
        try:
            while self.waiting:
                # A disk that fills up may take a part.
                del self.waiting[: os.write(handle, bytes(self.waiting))]
            self.troubled = False
        except OSError as error:
            self._told(error)
        finally:
            with contextlib.suppress(OSError):
                os.close(handle)

    def _told(self, error: OSError) -> None:
        if not self.troubled:
            warn(f"{self.file} cannot be written ({error.strerror}); its lines wait.")
        self.troubled = True

    def close(self) -> None:
        """Ends the log; lines that the disk does not take now can still be written with `write_waiting`."""
        with self.lock:
            if self.waiting:
                self._write()
        self.open = False

    def write_waiting(self) -> None:
        """Writes what has waited. Raises OSError where the disk still refuses."""
        with self.lock:
            if self.waiting:
                self._write()
            if self.waiting:
                raise OSError(errno.EIO, f"{self.file} cannot be written")


def kind_of(logs: dict[str, Any]) -> str:
    """train, eval or end: what a set of logged figures is."""
    if "train_runtime" in logs:
        return "end"
    return "eval" if any(key.startswith("eval_") for key in logs) else "train"


def cut_back(file: Path, step: int) -> None:
    """Removes the lines after `step`, and a last line that was cut off."""
    if not file.exists():
        return
    if step == 0:
        file.unlink()
        return
    kept = []
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        # The checkpoint was saved after the evaluation of its step; the end of an earlier stretch is no end any more.
        if line.get("step", 0) <= step and line.get("kind") != "end":
            kept.append(text)
    aside = file.with_name(f".{file.name}.tmp")
    aside.write_text("".join(f"{text}\n" for text in kept), encoding="utf-8")
    os.replace(aside, file)


class ProgressLine(TrainerCallback):
    """One line with step, loss, learning rate, tokens per second, memory and remaining time.

    In a terminal it is redrawn in place; elsewhere every log line is printed.
    """

    def __init__(self, total_steps: int) -> None:
        self.total = total_steps
        self.live: Live | None = None
        self.drawn = 0.0
        self.pace: float | None = None
        """Seconds per step, smoothed."""
        self.evaluated = 0

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if is_main_process() and stderr().is_terminal:
            self.live = Live(console=stderr(), auto_refresh=False, transient=False)
            self.live.start()

    def on_log(
        self, args: Args, state: State, control: Control, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or not is_main_process():
            return
        kind = kind_of(logs)
        if kind == "train":
            per_step = logs.get("seconds_per_step", 0.0)
            self.pace = per_step if self.pace is None else 0.9 * self.pace + 0.1 * per_step
            self._draw(
                training_line(logs, state.global_step, self.total, self.pace), state.global_step >= self.total
            )
        elif kind == "eval":
            self.evaluated = 0
            self._say(evaluation_line(logs, state.global_step))

    def on_prediction_step(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.evaluated += 1
        loader = kwargs.get("eval_dataloader")
        if self.live is not None and loader is not None:
            self._draw(f"evaluating: batch {self.evaluated}/{len(loader)}")

    def _draw(self, text: str, last: bool = False) -> None:
        if self.live is None:
            print(text, file=sys.stderr, flush=True)
            return
        now = time.monotonic()
        if last or now - self.drawn >= REFRESH:
            self.drawn = now
            self.live.update(Text(text, overflow="ellipsis", no_wrap=True), refresh=True)

    def _say(self, text: str) -> None:
        if self.live is not None:
            self.live.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the last line standing."""
        if self.live is not None:
            self.live.stop()
            self.live = None


def training_line(logs: dict[str, Any], step: int, total: int, pace: float | None) -> str:
    """The live line: `step 12/200 · loss 1.2345 · lr 1.9e-05 · 3,456 tok/s · 1.2 GiB · 0:03:21 left`."""
    parts = [f"step {step}/{total}", f"loss {logs.get('loss', math.nan):.4f}"]
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.2e}")
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tok/s")
    if "peak_memory_gib" in logs:
        parts.append(f"{logs['peak_memory_gib']:.1f} GiB")
    if pace is not None:
        parts.append(f"{duration(pace * (total - step))} left")
    return " · ".join(parts)


def evaluation_line(logs: dict[str, Any], step: int) -> str:
    """`step 50: eval loss 1.2345 (perplexity 3.44)`."""
    losses = [
        f"{key.removesuffix('_loss').replace('_', ' ')} loss {value:.4f}"
        for key, value in logs.items()
        if key.endswith("_loss")
    ]
    ppl = next((f" (perplexity {v:.2f})" for k, v in logs.items() if k.endswith("_ppl")), "")
    return f"step {step}: {', '.join(losses)}{ppl}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03."""
    return str(datetime.timedelta(seconds=round(seconds)))
