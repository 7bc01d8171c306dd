"""The mixin that makes transformers' and TRL's trainers ours: batches, loss, evaluation, figures, checkpoints.

Only hooks that the trainers offer are overridden; nothing of theirs is patched.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer import Trainer
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput

from axolotl.config.adapter import AdapterSection
from axolotl.config.axes import Axes
from axolotl.config.distributed import DistributedSection
from axolotl.config.optim import OptimSection
from axolotl.config.train import TrainSection
from axolotl.console import warn
from axolotl.data.packing import Volume
from axolotl.data.types import IGNORE_INDEX
from axolotl.distributed.fsdp import Sharding, give_back
from axolotl.distributed.world import peak_memory_bytes, world
from axolotl.errors import AxolotlError, DataError
from axolotl.model.recompute import Recomputing
from axolotl.model.replace import Replacements
from axolotl.optim.build import build_optimizer, build_schedule
from axolotl.train.anomalies import SpikeWatch
from axolotl.train.batches import BatchSource, EpochBatches
from axolotl.train.cadence import Cadence
from axolotl.train.checkpoint import RunState
from axolotl.train.late import Arriving, LineAt
from axolotl.train.saving import Saving
from axolotl.train.sharded import Sharded
from axolotl.train.steps import Clock, Steps
from axolotl.train.streamed import Numbers, StreamSource
from axolotl.weights.publish import Uploads

# It compares steps of saving that we work out ourselves; what the user changed is told from the config.
logging.getLogger("transformers.trainer_utils").addFilter(
    lambda record: "do not match the ones in the" not in str(record.msg)
)

# The mixin goes in front of trainers of several packages; for a type checker it is in front of this one.
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class Interrupted(AxolotlError):
    """The run was asked to end while it was evaluating; training is between two steps."""


@dataclass
class Parts:
    """What a run is made of, beside model and arguments."""

    optim: OptimSection
    adapter: AdapterSection
    train: TrainSection
    batches: BatchSource | StreamSource
    eval_batches: BatchSource | None
    volume: Volume
    cadence: Cadence
    output_dir: Path
    run_id: str
    plan: str
    """Digest of the first epoch's plan."""
    autocast: torch.dtype | None = None
    """Number type that the model computes in, where it is not that of its weights."""
    recomputing: Recomputing = field(default_factory=Recomputing)
    """What is computed again in the backward pass, and what waits elsewhere."""
    replaced: Replacements = field(default_factory=Replacements)
    """What kernels have replaced in the model."""
    interrupted: Callable[[], bool] = field(default=lambda: False)
    """True once the run was asked to end."""
    asked: dict[str, Any] = field(default_factory=dict)
    """What the config asks for, as plain data without secrets; saved with each checkpoint."""
    run: dict[str, Any] = field(default_factory=dict)
    """What run.json holds while the run goes on."""
    distributed: DistributedSection = field(default_factory=DistributedSection)
    sharding: Sharding | None = None
    """How FSDP2 has divided the model; None where every process holds it."""
    uploads: Uploads | None = None
    """What uploads checkpoints; None without `hub_model_id`, and on all ranks but the first."""
    axes: Axes = field(default_factory=Axes)
    """How the processes are divided; those that share rows or products are one for the data."""

    @property
    def data_place(self) -> tuple[int, int]:
        """Which rows this process gets, and among how many the rows are divided."""
        return self.axes.data_rank(world().rank), self.axes.data_ranks


