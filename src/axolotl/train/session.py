"""A training session: from where it continues, the run itself, what it leaves behind."""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState, set_seed
from transformers.utils.logging import disable_progress_bar

from axolotl.config import Config
from axolotl.config.axes import axes_of
from axolotl.config.secrets import without_secrets
from axolotl.console import note, success, warn
from axolotl.data.stream import streamed_entries, streams
from axolotl.distributed.failure import launch_name, launch_options
from axolotl.distributed.group import from_main
from axolotl.distributed.world import keep_freed_memory, world
from axolotl.distributed.zero import read_zero
from axolotl.errors import CheckpointError, EnvironmentProblem, Problem
from axolotl.model.files import could_be_hub_id, local_folder
from axolotl.model.load import ready_to_serve
from axolotl.train.build import build_trainer, config_digest, has_to_evaluate
from axolotl.train.callbacks import Signals
from axolotl.train.checkpoint import (
    RUN,
    checkpoint_step,
    clear_staging,
    flush_all,
    read_json,
    read_state,
    resume_folder,
    write_json,
)
from axolotl.train.earlier import set_aside
from axolotl.train.killed import leaves, now_running, tell_killed
from axolotl.train.progress import ProgressLine, RunLog, duration
from axolotl.train.record import changed_config
from axolotl.train.saving import is_disk_trouble, persistently
from axolotl.train.tracking import Guarded
from axolotl.train.trainer import Interrupted, Parts
from axolotl.train.watch import HangWatch, TimeLimit
from axolotl.weights.publish import publish_or_tell

__all__ = ["ResumePoint", "TrainResult", "build_trainer", "resume_point", "seed_everything", "train"]


@dataclass(frozen=True)
class ResumePoint:
    """From where a run goes on."""

    folder: Path | None
    """The checkpoint, or None for the beginning."""
    complete: bool = False
    """The run was finished before by the same command: there is nothing to do."""


@dataclass(frozen=True)
class TrainResult:
    """What became of a session."""

    steps: int
    """Steps done since the run began, earlier sessions included."""
    complete: bool
    """The run reached its end and the final weights are written."""
    loss: float | None
    """Mean training loss of this session; None where it did no step."""
    metrics: dict[str, float]
    exit_code: int = 0
    """0, or 128 and the number of the signal that ended the session."""
    checkpoint: Path | None = None
    """The checkpoint saved because of that signal."""
    stuck: tuple[str, ...] = ()
    """Trackers that still hang in something; left to themselves they may keep the process from ending."""


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch. To be called before the model and its adapter are made."""
    set_seed(seed)


def resume_point(cfg: Config) -> ResumePoint:
    """Where the config says to continue; quick, before anything heavy is loaded.

    Raises CheckpointError for a checkpoint that is missing or damaged.
    """
    output_dir = Path(cfg.output.output_dir)
    resume, auto = cfg.train.resume_from_checkpoint, cfg.train.auto_resume_from_checkpoints
    tell_killed(output_dir, resumes=bool(resume or auto) or restarted(output_dir))
    if restarted(output_dir):
        note(f"Started again by the launcher after a failure: going on with the run in {output_dir}.")
        resume, auto = None, True
    if resume or auto:
        run = read_json(output_dir / RUN)
        anywhere = not resume or resume.lower() in ("true", "auto")
        if anywhere and run.get("complete") and run.get("config") == config_digest(cfg):
            return ResumePoint(None, complete=True)
    folder = resume_folder(resume, auto, output_dir)
    if folder is not None:
        why = zero_mismatch(cfg, folder)
        if why:
            raise CheckpointError(Problem(*why, "checkpoint", ("resume_from_checkpoint", "deepspeed")))
        for change in changed_config(cfg, folder, checkpoint_step(folder)):
            warn(f"Since {folder.name} was saved, {change}.")
    return ResumePoint(folder)


def zero_mismatch(cfg: Config, folder: Path) -> tuple[str, str] | None:
    """Why training cannot go on from a checkpoint because of how DeepSpeed is used, and what to do; None where it can."""
    zero, saved = read_zero(cfg), read_state(folder)
    states = [file.name for file in folder.glob("global_step*/*.pt")]
    by_zero = any("optim_states" in name for name in states)
    anew = "train anew from its weights, as `base_model` or `lora_model_dir`"
    if zero is None and by_zero:
        return (
            f"`{folder}` holds DeepSpeed's states, and the config has no `deepspeed`.",
            f"Add it, or {anew}.",
        )
    if zero is None or saved is None:
        return None
    if not by_zero:
        return f"`{folder}` holds no DeepSpeed states.", f"Delete `deepspeed` to go on without it, or {anew}."
    divided = any(name.startswith("zero_pp_rank_") and "model_states" in name for name in states)
    if divided != (zero.stage == 3):
        stage = "3" if divided else "1 or 2"
        return (
            f"`{folder}` was saved by ZeRO stage {stage}, and the config says {zero.stage}.",
            f"Keep the stage, or {anew}.",
        )
    ranks = len([name for name in states if "optim_states" in name])
    if ranks != world().size:
        return (
            f"`{folder}` holds the parts of {ranks} processes, and there are {world().size} now; DeepSpeed's parts "
            "belong to a number of processes.",
            f"Start {ranks} processes, or {anew}.",
        )
    return None


def restarted(output_dir: Path) -> bool:
    """Whether a launcher has started this run again after a failure, and output_dir is this run's already."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
    return again and read_json(output_dir / RUN).get("launch") == launch_name()


