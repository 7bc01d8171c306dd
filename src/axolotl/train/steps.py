"""What a step survives: a loss or gradient that is no number is left out, a wild one is told, a batch too large for the
GPU is cut.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer import Trainer
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_callback import TrainerControl as Control
from transformers.trainer_callback import TrainerState as State
from transformers.training_args import TrainingArguments as Args

from axolotl.data.collate import Batch, PackedCollator, Row
from axolotl.errors import EnvironmentProblem, Problem, UserError
from axolotl.train.anomalies import KEPT, Spike, SpikeWatch, note_down, rows_of_step
from axolotl.train.checkpoint import write_json
from axolotl.train.late import Arriving, StepAt, flagged_optimizer
from axolotl.train.progress import cut_back

if TYPE_CHECKING:
    from axolotl.train.trainer import TrainerMixin

    _Base = Trainer
else:
    _Base = object

BAD_STEPS = 3  # steps on end without a finite loss and gradient, after which training ends
TOLD_ONE_BY_ONE = 10  # steps out of the ordinary; of more, each tenth is told


class TrainingDiverged(UserError):
    """The loss is no number any more, or stays above the threshold that the user set."""

    exit_code = 1


class Clock:
    """Time spent on training between two log lines, and what it was spent on; evaluating and saving do not count."""

    def __init__(self) -> None:
        self.since = time.perf_counter()
        self.tokens, self.step = 0, 0
        self.spent: dict[str, float] = {}
        """Seconds since the last lap, as this process saw them: data, forward, backward, optimizer, save, evaluate."""

    def start(self, tokens: int, step: int) -> None:
        """Begins an interval at these counts."""
        self.since, self.tokens, self.step = time.perf_counter(), tokens, step

    def add(self, what: str, seconds: float) -> None:
        """Counts seconds that were spent on something."""
        self.spent[what] = self.spent.get(what, 0.0) + seconds

    @contextlib.contextmanager
    def counted(self, what: str) -> Iterator[None]:
        """Counts the time of a block."""
        at = time.perf_counter()
        try:
            yield
        finally:
            self.add(what, time.perf_counter() - at)

    @contextlib.contextmanager
    def stopped(self, what: str) -> Iterator[None]:
        """Counts the time of a block, and takes it out of the interval."""
        at = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - at
            self.since += seconds
            self.add(what, seconds)

    def lap(self, tokens: int, step: int) -> tuple[float, float, dict[str, float]]:
        """(tokens per second, seconds per step, seconds by purpose) since the last lap."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        rate, per_step = (tokens - self.tokens) / seconds, seconds / max(step - self.step, 1)
        spent, self.spent = self.spent, {}
        self.start(tokens, step)
        return rate, per_step, spent


