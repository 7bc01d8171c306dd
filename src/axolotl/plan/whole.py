"""The whole plan of a config on a GPU: what it needs, how long it takes, what it writes, and what would fit better."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from axolotl.config import Config
from axolotl.config.host import disk_free
from axolotl.config.resolve import Hardware
from axolotl.errors import UserError
from axolotl.model.attention import AttentionChoice
from axolotl.model.load import load_model_config
from axolotl.plan import fit
from axolotl.plan.estimate import Requirement, requirement
from axolotl.plan.gpus import Gpu
from axolotl.plan.layout import Layout, layout_of
from axolotl.plan.rehearsal import Batch
from axolotl.plan.skeleton import uniform_depth
from axolotl.plan.steps import Course, course_of, rows_of, shapes_without_data
from axolotl.train.build import attention_for
from axolotl.train.cadence import cadence


@dataclass(frozen=True)
class Disk:
    """Bytes that the run writes into output_dir."""

    checkpoint: int
    kept: int
    """Checkpoints that are there at the same time."""
    final: int
    free: int

    @property
    def most(self) -> int:
        """What is there at the end, and while the last checkpoint is written beside the others."""
        return self.checkpoint * (self.kept + 1) + self.final


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it begins."""

    cfg: Config
    gpu: Gpu
    layout: Layout
    memory: int
    """Bytes that the GPU can give."""
    needs: Requirement
    course: Course | None
    """None where no row of the data is known; `why` says the reason."""
    why: str
    evaluations: int
    evaluation_batches: int
    disk: Disk
    changes: tuple[fit.Change, ...] = ()
    """Where it does not fit: what would make it fit. Where it does: what would be faster."""

    @property
    def fits(self) -> bool:
        return self.needs.needed <= self.memory

    @property
    def seconds(self) -> float | None:
        """Seconds of the whole run; None where its steps are not known."""
        if self.course is None:
            return None
        looking = self.evaluations * self.evaluation_batches * self.needs.evaluated
        return self.course.volume.total_steps * self.needs.step.total + looking


@dataclass(frozen=True)
class Question:
    """What is planned: a resolved config on a machine."""

    cfg: Config
    gpu: Gpu
    hardware: Hardware
    layout: Layout
    attention: AttentionChoice
    vocabulary: int | None = None
    train: Course | None = None
    held_out: Course | None = None

    def batch(self, cfg: Config, rows: int) -> Batch:
        """A training batch of so many rows under a config that may be a changed one."""
        largest = self.train.largest if self.train else shapes_without_data(cfg, self.attention)
        # More rows at once than the data was looked at with are filled up to the longest of them.
        masked = largest.masked or (not largest.packed and rows > largest.rows)
        length = min(largest.length, cfg.data.sequence_len + 7)
        return replace(largest, rows=rows, length=length, attended=0.0, masked=masked)

    def evaluation(self, cfg: Config) -> Batch | None:
        """An evaluation batch, where the run evaluates."""
        if self.held_out is not None:
            rows = cfg.train.eval_batch_size or cfg.train.rows_at_once
            return replace(self.held_out.largest, rows=rows)
        known = self.train is not None
        if known or not (cfg.data.val_set_size or cfg.data.test_datasets):
            return None
        return shapes_without_data(cfg, self.attention, evaluation=True)

    def judge(self, cfg: Config, rows: int, depth: int) -> Requirement:
        """What a config needs with so many rows at once; `depth` 0 means all layers."""
        now = self.train if cfg is self.cfg and self.train and not depth else None
        return requirement(
            cfg,
            self.gpu,
            self.hardware,
            self.layout,
            self.attention,
            self.batch(cfg, rows),
            usual=now.usual if now else None,
            evaluation=self.evaluation(cfg) if not depth else None,
            vocabulary=self.vocabulary,
            depth=depth or None,
        )


def question(
    cfg: Config, gpu: Gpu, hardware: Hardware, *, gpus: int | None = None, tokenizer: Any = None
) -> tuple[Question, str]:
    """What is to be planned, with what is known of the data; and why nothing is, where that is so.

    `cfg` is resolved for `hardware`. Nothing is prepared or written.
    """
    layout = layout_of(cfg.distributed, gpus, max(1, len(hardware.gpu_names)))
    attention = attention_for(cfg.model, cfg.data, hardware)
    asked = Question(cfg, gpu, hardware, layout, attention, len(tokenizer) if tokenizer is not None else None)
    if tokenizer is None:
        return asked, "the tokenizer could not be read"
    if cfg.data.pretraining_dataset or cfg.data.streaming:
        return asked, "the data is streamed, and its length is not known"
    try:
        rows, held = rows_of(cfg, tokenizer)
    except UserError as error:
        return asked, error.problems[0].message
    if not len(rows.dataset):
        return asked, "no row of the data is left to train on"
    train = course_of(cfg, rows, attention, layout.copies)
    held_out = (
        course_of(cfg, held, attention, layout.copies, evaluation=True)
        if held and len(held.dataset)
        else None
    )
    return replace(asked, train=train, held_out=held_out), ""


def plan_run(
    asked: Question, memory: int, why: str = "", *, propose: bool = True, faster: bool = False
) -> Plan:
    """The plan of a question for a GPU that can give `memory` bytes.

    `propose`: look for changes that make it fit where it does not; `faster`: for faster settings where it does. Raises
    ModelError for a model that cannot be rehearsed.
    """
    cfg = asked.cfg
    needs = asked.judge(cfg, cfg.train.rows_at_once, 0)
    evaluations, batches = 0, 0
    if asked.train is not None:
        volume = asked.train.volume
        when = cadence(
            cfg.train, volume.steps_per_epoch, volume.total_steps, has_eval_data=asked.held_out is not None
        )
        # One more before the first step, as the trainer does.
        evaluations = len(when.evaluate) + 1 if when.evaluate else 0
        batches = asked.held_out.volume.batches_per_epoch if asked.held_out else 0
    plan = Plan(
        cfg,
        asked.gpu,
        asked.layout,
        memory,
        needs,
        asked.train,
        why,
        evaluations,
        batches,
        _disk(asked, needs),
    )
    if (plan.fits and not faster) or (not plan.fits and not propose):
        return plan
    return replace(plan, changes=tuple(changes(asked, memory, needs, faster=plan.fits)))


def changes(
    asked: Question, memory: int, now: Requirement | None, *, faster: bool = False
) -> list[fit.Change]:
    """Changes of the config that fit into `memory` bytes (see `fit.propose`)."""
    depth = uniform_depth(load_model_config(asked.cfg.model))
    return fit.propose(asked.cfg, fit.remembered(asked.judge), memory, depth, now, faster=faster)


def _disk(asked: Question, needs: Requirement) -> Disk:
    cfg, parameters = asked.cfg, needs.parameters
    adapter = cfg.adapter.adapter is not None
    weights = parameters.trained_bytes if adapter else parameters.weight_bytes
    state = 0 if cfg.train.save_only_model else parameters.state.device + parameters.state.paged
    saves = 1
    if asked.train is not None:
        volume = asked.train.volume
        when = cadence(
            cfg.train, volume.steps_per_epoch, volume.total_steps, has_eval_data=asked.held_out is not None
        )
        saves = len(when.save)
    kept = min(saves, cfg.train.save_total_limit or saves)
    merged = 2 * parameters.total if adapter and cfg.adapter.merge_lora else 0
    return Disk(weights + state, kept, weights + merged, disk_free(Path(cfg.output.output_dir)))