def data_ranks(cfg: Config) -> int:
    """Processes, or groups of those that share rows or products, among which the rows of a step are divided."""
    axes = axes_of(cfg.distributed, world().size)
    return axes.data_ranks if axes else world().size


def accumulation_to_go_on(cfg: Config, folder: Path) -> int:
    """Micro batches per step with which the run sees the rows of each step as before, on another number of ranks.

    The configured number where nothing is known about the checkpoint or the user has changed the batch otherwise.
    Raises CheckpointError where no whole number does it.
    """
    saved, ranks, asked = read_state(folder), data_ranks(cfg), cfg.train.gradient_accumulation_steps
    if saved is None or not saved.accumulation or saved.ranks == ranks:
        return asked
    per_step = saved.accumulation * saved.ranks
    if asked * ranks == per_step:
        return asked
    if per_step % ranks:
        raise CheckpointError(
            Problem(
                f"`{folder}` was saved by {saved.ranks} processes with {saved.accumulation} micro batches each; "
                f"{ranks} processes cannot share these {per_step} evenly.",
                f"Use a number of processes that divides {per_step}, or start anew.",
                "checkpoint",
                ("resume_from_checkpoint",),
            )
        )
    steps = per_step // ranks
    note(
        f"{saved.ranks} processes before, {ranks} now: gradient_accumulation_steps {saved.accumulation} → {steps}, so "
        "that each step sees the same rows as it would have."
    )
    return steps


def train(trainer: Trainer, cfg: Config, resume: Path | None = None) -> TrainResult:
    """Runs the trainer to its end or to a signal; at the end writes the final weights into output_dir.

    Raises CheckpointError or EnvironmentProblem where the folder cannot be written, TrainingDiverged where the loss
    is no number any more.
    """
    try:
        result = _train(trainer, cfg, resume)
    finally:
        if world().is_main:
            leaves(trainer.parts.output_dir)  # type: ignore[attr-defined]
    trackers = [each for each in trainer.callback_handler.callbacks if isinstance(each, Guarded)]
    return replace(result, stuck=tuple(each.name for each in trackers if each.stuck))


