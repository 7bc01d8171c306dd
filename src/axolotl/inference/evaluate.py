"""How good a model is on held-out rows: loss, perplexity, and how many answers it gets exactly right.

B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from axolotl.data.types import IGNORE_INDEX
from axolotl.errors import DataError
from axolotl.inference.generate import Sampling, Stops, decode, generate_batch


@dataclass(frozen=True)
class LossReport:
    """Mean loss over all trained tokens of all rows (each token counts the same), and e to its power."""

    loss: float
    perplexity: float
    tokens: int
    rows: int


@dataclass(frozen=True)
class Sample:
    """One row of an exact-match test."""

    prompt: str
    expected: str
    answer: str
    match: bool


@dataclass(frozen=True)
class MatchReport:
    """How many answers were exactly right; `skipped` rows have nothing to ask or nothing to compare with."""

    matches: int
    rows: int
    skipped: int
    samples: list[Sample] = field(default_factory=list, repr=False)

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.matches / self.rows if self.rows else 0.0

    def write_csv(self, path: Path) -> None:
        """All samples as a table."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt", "expected", "answer", "match"])
            writer.writerows([s.prompt, s.expected, s.answer, s.match] for s in self.samples)


def evaluate_loss(
    model: Any, dataset: Any, *, tokens_per_batch: int = 8192, on_batch: Callable[[int], None] | None = None
) -> LossReport:
    """Loss of a model on tokenised rows (`input_ids`, `labels`). Raises DataError where no token counts.

    Rows of similar length share a batch of at most `tokens_per_batch` tokens. `on_batch` gets the number of rows done.
    """
    lengths = [len(ids) for ids in dataset["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    total, count, done = 0.0, 0, 0
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in _batches(order, lengths, tokens_per_batch):
            rows = [dataset[i] for i in batch]
            width = max(lengths[i] for i in batch)
            ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
            labels_BT = torch.full((len(rows), width), IGNORE_INDEX)
            mask_BT = torch.zeros(len(rows), width, dtype=torch.long)
            for i, row in enumerate(rows):
                n = len(row["input_ids"])
                ids_BT[i, :n] = torch.tensor(row["input_ids"])
                labels_BT[i, :n] = torch.tensor(row["labels"])
                mask_BT[i, :n] = 1
            device = model.device
            logits_BTV = model(
                input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False
            ).logits
            for i in range(len(rows)):  # float32 logits of one row at a time
                targets_T = labels_BT[i, 1:].to(device)
                kept = targets_T != IGNORE_INDEX
                if kept.any():
                    loss = F.cross_entropy(logits_BTV[i, :-1][kept].float(), targets_T[kept], reduction="sum")
                    total += float(loss.double())
                    count += int(kept.sum())
            done += len(rows)
            if on_batch is not None:
                on_batch(done)
    model.train(was_training)
    if not count:
        raise DataError(
            "The test set has no row in which any token counts.",
            "Check its labels with `preprocess --debug`.",
        )
    mean = total / count
    return LossReport(mean, math.exp(min(mean, 700.0)), count, len(lengths))


def _batches(order: Sequence[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def last_answer(input_ids: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """(prompt, answer) of a row: the last trained stretch and all before it; None where either is empty."""
    end = len(labels)
    while end and labels[end - 1] == IGNORE_INDEX:
        end -= 1
    start = end
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return (list(input_ids[:start]), list(input_ids[start:end])) if 0 < start < end else None


def exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    stops: Stops,
    *,
    batch_size: int = 64,
    max_rows: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> MatchReport:
    """Asks the model every row's last question, greedily, and compares the answer's text with the row's.

    Works on tokenised rows of any format. White space around an answer does not count. An answer may grow eight tokens
    longer than the right one; beyond that it cannot match any more.
    """
    pairs = []
    skipped = 0
    rows = range(len(dataset) if max_rows is None else min(max_rows, len(dataset)))
    for i in rows:
        row = dataset[i]
        pair = last_answer(row["input_ids"], row["labels"])
        if pair is None:
            skipped += 1
        else:
            pairs.append((i, *pair))
    samples: dict[int, Sample] = {}
    model.eval()
    pairs.sort(key=lambda p: (len(p[1]), len(p[2])))
    for at in range(0, len(pairs), batch_size):
        batch = pairs[at : at + batch_size]
        longest = max(len(answer) for *_, answer in batch)
        sampling = Sampling(max_new_tokens=longest + 8, do_sample=False)
        results = generate_batch(model, tokenizer, [prompt for _, prompt, _ in batch], sampling, stops)
        for (i, prompt, expected), (new, _) in zip(batch, results, strict=True):
            while expected and expected[-1] in stops.ids:
                expected = expected[:-1]
            wanted, given = (decode(tokenizer, ids, stops).strip() for ids in (expected, new))
            samples[i] = Sample(str(tokenizer.decode(prompt)), wanted, given, wanted == given)
        if on_batch is not None:
            on_batch(min(at + batch_size, len(pairs)))
    ordered = [samples[i] for i in sorted(samples)]
    return MatchReport(sum(s.match for s in ordered), len(ordered), skipped, ordered)