class Steps(_Base):
    """The part of our trainers that does a step."""

    parts: Any
    clock: Clock
    order: Any
    tell: Callable[[str], None]
    split = 1
    """Parts in which each micro batch is computed, since memory ran out."""
    bad_steps, bad_streak = 0, 0
    """Steps that were left out since the run began, and those on end."""
    spikes: SpikeWatch
    _failed_losses: torch.Tensor | None = None
    _step_losses: list[torch.Tensor]
    _micro = 0
    _norm: Any = None
    _judged_later: StepAt | None = None
    _late: bool | None = None
    late_anywhere = False
    """For tests: figures are read late on a CPU too."""

    def _over_ranks(self, *numbers: int) -> list[int]:
        raise NotImplementedError

    def tell_line(self) -> None:
        """Writes the line of the log that waits for its numbers, if one does."""
        raise NotImplementedError

    def begin_step(self) -> None:
        """Before the micro batches of a step."""
        self._step_losses, self._micro, self._norm = [], 0, None

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().compute_loss(*args, **kwargs)
        with self.clock.counted("forward"):
            return super().compute_loss(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass. A loss that is not finite is counted apart and logged as NaN."""
        at, forward = time.perf_counter(), self.clock.spent.get("forward", 0.0)
        loss = self._within_memory(model, inputs, num_items_in_batch)
        both = time.perf_counter() - at
        self.clock.add("backward", both - (self.clock.spent.get("forward", 0.0) - forward))
        self._micro += 1
        finite = torch.isfinite(loss)
        self._step_losses.append(loss.detach())
        failed = (~finite).to(torch.int64)
        self._failed_losses = failed if self._failed_losses is None else self._failed_losses + failed
        # The trainer sums losses until it logs, and would never get rid of a NaN again.
        return torch.where(finite, loss, torch.zeros_like(loss))

    # Memory

    def _within_memory(self, model: Any, inputs: Any, items: Any) -> torch.Tensor:
        micro = self._micro
        try:
            if self.split > 1:
                return self._in_parts(model, micro, items)
            return super().training_step(model, inputs, items)
        except torch.OutOfMemoryError as error:
            self._may_retry(error)
        # Outside of the clause that caught it: the error holds on to the tensors of the pass that failed.
        while True:
            self.split *= 2
            # Gradients of the pass may be there in part, so the step starts over.
            model.zero_grad()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            try:
                self._say_split()
                for earlier in range(micro):
                    self._in_parts(model, earlier, items)
                return self._in_parts(model, micro, items)
            except torch.OutOfMemoryError as error:
                self._may_retry(error)

    def _may_retry(self, error: Exception) -> None:
        train, step = self.parts.train, self.state.global_step + 1
        why = ""
        if train.on_oom == "fail":
            why = "`on_oom: fail` ends the run here"
        elif self.args.world_size > 1 or self.is_deepspeed_enabled:
            why = "with several processes the batch cannot be cut while training"
        elif self.split >= max(sum(map(len, self._rows_of(i))) for i in self._step_batches()):
            why = "a single row does not fit"
        if why:
            raise EnvironmentProblem(
                Problem(
                    f"The GPU's memory ran out in step {step}, and {why}.",
                    "Lower `micro_batch_size` or `sequence_len`, set `gradient_checkpointing: true`, or train with "
                    "`adapter: qlora`. Then run the same command with `--auto-resume-from-checkpoints`.",
                    "environment",
                    ("micro_batch_size", "on_oom"),
                    code="AX1403",
                )
            ) from error

    def _say_split(self) -> None:
        train = self.parts.train
        micro, accumulation = train.rows_at_once, train.gradient_accumulation_steps
        now = (
            f"micro_batch_size {micro} → {max(1, micro // self.split)}, gradient_accumulation_steps {accumulation} → "
            f"{accumulation * self.split}"
            if micro >= self.split
            else f"each micro batch in {self.split} parts"
        )
        self.tell(
            f"The GPU's memory ran out in step {self.state.global_step + 1}: {now}, from this step on. The rows of each "
            "step stay the same."
        )

    def _step_batches(self) -> range:
        """The batches of the present step, as this epoch counts them on this rank."""
        accumulation = self.args.gradient_accumulation_steps
        first = self.state.global_step % self.parts.volume.steps_per_epoch * accumulation
        return range(first, min(first + accumulation, len(self.order)))

    def _rows_of(self, batch: int) -> list[list[Row]]:
        """The rows of a batch, bin by bin."""
        rows = self.parts.batches.rows
        bins: list[list[Row]] = rows.__getitems__(self.order.bins_of(batch))
        return bins

    def _in_parts(self, model: Any, micro: int, items: Any) -> torch.Tensor:
        whole = self._rows_of(self._step_batches()[micro])
        step = super().training_step
        losses = [step(model, part, items) for part in cut(self.parts.batches.collator, whole, self.split)]
        return torch.stack(losses).sum()

    # Numbers that are none

    def _clip_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self._norm = super()._clip_grad_norm(*args, **kwargs)
        return self._norm

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self._norm = super()._get_grad_norm(*args, **kwargs)
        return self._norm

    @property
    def checks_steps(self) -> bool:
        """False where a loss scaler looks for itself, and lowers the scale."""
        scaled = self.is_deepspeed_enabled and self.args.fp16
        return not scaled and getattr(self.accelerator, "scaler", None) is None

    @property
    def reads_late(self) -> bool:
        """Whether figures are read when the next step is queued; see `axolotl.train.late`."""
        if not (self.late_anywhere or self.args.device.type == "cuda") or self.optimizer is None:
            return False
        if self._late is None:
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            self._late = self.checks_steps and not sharded and flagged_optimizer(self.optimizer) is not None
        return self._late

    def check_step(self) -> None:
        """Before the optimizer's step: leaves it out where loss or gradient is not finite, tells what is far above its
        usual range. Raises TrainingDiverged.
        """
        if not self.checks_steps:
            return
        figures, has_norm = self._figures()
        late = self.reads_late
        if late:
            self.judge()
            failed = (~torch.isfinite(figures).all()).float()
            if self.args.world_size > 1:
                # All leave the step out, or none does.
                torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MAX)
                figures = torch.cat((figures, torch.where(failed > 0, torch.nan, 0.0).reshape(1)))
            flagged_optimizer(self.optimizer).found_inf = failed
        step = StepAt(self.state.global_step + 1, self._step_batches(), Arriving(figures), has_norm)
        self._judged_later = step
        if not late:
            self.judge()

    def judge(self) -> None:
        """Looks at the figures of the last step that was computed, unless it was done. Raises TrainingDiverged."""
        at, self._judged_later = self._judged_later, None
        if at is None:
            return
        values = at.figures.values()
        late = self.reads_late
        good = all(map(math.isfinite, values))
        if late and self.args.world_size > 1:
            values.pop()
        norm = values.pop() if at.has_norm else None
        if self.is_deepspeed_enabled:
            # It has done the step already, or has left it out, on all ranks alike.
            good = not self.accelerator.optimizer_step_was_skipped
        elif self.args.world_size > 1 and not late:
            # All leave the step out, or none does.
            good = not any(self._over_ranks(int(not good)))
        if good:
            self.bad_streak = 0
            self._look_for_spikes(at, values, norm)
            return
        if not late:
            # An optimizer passes over a weight without gradient: neither it nor its state changes.
            self.model_wrapped.zero_grad(set_to_none=True)
        self.bad_steps, self.bad_streak = self.bad_steps + 1, self.bad_streak + 1
        what = "gradient" if all(map(math.isfinite, values)) else "loss"
        if self.bad_steps <= KEPT:
            self._note_down(at, values, what=f"{what} is not finite")
        limit = self.parts.train.loss_watchdog_patience or BAD_STEPS
        if self.bad_streak < limit:
            self.tell(
                f"The {what} of step {at.step} is not a finite number: the step is left out ({self.bad_steps} so far)."
            )
            return
        file = self.parts.output_dir / "bad_batch.json"
        with contextlib.suppress(OSError):
            shown = rows_of_step(self, at.batches, values)  # type: ignore[arg-type]
            write_json(file, {"step": at.step, "not_finite": what, "micro_batches": shown})
        self.tell_line()
        raise TrainingDiverged(
            Problem(
                f"The {what} was not a finite number {self.bad_streak} times on end, at step {at.step} the last time.",
                f"Look at the rows in {file}. Lower `learning_rate`, raise `warmup_steps`, or train in bf16 instead of "
                "fp16; then resume from a checkpoint before it.",
                code="AX1208",
            )
        )

    def _figures(self) -> tuple[torch.Tensor, bool]:
        """The losses of the step's micro batches, and the gradient's norm behind them if there is one."""
        figures = [each.reshape(()).float() for each in self._step_losses]
        norm = self._norm
        if torch.is_tensor(norm):
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            figures.append(norm.detach().reshape(()).float().to(figures[0].device))
        elif norm is not None:
            figures.append(torch.tensor(float(norm), device=figures[0].device))
        return torch.stack(figures), norm is not None

    def _look_for_spikes(self, at: StepAt, losses: list[float], norm: float | None) -> None:
        found = self.spikes.look(sum(losses), norm)
        # What only one rank sees must not end the run on that rank alone; the norm is the same on all.
        counted = found if self.args.world_size <= 1 else [each for each in found if each.what != "loss"]
        self.spikes.streak = self.spikes.streak + 1 if counted else 0
        if not found:
            return
        self.spikes.count += 1
        number, patience = self.spikes.count, self.parts.train.spike_patience
        file = self._note_down(at, losses, spikes=found) if number <= KEPT else None
        where = f" Its rows are in {file}." if file is not None else ""
        said = f"Step {at.step} is out of the ordinary: {'; '.join(map(str, found))}"
        if number <= TOLD_ONE_BY_ONE or number % 10 == 0:
            self.tell(f"{said} ({number} so far).{where} [AX1207]")
        if patience is not None and self.spikes.streak >= patience:
            self.tell_line()
            raise TrainingDiverged(
                Problem(
                    f"{said}, the {self.spikes.streak}th step on end (`spike_patience: {patience}`).",
                    f"Look at the rows in {file or 'anomalies.jsonl'}. Lower `learning_rate` or `max_grad_norm`, or "
                    "mend the data; then resume from a checkpoint before it.",
                    keys=("spike_patience",),
                    code="AX1207",
                )
            )

    def _note_down(
        self, at: StepAt, losses: list[float], *, what: str = "", spikes: Sequence[Spike] = ()
    ) -> Any:
        line: dict[str, Any] = {"step": at.step}
        line |= {"what": what} if what else {"spikes": [dataclasses.asdict(each) for each in spikes]}
        line["micro_batches"] = rows_of_step(self, at.batches, losses)  # type: ignore[arg-type]
        return note_down(self.parts.output_dir, self.args.process_index, line)


class StepCheck(TrainerCallback):
    """Looks at loss and gradient before each step of the optimizer, and counts the optimizer's time."""

    def __init__(self, trainer: TrainerMixin) -> None:
        self.trainer, self.at = trainer, 0.0

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        # Steps that are done again are noted down again.
        with contextlib.suppress(OSError):
            for file in self.trainer.parts.output_dir.glob("anomalies*.jsonl") if args.should_save else ():
                cut_back(file, state.global_step)

    def on_pre_optimizer_step(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.trainer.check_step()
        self.at = time.perf_counter()

    def on_optimizer_step(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.trainer.clock.add("optimizer", time.perf_counter() - self.at)
        if self.trainer.reads_late:
            flagged_optimizer(self.trainer.optimizer).found_inf = None

    def on_epoch_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        # The next epoch numbers its batches anew.
        self.trainer.judge()
        self.trainer.tell_line()


def cut(collator: Any, bins: Sequence[Sequence[Row]], parts: int) -> list[Batch]:
    """The batch of these bins in about so many parts of about as many tokens; a row is never cut.

    Nothing is filled up to a given length, since that would take as much memory as the whole.
    """
    loose = isinstance(collator, PackedCollator) and len(bins) < parts
    units = [[row] for each in bins for row in each] if loose else [list(each) for each in bins]
    lengths = [sum(len(ids) for ids, _ in unit) for unit in units]
    whole, at = max(sum(lengths), 1), 0
    groups: list[list[list[Row]]] = [[] for _ in range(parts)]
    for unit, length in zip(units, lengths, strict=True):
        groups[min(parts - 1, (2 * at + length) * parts // (2 * whole))].append(unit)
        at += length
    collate = dataclasses.replace(collator, pad_to=None)
    made = []
    for group in filter(None, groups):
        # Rows out of a bin become a bin again: side by side they would be padded.
        batch = collate([[row for unit in group for row in unit]] if loose else group)
        batch.pop("token_counts")
        made.append(batch)
    return made
