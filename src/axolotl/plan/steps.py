"""How many steps, tokens and epochs a run has, and what its batches look like: exact from prepared data, else estimated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from axolotl.config import Config
from axolotl.data.packing import Volume
from axolotl.data.survey import Sample, find_prepared, sample
from axolotl.plan.rehearsal import Batch
from axolotl.train.batches import BatchSource, build_batches

if TYPE_CHECKING:
    from axolotl.model.attention import AttentionChoice

LOOKED_AT = 256
"""Batches of an epoch whose shape is looked at for the usual one."""


@dataclass(frozen=True)
class Rows:
    """The rows of a set."""

    dataset: datasets.Dataset
    trained: int
    """Trained tokens, of all its rows."""
    share: float
    """The part of the whole that these rows are: 1 for all."""
    source: str

    @property
    def exact(self) -> bool:
        return self.source == "prepared"


@dataclass(frozen=True)
class Course:
    """The length of a run, and its batches on one GPU."""

    volume: Volume
    largest: Batch
    """The micro batch that takes the most memory."""
    usual: Batch
    """The average one, for time."""
    trained_share: float
    """Share of the tokens that are trained."""
    exact: bool
    rows: int


def rows_of(cfg: Config, tokenizer: Any) -> tuple[Rows, Rows | None]:
    """The training and the held-out rows: prepared ones where they are there, else a sample. Writes nothing.

    Raises a UserError for data that cannot be opened.
    """
    seed = 42 if cfg.train.seed is None else cfg.train.seed
    prepared, tasks = find_prepared(cfg.data, tokenizer, seed=seed, places=cfg.place)
    if prepared is not None:
        index = prepared.row_index()
        held = prepared.eval_dataset()
        train = Rows(
            prepared.train_dataset(), int(index["trained"][prepared.mixture.train].sum()), 1.0, "prepared"
        )
        return train, None if held is None else Rows(held, 0, 1.0, "prepared")
    seen = sample(tasks)
    if cfg.data.test_datasets:
        names = [t.set_name for t in tasks if t.set_name != "train"]
        return _from_sample(seen, slice(None)), _from_sample(sample(tasks, names[0]), slice(None))
    size = cfg.data.val_set_size
    count = len(seen.lengths)
    held_out = int(size * seen.share) if size >= 1 else int(size * count)
    held_out = min(max(held_out, 1), count - 1) if size and count > 1 else 0
    test = _from_sample(seen, slice(count - held_out, count)) if held_out else None
    return _from_sample(seen, slice(0, count - held_out)), test


def _from_sample(seen: Sample, part: slice) -> Rows:
    ends = np.cumsum(seen.lengths)
    numbers = range(len(seen.lengths))[part]
    ids = [seen.ids[ends[i] - seen.lengths[i] : ends[i]].tolist() for i in numbers]
    labels = [seen.labels[ends[i] - seen.lengths[i] : ends[i]].tolist() for i in numbers]
    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "labels": datasets.List(datasets.Value("int32")),
        }
    )
    dataset = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}, features=features)
    whole = seen.of is None or seen.read >= seen.of
    return Rows(dataset, int(seen.trained[part].sum()), seen.share, "whole" if whole else "sample")


def course_of(
    cfg: Config, rows: Rows, attention: AttentionChoice, copies: int, *, evaluation: bool = False
) -> Course:
    """How training (or one evaluation) goes through these rows, with `copies` batches at once."""
    source = build_batches(
        rows.dataset, cfg.data, cfg.train, attention, pad_token_id=0, evaluation=evaluation, alignment=8
    )
    train = cfg.train
    if evaluation:
        train = train.model_copy(
            update={"num_epochs": 1.0, "max_steps": None, "gradient_accumulation_steps": 1}
        )
    volume = _scaled(source.volume(train, copies), rows.share, train)
    largest, usual = shapes(cfg, source, attention)
    if largest.packed:
        # One joined row stands for micro_batch_size rows of sequence_len.
        micro = (cfg.train.eval_batch_size if evaluation else None) or cfg.train.rows_at_once
        largest, usual = (replace(b, rows=micro, length=-(-b.tokens // micro)) for b in (largest, usual))
    tokens = int(source.rows.lengths.sum())
    return Course(
        volume,
        largest,
        usual,
        rows.trained / tokens if tokens else 0.0,
        rows.source != "sample",
        round(len(source.rows) / rows.share),
    )


def _scaled(volume: Volume, share: float, train: Any) -> Volume:
    if share >= 1:
        return volume
    batches = max(1, round(volume.batches_per_epoch / share))
    steps = math.ceil(batches / train.gradient_accumulation_steps)
    total = train.max_steps or max(1, math.ceil(round(train.num_epochs * steps, 6)))
    return replace(
        volume,
        batches_per_epoch=batches,
        steps_per_epoch=steps,
        total_steps=total,
        epochs=total / steps,
        tokens_per_epoch=round(volume.tokens_per_epoch / share),
    )


def shapes(cfg: Config, source: BatchSource, attention: AttentionChoice) -> tuple[Batch, Batch]:
    """The largest micro batch of an epoch, and the average one."""
    plan, lengths = source.plan_of(0), source.rows.lengths.astype(np.int64)
    size = source.bins_per_batch
    count = math.ceil(len(plan) / size)
    numbers = np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int))
    if plan.capacity is None and len(lengths):
        numbers = np.unique(np.append(numbers, int(np.argmax(lengths[plan.rows])) // size))
    found: list[tuple[int, int, float, bool]] = []
    padding = source.collator
    multiple = getattr(padding, "multiple_of", None) or 1
    fill = getattr(padding, "pad_to", None) or 0
    for i in numbers:
        bins = [plan[j] for j in range(int(i) * size, min((int(i) + 1) * size, len(plan)))]
        filled = [int(lengths[b].sum()) for b in bins]
        pairs = float(sum((lengths[b] * (lengths[b] + 1) / 2).sum() for b in bins))
        length = max(fill, math.ceil(max(filled) / multiple) * multiple)
        found.append((len(bins), length, pairs, any(f < length for f in filled)))
    rows = max(n for n, *_ in found)
    longest = max(length for _, length, *_ in found)
    mean = sum(length for _, length, *_ in found) / len(found)
    packed = bool(attention.joined and (plan.capacity is not None or cfg.data.batch_flattening))
    between = plan.capacity is not None and attention.name == "sdpa"
    masked = not packed and (between or any(ragged for *_, ragged in found))
    full = [f for f in found if f[0] == rows] or found
    pairs = sum(p for _, _, p, _ in full) / len(full)
    largest = Batch(rows, longest, packed=packed, masked=masked)
    usual = Batch(rows, max(8, round(mean / 8) * 8), pairs if packed else 0.0, packed, masked)
    return largest, usual


def shapes_without_data(cfg: Config, attention: AttentionChoice, *, evaluation: bool = False) -> Batch:
    """The micro batch of a run of which no row is known: rows as long as the config allows, and one of them filled up, so
    that attention gets a mask."""
    train, data = cfg.train, cfg.data
    rows = (train.eval_batch_size if evaluation else None) or train.rows_at_once
    length = (data.eval_sequence_len if evaluation else None) or data.sequence_len
    packing = data.sample_packing and attention.joined
    return Batch(rows, length, packed=packing, masked=not packing)
