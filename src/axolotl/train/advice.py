"""Says what a loss means: before the first step, and when it stays flat; each time with the evidence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_callback import TrainerControl as Control
from transformers.trainer_callback import TrainerState as State
from transformers.training_args import TrainingArguments as Args

from axolotl.config import Config
from axolotl.console import note, warn
from axolotl.data.types import IGNORE_INDEX
from axolotl.model.embeddings import embedding_rows
from axolotl.train.rows import TokenRows
from axolotl.train.trainer import CausalTrainer

LOOKED_AT = 512
"""Rows whose labels are counted."""
FEW = 0.01
"""Share of trained tokens below which the data is told to be suspicious."""
GUESSING = 0.9
"""Share of ln(vocabulary) above which a loss is that of guessing."""
WINDOW = 20
"""Log lines of which the mean is taken."""
FLAT = 0.01
"""Part of the first mean by which the loss has to have fallen after `PATIENCE` log lines."""
PATIENCE = 100


def trained_share(rows: TokenRows) -> float:
    """Share of the tokens that have a label, of rows spread over the data."""
    count = len(rows)
    tokens = trained = 0
    for i in range(0, count, max(1, count // LOOKED_AT)):
        labels = rows.row(i)[1]
        tokens += len(labels)
        trained += int((labels != IGNORE_INDEX).sum())
    return trained / tokens if tokens else 0.0


class LossAdvice(TrainerCallback):
    """Tells what the loss says about a supervised run. It changes nothing, and draws no random number."""

    def __init__(self, trainer: Any, cfg: Config) -> None:
        self.trainer, self.cfg = trainer, cfg
        rows = trainer.parts.batches.rows
        self.share = trained_share(rows) if isinstance(rows, TokenRows) and len(rows) else None
        self.told_flat = False

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        share = self.share
        if share is None or state.global_step or not state.is_world_process_zero:
            return
        if share < FEW:
            self.trainer.tell(
                f"Only {share:.2%} of the tokens are trained, so the loss will hardly move: see `axolotl preprocess "
                "--debug`. [AX1103]"
            )
        if args.world_size > 1 or self.trainer.is_deepspeed_enabled:
            return
        if type(self.trainer) is not CausalTrainer:
            return
        found = self._first_losses()
        if found is None:
            return
        loss, base = found
        guessing = math.log(embedding_rows(self._inner()))
        beside = "" if base is None else f", the base model's own {base:.3f}"
        note(
            f"Before training: loss {loss:.3f} (guessing {guessing:.2f}{beside}); {share:.1%} of the tokens are trained."
        )
        if not self.cfg.model.reinit_weights and loss > GUESSING * guessing:
            warn(
                f"The first loss, {loss:.2f}, is that of guessing among {embedding_rows(self._inner()):,} tokens "
                f"({guessing:.2f}): the model does not know this text. Are tokenizer, template and weights its own? [AX1205]"
            )
        elif base is not None and loss > base + max(0.5, 0.25 * base):
            warn(
                f"With the adapter the first loss is {loss:.2f}, without it {base:.2f}: the adapter does not start where "
                "the base model is. Check `peft_init_lora_weights` and `lora_model_dir`. [AX1205]"
            )

    def _inner(self) -> Any:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _first_losses(self) -> tuple[float, float | None] | None:
        """The loss of the first batch, and the same without the adapter; None where memory is short."""
        trainer, model = self.trainer, self.trainer.model
        batches = trainer.parts.batches
        plan = batches.plan_of(0)
        if not len(plan):
            return None
        bins = [plan[i] for i in range(min(batches.bins_per_batch, len(plan)))]
        batch = batches.collator(batches.rows.__getitems__(bins))
        _, targets = batch.pop("token_counts")
        was_training = model.training
        model.eval()
        try:
            inputs = trainer._prepare_inputs(batch)
            items = torch.tensor(max(targets, 1), device=trainer.args.device)

            def loss() -> float:
                with torch.no_grad(), trainer.compute_loss_context_manager():
                    return float(trainer.compute_loss(model, dict(inputs), num_items_in_batch=items))

            first, base = loss(), None
            if hasattr(model, "disable_adapter"):
                with model.disable_adapter():
                    base = loss()
            return first, base
        except torch.OutOfMemoryError:
            return None
        finally:
            model.train(was_training)

    def on_log(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in state.log_history[-1]:
            return
        lines = [line for line in state.log_history if "loss" in line and math.isfinite(line["loss"])]
        losses = [float(line["loss"]) for line in lines]
        if not self.told_flat and len(lines) == PATIENCE:
            self._flat(losses, lines[-1])

    def _flat(self, losses: Sequence[float], line: dict[str, Any]) -> None:
        first, last = statistics.fmean(losses[:WINDOW]), statistics.fmean(losses[-WINDOW:])
        if first - last > FLAT * abs(first):
            return
        self.told_flat = True
        what = f"{first:.3f} at first, {last:.3f} now (means of {WINDOW} lines)"
        self.trainer.tell(
            f"The loss has not fallen in {PATIENCE} log lines: {what}; {self._evidence(line)}. {self._cause(line)} [AX1206]"
        )

    def _evidence(self, line: dict[str, Any]) -> str:
        found = [f"learning rate {line['learning_rate']:.2e}"] if "learning_rate" in line else []
        if "grad_norm" in line:
            found.append(f"gradient {float(line['grad_norm']):.3g}")
        if self.share is not None:
            found.append(f"{self.share:.1%} of the tokens trained")
        return ", ".join(found) or "no further figures"

    def _cause(self, line: dict[str, Any]) -> str:
        """The likeliest cause that the figures show."""
        rate, usual = line.get("learning_rate"), 2e-4 if self.cfg.adapter.adapter else 2e-5
        norm = line.get("grad_norm")
        if norm is not None and float(norm) < 1e-6:
            return "The gradient is zero: is everything frozen or masked?"
        if self.share is not None and self.share < 10 * FEW:
            return "Little is trained: check the masks with `axolotl preprocess --debug`."
        if rate is not None and rate < usual / 20:
            return f"The learning rate is small: {usual:g} is usual here."
        if rate is not None and rate > 20 * usual:
            return f"The learning rate is large: {usual:g} is usual here."
        if self.cfg.model.fp16:
            return "Try bf16 instead of fp16, and check the template with `axolotl doctor`."
        return "Check masks and template with `axolotl doctor`, then the learning rate."