class TrainerMixin(Sharded, Saving, Steps, _Base):
    """Goes in front of a trainer class. The loss is normalised by the trained tokens of the whole global batch."""

    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    compute_loss_func: Any
    control: Any
    _line: LineAt | None = None
    """A line of the log that waits for its numbers."""

    def __init__(self, *args: Any, parts: Parts, **kwargs: Any) -> None:
        self.parts = parts
        self.clock = Clock()
        self.trained_tokens = 0
        self.order: EpochBatches | Numbers | None = None
        self.asked_to_end = False
        """Some rank got a signal before this step; all ranks know it."""
        self.tell: Callable[[str], None] = warn
        self.published = []
        self.spikes = SpikeWatch(parts.train.spike_threshold)
        self._parameters: int | None = None
        super().__init__(*args, **kwargs)
        self.mark_sharded()
        self.remove_callback(PrinterCallback)
        if not self.model_accepts_loss_kwargs and self.compute_loss_func is None:
            self.compute_loss_func = token_loss

    # Batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = self.parts.batches.loader(self.parts.train, *self.parts.data_place)
        self.order = loader.batch_sampler  # type: ignore[assignment]
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        ours = self.parts.eval_batches
        if ours is None or (eval_dataset is not None and eval_dataset is not ours.rows):
            return super().get_eval_dataloader(eval_dataset)
        return ours.loader(self.parts.train, *self.parts.data_place, evaluation=True)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: Any = None
    ) -> tuple[list[Any], torch.Tensor | None]:
        """The batches of one step, and how many tokens they train on all ranks together."""
        self.begin_step()
        with self.clock.counted("data"):
            batches = list(itertools.islice(epoch_iterator, num_batches))
        counts = [batch.pop("token_counts") for batch in batches]
        wish = int(self.parts.interrupted())
        tokens, targets, wishes = self._over_ranks(sum(c[0] for c in counts), sum(c[1] for c in counts), wish)
        self.asked_to_end = wishes > 0
        # Those that share products count the same rows. Each of them has its losses in the mean over all, so that they
        # stay in what the loss is divided by.
        again = self.parts.axes.tensor
        self.state.num_input_tokens_seen += tokens // again
        self.trained_tokens += targets // again
        return batches, torch.tensor(max(targets, 1)).to(self.args.device, non_blocking=True)

    def _over_ranks(self, *numbers: int) -> list[int]:
        if self.args.world_size <= 1:
            return list(numbers)
        # From CPU to CPU: a GPU may be busy with the last step, and would have to finish it first.
        here = torch.tensor(numbers, dtype=torch.int64)
        torch.distributed.all_reduce(here)
        return [int(n) for n in here.tolist()]

    # Loss

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        device = self.args.device.type
        if self.parts.autocast is not None:
            stack.enter_context(torch.autocast(device, self.parts.autocast))
        away = self.parts.recomputing.hooks() if torch.is_grad_enabled() else None
        if away is not None:
            stack.enter_context(away)
        return stack

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Counting parameters anew for every batch, as transformers does, costs milliseconds.
        if self._parameters is None:
            self._parameters = sum(p.numel() for n, p in self.model.named_parameters() if "embed" not in n)
        ids = inputs.get("input_ids")
        return 6 * ids.numel() * self._parameters if ids is not None else 0

    # Optimizer

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Tells what a checkpoint lacks; a head that is the embedding is not stored, and nothing is lost by that."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        lacking = set(load_result.missing_keys)
        there = {id(parameter) for key, parameter in named.items() if key not in lacking}
        if missing := [key for key in load_result.missing_keys if id(named.get(key)) not in there]:
            self.tell(f"The checkpoint lacks {len(missing)} of the model's weights, such as `{missing[0]}`.")
        if unknown := list(load_result.unexpected_keys):
            self.tell(
                f"The checkpoint has {len(unknown)} weights that the model has not, such as `{unknown[0]}`."
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(model or self.model, self.parts.optim, self.parts.adapter)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = build_schedule(
                optimizer or self.optimizer, self.parts.optim, num_training_steps
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.clock.stopped("evaluate"):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss over all trained tokens of the set, however they are batched, and its perplexity.

        Raises DataError for a set of which nothing is trained, Interrupted when the run is asked to end.
        """
        model = self.model_wrapped if self.is_in_train else self.model
        was_training = model.training
        model.eval()
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()
        self.callback_handler.eval_dataloader = dataloader
        one = torch.ones((), device=self.args.device)
        total = torch.zeros(
            (), dtype=torch.float64, device="cpu" if self.args.device.type == "mps" else self.args.device
        )
        targets = 0
        for batch in dataloader:
            if self.args.world_size <= 1 and self.parts.interrupted():
                raise Interrupted("The run was asked to end.")
            targets += batch.pop("token_counts")[1]
            with torch.no_grad(), self.compute_loss_context_manager():
                loss: Any = self.compute_loss(model, self._prepare_inputs(batch), num_items_in_batch=one)
            total += loss.detach().to(total.device, total.dtype)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        give_back(model)
        model.train(was_training)
        # On several ranks compute_loss multiplies by their number, to undo the mean that DDP takes of gradients.
        total = total / max(self.args.world_size, 1)
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total, "sum")
        (all_targets,) = self._over_ranks(targets)
        if not all_targets:
            raise DataError(
                "No row of the evaluation data has a trained token.", "Check the masks of the test data."
            )
        mean = float(total) / all_targets
        metrics = {f"{metric_key_prefix}_loss": mean, f"{metric_key_prefix}_ppl": perplexity(mean)}
        rows = len(dataloader.dataset)  # type: ignore[arg-type]
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)  # type: ignore[arg-type]

    # Figures

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: Any,
        model: Any,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: Any,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        step = self.state.global_step
        if self.reads_late:
            # Telling a line takes the wish for one back.
            wanted = self.control.should_log and step > self._globalstep_last_logged
            self.tell_line()
            if wanted:
                self._line = self._line_at(tr_loss, grad_norm, learning_rate, start_time)
                tr_loss -= tr_loss
                self._globalstep_last_logged = step
                self.store_flos()
            control = self.control
            control.should_log = False
            ends = control.should_training_stop or control.should_epoch_stop or step >= self.state.max_steps
            if ends or control.should_evaluate or control.should_save:
                self.judge()
                self.tell_line()
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )

    def _line_at(
        self, tr_loss: torch.Tensor, norm: Any, learning_rate: float | None, start_time: float
    ) -> LineAt:
        """The line of the present step, whose numbers are still being computed."""
        failed = self._failed_losses
        failed = torch.zeros_like(tr_loss) if failed is None else failed.to(tr_loss)
        if self.args.world_size > 1:
            both = torch.stack((tr_loss.reshape(()) / self.args.world_size, failed.reshape(())))
            torch.distributed.all_reduce(both)
            tr_loss, failed = both.unbind()
        length = norm if torch.is_tensor(norm) else torch.tensor(math.nan if norm is None else float(norm))
        numbers = [
            each.detach().reshape(()).double() for each in (tr_loss, failed, length.to(tr_loss.device))
        ]
        self._failed_losses = None
        return LineAt(
            self.state.global_step,
            self.state.epoch,
            self.state.global_step - self._globalstep_last_logged,
            self._get_learning_rate() if learning_rate is None else learning_rate,
            self.state.num_input_tokens_seen,
            self.trained_tokens,
            Arriving(torch.stack(numbers)),
            start_time,
        )

    def tell_line(self) -> None:
        line, self._line = self._line, None
        if line is None:
            return
        loss, failed, *norm = line.figures.values()
        self._total_loss_scalar += loss
        logs = {"loss": math.nan if failed else loss / line.steps}
        if norm:
            logs["grad_norm"] = norm[0]
        logs["learning_rate"] = line.learning_rate
        logs |= self._interval(logs["loss"], line.tokens, line.trained_tokens, line.step)
        state: Any = self.state
        step, epoch = state.global_step, state.epoch
        state.global_step, state.epoch = line.step, line.epoch
        try:
            super().log(logs, line.start_time)
        finally:
            state.global_step, state.epoch = step, epoch

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and "train_runtime" not in logs:
            failed = 0 if self._failed_losses is None else int(self._failed_losses)
            if any(self._over_ranks(failed)):
                logs["loss"] = math.nan
            self._failed_losses = None
            seen, step = self.state.num_input_tokens_seen, self.state.global_step
            logs |= self._interval(logs["loss"], seen, self.trained_tokens, step)
        super().log(logs, *args, **kwargs)

    def _interval(self, loss: float, tokens: int, trained_tokens: int, step: int) -> dict[str, float]:
        """What a line of the log says besides loss and gradient; ends the clock's interval."""
        rate, per_step, spent = self.clock.lap(tokens, step)
        return {
            "ppl": perplexity(loss),
            "tokens": tokens,
            "trained_tokens": trained_tokens,
            "tokens_per_second": rate,
            "seconds_per_step": per_step,
            "peak_memory_gib": peak_memory_bytes() / 2**30,
        } | {f"{what}_seconds": round(seconds, 6) for what, seconds in spent.items()}

    # Checkpoints

    def run_state(self) -> RunState:
        """Our own part of a checkpoint at the present step."""
        parts = self.parts
        return RunState(
            run_id=parts.run_id,
            step=self.state.global_step,
            total_steps=parts.volume.total_steps,
            steps_per_epoch=parts.volume.steps_per_epoch,
            plan=parts.plan,
            seed=self.args.seed,
            ranks=self.parts.axes.data_ranks,
            trained_tokens=self.trained_tokens,
            bad_steps=self.bad_steps,
            bad_streak=self.bad_streak,
            losses=tuple(self.spikes.losses),
            norms=tuple(self.spikes.norms),
            spikes=self.spikes.count,
            spike_streak=self.spikes.streak,
            split=self.split,
            accumulation=self.args.gradient_accumulation_steps,
        )


class CausalTrainer(TrainerMixin, Trainer):  # type: ignore[misc]
    """The trainer of supervised fine-tuning."""


def token_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of the next token, summed and divided by `num_items_in_batch`; for models that take no such number.

    `labels` [B,T] are not shifted; logits [B,T,V] are taken from the outputs.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:].reshape(-1).to(logits.device)
    total = F.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), targets, reduction="sum")
    return total / ((targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