def _train(trainer: Trainer, cfg: Config, resume: Path | None) -> TrainResult:
    parts: Parts = trainer.parts  # type: ignore[attr-defined]
    output_dir, main = parts.output_dir, world().is_main
    if main:
        _prepare_folder(output_dir)
    total = parts.volume.total_steps
    if resume is not None and checkpoint_step(resume) >= total:
        if read_json(output_dir / RUN).get("complete"):
            note(f"{resume} has all {total} steps already: nothing to do.")
            return TrainResult(checkpoint_step(resume), True, None, {})
        return _finish_resumed(trainer, cfg, resume)
    if main:
        write_json(output_dir / RUN, parts.run | now_running())
        if resume is not None:
            note(f"Continuing from {resume}.")
    # Not the time of day, which may be set while the run goes on.
    started = time.monotonic()
    signals, limit = _callback(trainer, Signals), _callback(trainer, TimeLimit)
    interrupted = False
    # What the imports have left in memory stays; looking through it again costs the loop half a second.
    gc.freeze()
    disable_progress_bar()
    if trainer.args.device.type == "cpu":
        keep_freed_memory()
    if world().size > 1:
        # The same dropout on every rank would drop the same places of different rows.
        # Those that share each product have the same activations, and drop the same of them.
        set_seed(trainer.args.seed + world().rank // parts.axes.tensor)
    try:
        with signals.listening():
            try:
                output = trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
            except Interrupted:
                interrupted = True
                trainer._save_checkpoint(trainer.model_wrapped, None)
            except torch.OutOfMemoryError as error:
                raise EnvironmentProblem(
                    f"The GPU's memory ran out after step {trainer.state.global_step}: {str(error).splitlines()[0]}",
                    "Lower `eval_batch_size`, `micro_batch_size` or `sequence_len`, or choose an 8-bit `optimizer`.",
                    code="AX1403",
                ) from error
            trainer.settle()  # type: ignore[attr-defined]
    except RuntimeError as error:
        trainer.settle()  # type: ignore[attr-defined]
        if cfg.train.deterministic and "deterministic" in str(error):
            raise EnvironmentProblem(
                f"`deterministic: true`: {str(error).splitlines()[0]}",
                "Set another `attn_implementation`, or delete `deterministic`.",
            ) from error
        raise
    except Exception:
        # A checkpoint that is being written is worth having whatever the run died of.
        trainer.settle()  # type: ignore[attr-defined]
        raise
    finally:
        _callback(trainer, HangWatch).close()
        gc.unfreeze()
        if parts.uploads is not None:
            parts.uploads.close()
        parts.batches.close()
        # What a run dies of leaves the last step's line waiting; numbers that a broken GPU has are lost.
        with contextlib.suppress(Exception):
            trainer.tell_line()  # type: ignore[attr-defined]
        _callback(trainer, ProgressLine).close()
        _callback(trainer, RunLog).close()
    if signals.received is not None and (interrupted or trainer.state.global_step < total):
        return _stopped(trainer, cfg, signals.received.name, 128 + signals.received.value)
    if limit.reached and (interrupted or trainer.state.global_step < total):
        return _stopped(trainer, cfg, f"`max_time: {duration(limit.limit)}`", 0)
    metrics = {k: v for k, v in output.metrics.items() if isinstance(v, int | float)}
    return _finish(trainer, cfg, float(output.training_loss), metrics, started)


def _finish_resumed(trainer: Trainer, cfg: Config, resume: Path) -> TrainResult:
    """The end of a run that was broken off between its last step and its end."""
    started = time.monotonic()
    if trainer.is_deepspeed_enabled:
        # Its states come with an engine, which training would have made.
        data = trainer.get_train_dataloader()
        trainer._prepare_for_training(trainer.args.max_steps, data, str(resume))  # type: ignore[attr-defined]
    else:
        trainer._load_from_checkpoint(str(resume))
    trainer.state = TrainerState.load_from_json(str(resume / "trainer_state.json"))
    log = _callback(trainer, RunLog)
    log.on_train_begin(trainer.args, trainer.state, trainer.control)
    if has_to_evaluate(resume, trainer.parts.cadence):  # type: ignore[attr-defined]
        trainer.evaluate()
    log.close()
    return _finish(trainer, cfg, None, {}, started)


def _prepare_folder(output_dir: Path) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        clear_staging(output_dir)
        probe = output_dir / ".tmp-write"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise EnvironmentProblem(
            f"`output_dir: {output_dir}` cannot be written: {error.strerror}.", "Choose another folder."
        ) from error


def _callback(trainer: Trainer, kind: type[Any]) -> Any:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, kind))


