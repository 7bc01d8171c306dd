"""Saving checkpoints so that nothing that happens to the disk costs more than the steps since the last good one.

Before the first step the whole way is walked once (`rehearse`); before every save the free space is looked at; a save
that fails is told, cleared away and tried again after 5, 10, 20, ... seconds, while training goes on. With `save_async`
the training loop only waits for a copy in memory (see `snapshot`), and a thread does the same writing.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers.trainer import Trainer
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_callback import TrainerControl as Control
from transformers.trainer_callback import TrainerState as State
from transformers.training_args import TrainingArguments as Args

from axolotl.console import note, warn
from axolotl.distributed.deepspeed import consolidated, shape_of
from axolotl.errors import CheckpointError, Problem
from axolotl.train.background import Background
from axolotl.train.checkpoint import RUN, RunState, publish, rotate, staging, write_json, write_state
from axolotl.train.snapshot import Copies, Facts, Snapshot, facts, take

if TYPE_CHECKING:
    from axolotl.train.trainer import TrainerMixin

    _Base = Trainer
else:
    _Base = object

FIRST_WAIT, LONGEST_WAIT = 5.0, 600.0  # seconds until a save that failed is tried again
REHEARSED_BYTES = 4 << 30  # a trained state up to this size is written in full before the first step
SLACK = 1 << 20
_OF_NATIVE_WRITERS = (
    "PytorchStreamWriter",
    "inline_container",
    "No space left",
    "unexpected pos",
    "I/O error",
    "os error ",
)


class Saving(_Base):
    """The part of our trainers that saves checkpoints."""

    parts: Any
    clock: Any
    tell: Callable[[str], None]
    """Warns, and writes the warning into run.jsonl."""
    _aside: Path | None = None
    checkpoint_bytes = 0
    """Size of the last checkpoint of this session; before the first, what it will be at least."""
    save_seconds = 0.0
    """What the last save took."""
    save_failures = 0
    """Saves on end that failed."""
    retry_at = 0.0
    """When a failed save is tried again (time.monotonic)."""
    published: list[Callable[[State], None]]
    """Called with the state of each checkpoint that a thread has written."""
    _background: Background | None = None
    _copies: Copies | None = None

    def run_state(self) -> RunState:
        """Our own part of a checkpoint at the present step."""
        raise NotImplementedError

    def checkpoint_folder(self) -> Path:
        """Where the checkpoint of the present step stands."""
        return Path(self.parts.output_dir) / f"checkpoint-{self.state.global_step}"

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._aside) if self._aside is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Saves aside and publishes when whole. A save that fails for want of room is told, and training goes on."""
        if self.saves_in_background:
            with self.clock.stopped("save"):
                self._save_in_background()
            return
        started = time.perf_counter()
        with self.clock.stopped("save"):
            aside = staging(self.parts.output_dir, self.state.global_step)
            problem: Exception | None = None
            try:
                self._room(aside)
            except OSError as error:
                problem = error
            # All ranks save, or none: saving may be a work of all.
            if not any(self._over_ranks(int(problem is not None))):
                problem = self._save_aside(aside, args, kwargs)
            self._ended(aside, self.state.global_step, problem)
        self.save_seconds = time.perf_counter() - started

    def _ended(self, aside: Path, step: int, problem: Exception | None) -> None:
        if problem is not None:
            shutil.rmtree(aside, ignore_errors=True)
            self._failed(problem, step)
        elif self.save_failures:
            note(f"The checkpoint of step {step} is saved.")
            self.save_failures = 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the weights. Of weights that ZeRO stage 3 divides, checkpoints hold a whole copy where
        `stage3_gather_16bit_weights_on_model_save` says so; the final ones are always whole.
        """
        stage = self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else 0
        if stage < 3:
            super().save_model(output_dir, _internal_call)
            return
        whole = consolidated(self.model_wrapped, of_checkpoint=self._aside is not None)
        if whole is not None:
            self._save(output_dir, state_dict=whole)

    # In the background

    @property
    def saves_in_background(self) -> bool:
        """Whether a thread writes the checkpoints. Sharded states and some quantised ones only save themselves."""
        model: Any = self.model
        alone = hasattr(model, "peft_config") or getattr(model, "hf_quantizer", None) is None
        sharded = self.is_deepspeed_enabled or self.parts.sharding is not None
        return bool(self.parts.train.save_async) and alone and not sharded

    def _save_in_background(self) -> None:
        if self._background is None or self._copies is None:
            self._background, self._copies = Background("checkpoint"), Copies(self.args.device)
        # There is memory for one copy: a save that takes longer than the steps up to the next one is waited for.
        self._background.wait()
        self.store_flos()
        shot = take(self, self._copies)  # type: ignore[arg-type]
        if self.args.should_save:
            self._background.start(lambda: self._write(shot))
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self._background.wait()

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._background is not None and self._background.busy

    def settle(self) -> None:
        """Waits for a checkpoint that is being written. Raises what writing it raised, apart from a disk's refusal."""
        if self._background is not None:
            with self.clock.stopped("save"):
                self._background.wait()

    def weights_may_change(self) -> None:
        """Before anything changes weights or states: copies that a GPU still makes of them come first."""
        if self._copies is not None:
            self._copies.hold()

    def _write(self, shot: Snapshot) -> None:
        """Writes a checkpoint out of memory, with all that holds for one written by the training loop."""
        started, problem = time.perf_counter(), None
        aside = staging(self.parts.output_dir, shot.facts.step)
        try:
            shot.complete()
            self._room(aside)
            written = aside / f"checkpoint-{shot.facts.step}"
            self._save(str(written), state_dict=shot.weights)
            for name, value in shot.files.items():
                torch.save(value, written / name)
            self._publish(aside, shot.facts)
        except Exception as error:
            if not is_disk_trouble(error):
                raise
            problem = error
        self._ended(aside, shot.facts.step, problem)
        if problem is None:
            for each in self.published:
                each(shot.facts.state)
        self.save_seconds = time.perf_counter() - started

    def _save_aside(self, aside: Path, args: Any, kwargs: Any) -> Exception | None:
        def write() -> None:
            self._aside = aside
            try:
                super(Saving, self)._save_checkpoint(*args, **kwargs)
            finally:
                self._aside = None

        # Every rank writes its part, at least its random state: the folder is whole when all have.
        problem = self._agreed(self._disk_trouble(write))
        if problem is None:
            whole: Any = self
            known = self.written_by_all(aside / f"checkpoint-{self.state.global_step}")
            problem = self._agreed(
                self._disk_trouble(lambda: self._publish(aside, facts(whole), known))
                if self.args.should_save
                else None
            )
        return problem

    def _disk_trouble(self, action: Callable[[], None]) -> Exception | None:
        """Does something and returns the disk's error, if any.

        Raises CheckpointError for it where all ranks write together: the others would wait for this one.
        """
        try:
            action()
        except Exception as error:
            if not is_disk_trouble(error):
                raise
            if self.args.world_size > 1 and self.is_deepspeed_enabled:
                raise CheckpointError(
                    f"The checkpoint of step {self.state.global_step} could not be saved: {error}.",
                    "Free some space, then run the same command with `--auto-resume-from-checkpoints`.",
                ) from error
            return error
        return None

    def _agreed(self, problem: Exception | None) -> Exception | None:
        """This rank's problem, or word of another's."""
        if any(self._over_ranks(int(problem is not None))):
            return problem or OSError(errno.EIO, "another process could not write its part")
        return None

    def _over_ranks(self, *numbers: int) -> list[int]:
        raise NotImplementedError

    def _room(self, aside: Path) -> None:
        """Makes the folder above `aside` if it has gone. Raises OSError where the disk has no room for a checkpoint."""
        if not self.args.should_save:
            return
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(aside.parent).free
        needed = self.checkpoint_bytes + SLACK
        if free < needed:
            raise OSError(errno.ENOSPC, f"{free / 2**20:.1f} MiB are free, it needs {needed / 2**20:.1f}")

    def _failed(self, error: Exception, step: int) -> None:
        self.save_failures += 1
        wait = min(FIRST_WAIT * 2 ** (self.save_failures - 1), LONGEST_WAIT)
        self.retry_at = time.monotonic() + wait
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        self.tell(
            f"The checkpoint of step {step} could not be saved: {reason}. Training goes on; the next try is in "
            f"{wait:.0f} seconds."
        )

    def written_by_all(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and hash of the files that each process has written alone."""
        raise NotImplementedError

    def _publish(self, aside: Path, facts: Facts, known: dict[str, dict[str, Any]] | None = None) -> None:
        parts, state = self.parts, facts.state
        final = Path(parts.output_dir) / f"checkpoint-{facts.step}"
        written = aside / final.name
        best = state.best_global_step
        if best and (best == facts.step or (parts.output_dir / f"checkpoint-{best}").exists()):
            state.best_model_checkpoint = str(parts.output_dir / f"checkpoint-{best}")
        state.save_to_json(str(written / "trainer_state.json"))
        write_state(written, facts.run)
        for name, text in facts.place.items():
            (written / name).write_text(text, encoding="utf-8")
        write_json(written / "axolotl_config.json", parts.asked)
        publish(written, final, **({"known": known} if known else {}))
        shutil.rmtree(aside, ignore_errors=True)
        self.state.best_model_checkpoint = state.best_model_checkpoint
        self.checkpoint_bytes = size_of(final)
        if parts.run and not (parts.output_dir / RUN).exists():
            write_json(parts.output_dir / RUN, parts.run)
        if parts.uploads is not None:
            parts.uploads.saved(final)
        rotate(parts.output_dir, parts.train.save_total_limit, state.best_model_checkpoint, final)

    def rehearse(self) -> None:
        """Writes once all that a checkpoint holds, and removes it. Raises CheckpointError where that does not work.

        A trained state of more than 4 GiB is not written, only looked for room for.
        """
        aside, began = Path(self.parts.output_dir) / ".tmp-rehearsal", time.perf_counter()
        model: Any = self.model
        trained = sum(shape_of(p).numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        problem: Exception | None = None
        try:
            problem = self._agreed(self._disk_trouble(lambda: self._open_for_all(aside)))
            if problem is None and trained <= REHEARSED_BYTES:
                problem = self._agreed(self._disk_trouble(lambda: self._write_all(aside)))
            if problem is None and self.args.should_save:
                # The optimizer has no state yet; most keep two numbers for each trained one.
                states = (
                    2 * trained if self.parts.cadence.save and not self.parts.train.save_only_model else 0
                )
                self.checkpoint_bytes = max(size_of(aside), trained) + states
                self._room(aside)
        except Exception as error:
            if not is_disk_trouble(error):
                raise
            problem = error
        finally:
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
        problem = self._agreed(problem)
        self.save_seconds = time.perf_counter() - began
        if problem is not None:
            reason = getattr(problem, "strerror", None) or str(problem).splitlines()[0]
            raise CheckpointError(
                Problem(
                    f"A checkpoint cannot be saved in `output_dir: {self.parts.output_dir}`: {reason}.",
                    "Free some space or choose another folder; nothing has been trained yet.",
                    "environment",
                    ("output_dir",),
                )
            )

    def _open_for_all(self, aside: Path) -> None:
        """Makes the folder, and sees that every rank finds it: on several machines it has to be one that they share."""
        self._room(aside)
        if self.args.should_save:
            aside.mkdir()
        self.accelerator.wait_for_everyone()
        # A network file system may show a new folder seconds later.
        for _ in range(50):
            if aside.is_dir():
                return
            time.sleep(0.2)
        raise OSError(
            errno.ENOENT, "this machine does not see what the first one writes; a shared folder is needed"
        )

    def _write_all(self, aside: Path) -> None:
        self.save_model(str(aside), _internal_call=True)
        if self.parts.cadence.save and not self.parts.train.save_only_model:
            self._save_optimizer_and_scheduler(str(aside))
            self._save_scaler(str(aside))
            self._save_rng_state(str(aside))


class SaveCare(TrainerCallback):
    """Rehearses saving before the first step, and asks again for a save that failed."""

    def __init__(self, trainer: TrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.trainer.rehearse()
        if self.trainer.parts.train.save_async and self.trainer.parts.cadence.save:
            self._say_how()

    def _say_how(self) -> None:
        if self.trainer.saves_in_background:
            copied = self.trainer.checkpoint_bytes / 2**20
            note(
                f"Checkpoints are written in the background, out of a copy in memory of about {copied:,.0f} MiB."
            )
        else:
            self.trainer.tell(
                "`save_async`: this model or its sharding saves itself, so training waits for each save."
            )

    def on_pre_optimizer_step(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.trainer.weights_may_change()

    def on_epoch_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if control.should_training_stop or state.global_step >= state.max_steps:
            # What comes next may read the best checkpoint.
            self.trainer.settle()

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        trainer = self.trainer
        if args.world_size > 1 or not trainer.save_failures or trainer.saving:
            return
        if time.monotonic() >= trainer.retry_at:
            control.should_save = True


def is_disk_trouble(error: Exception) -> bool:
    """Whether an error is one of the disk, in the words of whatever was writing."""
    if isinstance(error, OSError | SafetensorError):
        return True
    if isinstance(error, RuntimeError) and _raised_in(error) == torch.serialization.__name__:
        # torch's writer is C++: what it says of a file that ends early depends on where it was cut.
        return True
    return any(sign in str(error) for sign in _OF_NATIVE_WRITERS)


def _raised_in(error: Exception) -> str:
    """The module of the innermost Python frame that an error came through."""
    trace, module = error.__traceback__, ""
    while trace is not None:
        module, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
    return module


def persistently(action: Callable[[], None], what: str, tries: int = 4) -> None:
    """Does something that writes, again after 5, 10 and 20 seconds where the disk refuses. Raises the last error."""
    for number in range(1, tries + 1):
        try:
            action()
            return
        except Exception as error:
            if not is_disk_trouble(error) or number == tries:
                raise
            wait = FIRST_WAIT * 2 ** (number - 1)
            warn(f"{what} could not be written: {error}. The next try is in {wait:.0f} seconds.")
            time.sleep(wait)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
