"""What the model answers while it is trained: at each evaluation a few rows of the evaluation data are answered."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_callback import TrainerControl as Control
from transformers.trainer_callback import TrainerState as State
from transformers.training_args import TrainingArguments as Args

from axolotl.config.train import TrainSection
from axolotl.console import note
from axolotl.data.collate import Row
from axolotl.data.types import IGNORE_INDEX
from axolotl.errors import DataError
from axolotl.inference.generate import Sampling, Stops, generate
from axolotl.model.attention import generating
from axolotl.model.load import stop_ids
from axolotl.train.batches import BatchSource
from axolotl.train.progress import RunLog

if TYPE_CHECKING:
    from axolotl.train.trainer import TrainerMixin

SHOWN = 200  # characters of a prompt and an answer in the log


class Samples(TrainerCallback):
    """Answers the beginnings of rows, shows the answers and writes them into run.jsonl (kind `sample`).

    The same rows and the same random numbers each time, so that the answers can be compared. Training does not notice:
    it goes on with the random state that it had.
    """

    def __init__(self, trainer: TrainerMixin, train: TrainSection, log: RunLog) -> None:
        self.trainer, self.train, self.log = trainer, train, log
        self.on = train.generate_samples
        self.sampling = Sampling(
            max_new_tokens=train.generation_max_new_tokens,
            temperature=train.generation_temperature,
            top_p=train.generation_top_p,
            top_k=train.generation_top_k,
            do_sample=train.generation_do_sample,
            seed=trainer.args.seed,
        )

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if self.on and (self.trainer.is_deepspeed_enabled or self.trainer.parts.sharding):
            self.on = False
            self.trainer.tell("`generate_samples`: a sharded model gives no answers while it is trained.")

    def on_evaluate(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if not self.on or not state.is_world_process_zero:
            return
        with self.trainer.clock.stopped("evaluate"), undisturbed():
            self._answer(state)

    def _answer(self, state: State) -> None:
        trainer = self.trainer
        batches = trainer.parts.eval_batches
        if batches is None:
            return
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        was_training, caches = model.training, base.config.use_cache
        model.eval()
        base.config.use_cache = True
        try:
            with generating(base):
                self._answer_rows(state, batches, model)
        finally:
            base.config.use_cache = caches
            model.train(was_training)

    def _answer_rows(self, state: State, batches: BatchSource, model: Any) -> None:
        trainer = self.trainer
        tokenizer: Any = trainer.processing_class
        stops = Stops(tuple(stop_ids(model, tokenizer)))
        for number in range(min(self.train.num_generation_samples, len(batches.rows))):
            if trainer.parts.interrupted():
                return
            prompt, expected = parted(batches.rows.row(number), self.train.generation_prompt_ratio)
            try:
                answer = generate(
                    model,
                    tokenizer,
                    prompt,
                    self.sampling,
                    stops,
                    cancelled=trainer.parts.interrupted,
                )
            except DataError:
                # It fills the model's context: there is no room for an answer.
                continue
            asked = str(tokenizer.decode(prompt, skip_special_tokens=True))
            right = str(tokenizer.decode(expected, skip_special_tokens=True))
            line = {"row": number, "prompt": asked, "answer": answer.text, "expected": right}
            self.log.sample(state.global_step, state.epoch, line)
            note(f"step {state.global_step}: {_short(asked)} → {_short(answer.text)}")


def parted(row: Row, share: float) -> tuple[list[int], list[int]]:
    """A row's ids as a prompt and what is expected after it.

    The prompt is all before the first trained token; of a row that is trained from its beginning on, a share of it.
    """
    ids, labels = (np.asarray(each) for each in row)
    trained = np.flatnonzero(labels != IGNORE_INDEX)
    first = int(trained[0]) if len(trained) else len(ids)
    if first <= 1:
        first = max(1, int(len(ids) * share))
    return ids[:first].tolist(), ids[first:].tolist()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Gives all random numbers back the state that they had before."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"