def _stopped(trainer: Trainer, cfg: Config, why: str, exit_code: int) -> TrainResult:
    """Says how to go on after a signal or the end of the time."""
    folder = trainer.checkpoint_folder()  # type: ignore[attr-defined]
    step, total = trainer.state.global_step, trainer.parts.volume.total_steps  # type: ignore[attr-defined]
    if not from_main(folder.is_dir):
        # A save that the disk refused is tried once more: there is no later one.
        trainer._save_checkpoint(trainer.model_wrapped, None)
        trainer.settle()  # type: ignore[attr-defined]
    saved = folder if from_main(folder.is_dir) else None
    if saved:
        words = cfg.words("resume_from_checkpoint", "auto_resume_from_checkpoints")
        command = shlex.join(
            ["axolotl", "train", *words, "--resume-from-checkpoint", str(saved), *launch_options()]
        )
        note(f"Stopped by {why} at step {step} of {total}; saved {saved}.\nTo continue:\n  {command}")
    else:
        note(f"Stopped by {why} at step {step} of {total}; no checkpoint could be saved.")
    return TrainResult(step, False, None, {}, exit_code, saved)


def _finish(
    trainer: Trainer, cfg: Config, loss: float | None, metrics: dict[str, float], started: float
) -> TrainResult:
    output_dir = trainer.parts.output_dir  # type: ignore[attr-defined]
    save_final(trainer, cfg)
    if world().is_main:
        run = read_json(output_dir / RUN) | trainer.parts.run  # type: ignore[attr-defined]
        run |= {"complete": True, "ended": time.time()}

        def record() -> None:
            # Complete is said last: the same command would not write the figures again.
            _callback(trainer, RunLog).write_waiting()
            write_json(output_dir / RUN, run)

        _written(record, "The record of the run", output_dir, 4)
        _summary(trainer, cfg, loss, time.monotonic() - started)
        if cfg.output.hub_model_id:
            words = cfg.words("resume_from_checkpoint", "auto_resume_from_checkpoints")
            publish_or_tell(output_dir, cfg.output, shlex.join(["axolotl", "publish", *words]))
    return TrainResult(trainer.state.global_step, True, loss, metrics)


def save_final(trainer: Trainer, cfg: Config) -> None:
    """Writes weights or adapter, tokenizer, generation config, resolved config and model card into output_dir.

    They are written aside first, so that output_dir never holds half a model. A disk that refuses is asked again for
    half a minute. Raises CheckpointError.
    """
    output_dir: Path = trainer.parts.output_dir  # type: ignore[attr-defined]
    ready_to_serve(trainer.accelerator.unwrap_model(trainer.model))
    tries = 1 if world().size > 1 else 4
    _written(lambda: _write_final(trainer, cfg, output_dir), "The final weights", output_dir, tries)


def _written(action: Callable[[], None], what: str, output_dir: Path, tries: int) -> None:
    """Does something that writes, patiently. Raises CheckpointError where the disk goes on refusing."""
    try:
        persistently(action, what, tries)
    except Exception as error:
        if not is_disk_trouble(error):
            raise
        raise CheckpointError(
            f"{what} could not be written into {output_dir}: {getattr(error, 'strerror', None) or error}.",
            "Free some space, then run the same command with `--auto-resume-from-checkpoints`.",
        ) from error


