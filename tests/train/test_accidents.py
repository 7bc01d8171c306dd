"""Accidents and limits inside one process: memory, time, disks, trackers, hangs, and configs that have changed."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import threading
import time
from collections import namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from axolotl.config.keys import owners
from axolotl.config.train import TrainSection
from axolotl.data.collate import PackedCollator, PaddedCollator
from axolotl.distributed.world import only_repeatable_kernels
from axolotl.errors import CheckpointError, EnvironmentProblem
from axolotl.train.checkpoint import publish
from axolotl.train.record import SHAPING, changes
from axolotl.train.saving import is_disk_trouble
from axolotl.train.session import resume_point, train
from axolotl.train.steps import cut
from axolotl.train.tracking import Guarded
from axolotl.train.watch import HangWatch
from train.miniature import losses, rows, same_weights, tiny_model, weights


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("2h", 7200), ("45m", 2700), ("1h30m", 5400), ("1d", 86400), ("90", 90), (15, 15), ("1.5 h", 5400)],
)
def test_times_are_read(written, seconds):
    assert TrainSection.model_validate({"max_time": written}).max_time == seconds


@pytest.mark.parametrize("written", ["soon", "2 weeks", "-3", -3, 0, True, "1h later"])
def test_what_is_no_time_is_refused(written):
    with pytest.raises(ValueError):
        TrainSection.model_validate({"max_time": written})


def test_the_watch_for_hangs_can_be_put_off():
    assert TrainSection.model_validate({"hang_timeout": False}).hang_timeout == 0
    assert TrainSection.model_validate({"hang_timeout": "10m"}).hang_timeout == 600
    assert TrainSection().hang_timeout == 1800


PACKED = {"sample_packing": True, "sequence_len": 128}


def out_of_memory(run, step, largest):
    """From a step on, batches of more tokens than `largest` do not fit; half of the gradients are there by then."""
    original, seen = run.compute_loss, []

    def compute_loss(model, inputs, *args, **kwargs):
        tokens = inputs["input_ids"].numel()
        loss = original(model, inputs, *args, **kwargs)
        if torch.is_grad_enabled() and run.state.global_step >= step and tokens > largest:
            loss.backward(retain_graph=True)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        seen.append((run.state.global_step, tokens))
        return loss

    run.compute_loss = compute_loss
    return seen


@pytest.mark.parametrize(
    "keys", [{"micro_batch_size": 4, "num_epochs": 2}, PACKED, {"attn_implementation": "sdpa", **PACKED}]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_memory_that_runs_out_changes_the_batches_and_not_the_run(trainer, capsys, keys, accumulation):
    keys = {"gradient_accumulation_steps": accumulation, "num_epochs": 5, **keys}
    whole, split = (trainer(tiny_model(), rows(24, longest=30), **keys) for _ in range(2))
    train(whole, whole.cfg)
    seen = out_of_memory(split, 2, 70)
    assert train(split, split.cfg).complete
    assert split.split >= 2 and max(tokens for step, tokens in seen if step >= 2) <= 70
    assert "memory ran out in step 3" in capsys.readouterr().err
    assert losses(split) == pytest.approx(losses(whole), abs=2e-5)
    assert losses(split)[:2] == losses(whole)[:2]
    assert split.trained_tokens == whole.trained_tokens


def test_a_row_that_does_not_fit_ends_the_run(trainer):
    run = trainer(tiny_model(), rows(8), micro_batch_size=4)
    out_of_memory(run, 1, 0)
    with pytest.raises(EnvironmentProblem, match="a single row does not fit"):
        train(run, run.cfg)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(2, 8), st.booleans())
def test_cutting_loses_no_row(lengths, parts, packed):
    import numpy as np

    bins = [[(np.full(n, i), np.full(n, i))] for i, n in enumerate(lengths, 1)]
    if packed:
        bins = [[row for each in bins for row in each]]
    collator = PackedCollator(0, True, 512) if packed else PaddedCollator(0, 64)
    made = cut(collator, bins, parts)
    assert len(made) <= parts
    found = torch.cat([batch["input_ids"].flatten() for batch in made])
    assert [int((found == i).sum()) for i in range(1, len(lengths) + 1)] == lengths
    assert all("token_counts" not in batch for batch in made)


def test_the_split_is_remembered_by_checkpoints(trainer):
    keys = {"micro_batch_size": 4, "num_epochs": 2, "save_steps": 3, "save_strategy": "steps"}
    run = trainer(tiny_model(), rows(20), **keys)
    out_of_memory(run, 1, 120)
    train(run, run.cfg)
    folder = run.parts.output_dir / "checkpoint-3"
    again = trainer(tiny_model(seed=7), rows(20), None, folder, **keys)
    assert again.split == run.split > 1
    train(again, again.cfg, folder)
    assert same_weights(weights(again.model), weights(run.model))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 599040 vs 598932"),
        OSError(errno.EROFS, "Read-only file system"),
        # The writer of tokenizers knows no other kind.
        Exception("File too large (os error 27)"),
    ],
)
def test_a_broken_way_of_saving_is_found_before_the_first_step(trainer, monkeypatch, error):
    run = trainer(tiny_model(), rows(8), save_steps=2, save_strategy="steps")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("torch.save", fail)
    with pytest.raises(CheckpointError, match="cannot be saved in"):
        train(run, run.cfg)
    assert losses(run) == []
    assert not list(run.parts.output_dir.glob(".tmp*"))


Usage = namedtuple("Usage", "total used free")


def test_free_space_is_looked_at_before_each_save(trainer, monkeypatch, capsys):
    run = trainer(tiny_model(), rows(8), save_steps=2, save_strategy="steps")
    answers = iter([1 << 40, 1 << 40, 2000, 1 << 40])
    monkeypatch.setattr("axolotl.train.saving.shutil.disk_usage", lambda path: Usage(0, 0, next(answers)))
    assert train(run, run.cfg).complete
    assert [p.name for p in run.parts.output_dir.glob("checkpoint-*")] == ["checkpoint-4"]
    said = capsys.readouterr().err
    assert "step 2 could not be saved: 0.0 MiB are free, it needs" in said
    assert "the next try is in 5 seconds" in said.replace("\n", " ")


def test_a_failed_save_is_tried_again_later_and_later(trainer, monkeypatch):
    monkeypatch.setattr("axolotl.train.saving.FIRST_WAIT", 1e-9)
    tried = []

    def refuse(written, final):
        tried.append(final.name)
        if len(tried) < 4:
            raise OSError(errno.EIO, "Input/output error")
        publish(written, final)

    monkeypatch.setattr("axolotl.train.saving.publish", refuse)
    run = trainer(tiny_model(), rows(20), save_steps=3, save_strategy="steps")
    train(run, run.cfg)
    assert tried == [f"checkpoint-{n}" for n in (3, 4, 5, 6, 9, 10)]
    assert run.save_failures == 0
    events = [json.loads(x) for x in (run.parts.output_dir / "run.jsonl").read_text().splitlines()]
    assert sum(e["kind"] == "event" and "could not be saved" in e["message"] for e in events) == 3


def test_run_jsonl_waits_for_a_disk_that_refuses(trainer, monkeypatch):
    from axolotl.train import progress

    whole, refused = progress.os.write, []

    def write(handle, data):
        if 2 <= len(refused) < 6:
            refused.append(0)
            raise OSError(errno.ENOSPC, "No space left on device")
        refused.append(0)
        return whole(handle, bytes(data)[: max(1, len(data) // 2)])

    run = trainer(tiny_model(), rows(12))
    monkeypatch.setattr(progress.os, "write", write)
    train(run, run.cfg)
    lines = [json.loads(x) for x in (run.parts.output_dir / "run.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_figures_that_the_disk_refused_are_written_before_the_run_is_complete(trainer, monkeypatch):
    from axolotl.train import progress

    run = trainer(tiny_model(), rows(8))
    whole, waited = progress.os.write, []

    def write(handle, data):
        if len(waited) < 2 and run.state.global_step >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(handle, data)

    monkeypatch.setattr(progress.os, "write", write)
    monkeypatch.setattr("axolotl.train.saving.time.sleep", waited.append)
    assert train(run, run.cfg).complete
    lines = [json.loads(x) for x in (run.parts.output_dir / "run.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["kind"] == "train"] == [1, 2, 3, 4]
    assert waited == [5, 10]


def test_max_time_saves_and_ends(trainer, capsys):
    keys = {"num_epochs": 3, "save_steps": 100, "save_strategy": "steps"}
    whole = trainer(tiny_model(), rows(20), **keys)
    train(whole, whole.cfg)
    run = trainer(tiny_model(), rows(20), max_time="1h", **keys)
    limit = next(c for c in run.callback_handler.callbacks if type(c).__name__ == "TimeLimit")

    class Late(type(run.callback_handler.callbacks[0])):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                limit.since -= 3600

    run.add_callback(Late())
    result = train(run, run.cfg)
    assert (result.steps, result.exit_code, result.complete) == (5, 0, False)
    assert "Stopped by `max_time: 1:00:00` at step 5" in capsys.readouterr().err
    again = trainer(tiny_model(seed=4), rows(20), None, result.checkpoint, **keys)
    train(again, again.cfg, result.checkpoint)
    assert same_weights(weights(again.model), weights(whole.model))


def test_an_evaluation_that_a_signal_left_out_is_made_up_for(trainer):
    keys = {"num_epochs": 2, "evals_per_epoch": 1, "save_steps": 100, "save_strategy": "steps"}
    data, held_out = rows(8), rows(4, seed=3)
    run = trainer(tiny_model(), data, held_out, **keys)
    signals = next(c for c in run.callback_handler.callbacks if type(c).__name__ == "Signals")

    class Sender(type(run.callback_handler.callbacks[0])):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                signals.received = signal.SIGTERM

    run.add_callback(Sender())
    result = train(run, run.cfg)
    assert result.steps == 4
    assert not any("eval_loss" in line and line["step"] == 4 for line in run.state.log_history)
    again = trainer(tiny_model(), data, held_out, result.checkpoint, **keys)
    train(again, again.cfg, result.checkpoint)
    assert [line["step"] for line in again.state.log_history if "eval_loss" in line] == [0, 4, 8]


def test_a_signal_at_the_last_step_leaves_nothing_out(trainer):
    keys = {"evals_per_epoch": 1, "save_steps": 100, "save_strategy": "steps"}
    data, held_out = rows(8), rows(4, seed=3)
    whole = trainer(tiny_model(), data, held_out, **keys)
    train(whole, whole.cfg)
    figures = (whole.parts.output_dir / "run.jsonl").read_text()
    run = trainer(tiny_model(), data, held_out, **keys)
    signals = next(c for c in run.callback_handler.callbacks if type(c).__name__ == "Signals")

    class Sender(type(run.callback_handler.callbacks[0])):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                signals.received = signal.SIGTERM

    run.add_callback(Sender())
    result = train(run, run.cfg)
    assert (result.steps, result.exit_code, result.complete) == (4, 143, False)
    again = trainer(tiny_model(seed=8), data, held_out, result.checkpoint, **keys)
    assert train(again, again.cfg, result.checkpoint).complete

    def evaluated(text):
        lines = [json.loads(line) for line in text.splitlines()]
        return [(x["step"], x["eval_loss"]) for x in lines if x["kind"] == "eval"]

    assert evaluated((again.parts.output_dir / "run.jsonl").read_text()) == evaluated(figures)
    assert same_weights(weights(again.model), weights(whole.model))


def test_a_hang_is_written_down(tmp_path):
    watch = HangWatch(TrainSection.model_validate({"hang_timeout": 0.2}), tmp_path)
    state = type("State", (), {"global_step": 7})()
    watch.on_train_begin(None, state, None)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and "Thread" not in (
        watch.file.read_text() if watch.file.exists() else ""
    ):
        time.sleep(0.02)
    watch.close()
    written = watch.file.read_text()
    assert "after step 7" in written
    assert "test_a_hang_is_written_down" in written


def test_a_run_that_moves_is_no_hang(tmp_path):
    watch = HangWatch(TrainSection.model_validate({"hang_timeout": 1.0}), tmp_path)
    state = type("State", (), {"global_step": 7})()
    watch.on_train_begin(None, state, None)
    for _ in range(15):
        time.sleep(0.1)
        watch.on_step_end(None, state, None)
    watch.close()
    assert not watch.file.exists()


class Tracker:
    def __init__(self, act):
        self.act, self.seen = act, []

    def __getattr__(self, event):
        def call(args, state, control, **kwargs):
            self.seen.append((event, state.global_step))
            self.act(event)

        return call


def guard(run, act, **options):
    tracker, said = Tracker(act), []
    guarded = Guarded("fake", said.append, lambda: tracker)
    for key, value in options.items():
        setattr(guarded, key, value)
    run.add_callback(guarded)
    return tracker, said


def test_a_tracker_sees_the_run(trainer):
    run = trainer(tiny_model(), rows(8), rows(3))
    tracker, said = guard(run, lambda event: None)
    train(run, run.cfg)
    assert said == []
    assert [e for e in tracker.seen if e[0] == "on_log"][1:5] == [("on_log", n) for n in (1, 2, 3, 4)]
    assert {"on_train_begin", "on_evaluate", "on_train_end"} <= {event for event, _ in tracker.seen}


def test_a_tracker_that_raises_is_left_out(trainer):
    def down(event):
        raise ConnectionError("no route to host")

    run = trainer(tiny_model(), rows(16))
    tracker, said = guard(run, down)
    assert train(run, run.cfg).complete
    assert said == [
        "The tracker fake failed 3 times on end: ConnectionError: no route to host. Training goes on without it; "
        "run.jsonl has every figure."
    ]
    assert len(tracker.seen) == 3


def test_a_tracker_that_hangs_is_left_behind(trainer):
    forever = threading.Event()
    run = trainer(tiny_model(), rows(8))
    _, said = guard(run, lambda event: forever.wait(60), wait=0.3)
    began = time.monotonic()
    assert train(run, run.cfg).complete
    forever.set()
    assert time.monotonic() - began < 30
    assert len(said) == 1 and "has not answered" in said[0]


def test_a_tracker_that_cannot_be_started_is_told(trainer):
    said = []

    def make():
        raise ImportError("broken")

    run = trainer(tiny_model(), rows(4))
    run.add_callback(Guarded("fake", said.append, make))
    assert train(run, run.cfg).complete
    assert len(said) == 1 and "cannot be started: ImportError: broken" in said[0]


def test_changes_of_a_config_say_what_they_do():
    before = {
        "learning_rate": 1e-4,
        "lora_dropout": 0.1,
        "logging_steps": 1,
        "wandb_project": "a",
        "num_epochs": 1,
    }
    after = before | {"learning_rate": 2e-4, "lora_dropout": 0.0, "logging_steps": 5, "wandb_project": "b"}
    told, fatal = changes(before, after, 6)
    assert fatal == []
    assert told == [
        "`learning_rate` was 0.0001 and is 0.0002; training goes on with the saved 0.0001, which the optimizer holds",
        "`lora_dropout` was 0.1 and is 0.0; the new value holds from step 7 on",
    ]
    assert {
        "lora_rank_pattern",
        "lora_exclude_modules",
        "lora_alpha_pattern",
        "peft_layers_pattern",
    } <= SHAPING
    assert {"peft_layer_replication", "peft_trainable_token_indices"} <= SHAPING <= set(owners())
    for key in SHAPING:
        assert changes({}, {key: "x"}, 6)[1][0].keys == (key,)


def test_what_is_said_of_the_learning_rate_is_so(trainer):
    keys = {"num_epochs": 2, "save_steps": 3, "save_strategy": "steps", "weight_decay": 0.1}
    run = trainer(tiny_model(), rows(8), **keys)
    train(run, run.cfg)
    folder = run.parts.output_dir / "checkpoint-3"
    changed = keys | {"learning_rate": 0.5, "weight_decay": 0.9}
    again = trainer(tiny_model(), rows(8), None, folder, **changed)
    train(again, again.cfg, folder)
    assert same_weights(weights(again.model), weights(run.model))


def test_a_checkpoint_of_another_shape_is_refused_before_anything_is_loaded(trainer, config):
    keys = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    run = trainer(tiny_model(), rows(8), **keys)
    train(run, run.cfg)
    with pytest.raises(CheckpointError, match="`optimizer` was unset"):
        resume_point(config(**keys, optimizer="lion", auto_resume_from_checkpoints=True, num_epochs=5))


def test_wherever_a_writer_is_cut_off_it_counts_as_trouble_of_the_disk(tmp_path):
    """torch's and safetensors' writers are C++ and Rust; what they say depends on the byte at which the file ends."""
    state = {"exp_avg": torch.ones(3000), "step": torch.tensor(3), "names": list("abc")}

    def cut_off(write, size):
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
        try:
            write()
        except Exception as error:
            return error
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        return None

    writers = {
        "optimizer.pt": lambda file: torch.save(state, file),
        "model.safetensors": lambda file: save_file({"exp_avg": state["exp_avg"]}, file),
    }
    for name, write in writers.items():
        file = tmp_path / name
        write(file)
        whole = file.stat().st_size
        for size in {*range(0, whole, 257), *range(max(whole - 300, 0), whole, 7), whole - 1}:
            error = cut_off(lambda write=write, file=file: write(file), size)
            assert error is not None and is_disk_trouble(error), (name, size, error)


def test_a_mistake_in_what_is_saved_is_no_trouble_of_the_disk():
    with pytest.raises(Exception) as found:
        torch.save({"hook": lambda: None}, io.BytesIO())
    assert not is_disk_trouble(found.value)


@pytest.fixture
def free_kernels():
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_a_kernel_that_does_not_repeat_itself_is_told(trainer, monkeypatch, free_kernels):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        # Set first, so that it is taken back afterwards.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    only_repeatable_kernels()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    run = trainer(tiny_model(), rows(4), deterministic=True)
    plain = run.compute_loss

    def compute_loss(*args, **kwargs):
        # One of the operations of which torch has no other kernel.
        torch.nn.functional.max_unpool1d(torch.ones(1, 1, 2), torch.tensor([[[0, 2]]]), 2)
        return plain(*args, **kwargs)

    run.compute_loss = compute_loss
    with pytest.raises(EnvironmentProblem, match="`deterministic: true`: max_unpool"):
        train(run, run.cfg)


def test_noise_on_the_embeddings_is_there_in_training_alone(trainer):
    data, held_out = rows(4), rows(3, seed=2)
    keys = {"learning_rate": 1e-12, "evals_per_epoch": 1}
    plain, noisy = (
        trainer(tiny_model(), data, held_out, neftune_noise_alpha=alpha, **keys) for alpha in (None, 20.0)
    )
    for run in (plain, noisy):
        train(run, run.cfg)
    assert all(a != b for a, b in zip(losses(plain), losses(noisy), strict=True))
    evaluated = [
        [line["eval_loss"] for line in run.state.log_history if "eval_loss" in line] for run in (plain, noisy)
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-6)