def _write_final(trainer: Trainer, cfg: Config, output_dir: Path) -> None:
    aside = output_dir / ".tmp-final"
    inner = trainer.accelerator.unwrap_model(trainer.model)
    if world().is_main:
        shutil.rmtree(aside, ignore_errors=True)
        output_dir.mkdir(parents=True, exist_ok=True)
    trainer.accelerator.wait_for_everyone()
    trainer.writes_final = True  # type: ignore[attr-defined]
    trainer.save_model(str(aside), _internal_call=True)
    if not world().is_main:
        return
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if getattr(base, "generation_config", None) is not None and base.can_generate():
        base.generation_config.save_pretrained(aside)
    (aside / "training_args.bin").unlink(missing_ok=True)
    (aside / "axolotl_config.yml").write_text(cfg.resolved_yaml(), encoding="utf-8")
    (aside / "README.md").write_text(model_card(trainer, cfg), encoding="utf-8")
    flush_all(aside)
    set_aside(output_dir)
    # A shard of earlier weights that the new ones do not replace would be loaded with them.
    for stale in (*output_dir.glob("model*.safetensors*"), *output_dir.glob("adapter_*")):
        if not (aside / stale.name).exists():
            stale.unlink()
    for file in sorted(aside.iterdir()):
        target = output_dir / file.name
        if file.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        os.replace(file, target)
    aside.rmdir()


def model_card(trainer: Trainer, cfg: Config) -> str:
    """A short README: what was trained, on what, and how it can be made again."""
    base, volume = str(cfg.model.base_model), trainer.parts.volume  # type: ignore[attr-defined]
    # The Hub refuses a card whose base is no repository, and a folder's name says nothing elsewhere.
    public = local_folder(base) is None and could_be_hub_id(base)
    of = f"base_model: {base}\n" if public else ""
    base = base if public else Path(base).name
    kind = cfg.adapter.adapter
    data = (
        ", ".join(f"`{without_secrets(str(entry.path))}`" for _, entry, _ in streamed_entries(cfg.data))
        or "none named"
    )
    extent = f"in {volume.epochs:.4g} epochs of {volume.tokens_per_epoch:,} tokens"
    if streams(cfg.data):
        extent = f"of {trainer.state.num_input_tokens_seen:,} streamed tokens"
    library = "peft" if kind else "transformers"
    what = (
        f"A {kind.upper() if kind == 'lora' else 'QLoRA' if kind == 'qlora' else kind} adapter for"
        if kind
        else "A fine-tuned"
    )
    return (
        f"---\nlibrary_name: {library}\n{of}tags:\n- axolotl\n- generated_from_trainer\n---\n\n"
        f"# {Path(cfg.output.output_dir).name}\n\n"
        f"{what} `{base}`, trained with axolotl.\n\n"
        f"- data: {data}\n- steps: {trainer.state.global_step}, {extent}\n"
        f"- evaluation loss: {_last(trainer, 'eval_loss')}\n\n"
        "`axolotl_config.yml` is the config that repeats the run.\n"
    )


def _last(trainer: Trainer, key: str) -> str:
    values = [line[key] for line in trainer.state.log_history if key in line]
    return f"{values[-1]:.4f}" if values else "not measured"


def _summary(trainer: Trainer, cfg: Config, loss: float | None, seconds: float) -> None:
    parts: Parts = trainer.parts  # type: ignore[attr-defined]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    course = f"loss {losses[0]:.4f} → {losses[-1]:.4f}" if losses else "no loss logged"
    if parts.eval_batches is not None:
        course += f", evaluation loss {_last(trainer, 'eval_loss')}"
    tokens = trainer.state.num_input_tokens_seen
    success(f"{trainer.state.global_step:,} steps, {tokens:,} tokens in {duration(seconds)}: {course}.")
    adapter, folder_key = cfg.adapter.adapter is not None, "lora_model_dir"
    if not adapter:
        folder_key = "base_model"
    config = shlex.join(cfg.words(folder_key, of=("model", "adapter", "data")))
    folder = f" --{folder_key.replace('_', '-')} {shlex.quote(str(parts.output_dir))}"
    lines = [f"Saved in {parts.output_dir}. Next:", f"  axolotl inference {config}{folder} --chat"]
    if adapter:
        lines.append(f"  axolotl merge-lora {config}{folder}")
    note("\n".join(lines))
