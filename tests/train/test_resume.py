"""Resuming: the run that goes on is bit for bit the run that was never broken off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from axolotl.errors import CheckpointError
from axolotl.train.session import ResumePoint, resume_point, train
from train.miniature import losses, rows, same_weights, tiny_model, weights

PACKED = {"sample_packing": True, "sequence_len": 64, "micro_batch_size": 1}


def history(trainer):
    """What was logged, without how long it took."""
    timed = (
        "seconds_per_step",
        "tokens_per_second",
        "peak_memory_gib",
        "_runtime",
        "_per_second",
        "_flos",
        "_seconds",
    )
    return [
        {k: v for k, v in line.items() if not k.endswith(timed)}
        for line in trainer.state.log_history
        if "train_runtime" not in line
    ]


CASES = {
    "lora": ({"lora": True}, {}),
    "full": ({}, {}),
    "packed": ({}, PACKED),
    "dropout": ({"lora": True, "dropout": 0.2}, {}),
    "dropout, packed, accumulation": ({"dropout": 0.2}, PACKED | {"gradient_accumulation_steps": 3}),
    "noise": ({}, {"neftune_noise_alpha": 5.0}),
    "muon": ({}, {"optimizer": "muon"}),
    "lengths": ({}, {"group_by_length": True, "optimizer": "lion"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_bit_identical(trainer, case, tmp_path):
    build, keys = CASES[case]
    keys = {"num_epochs": 3, "save_steps": 4, "save_strategy": "steps", "evals_per_epoch": 2} | keys
    data, held_out = rows(14), rows(4, seed=9)
    through = trainer(tiny_model(**build), data, held_out, output_dir=str(tmp_path / "through"), **keys)
    train(through, through.cfg)
    folder = tmp_path / "through" / "checkpoint-4"
    assert through.state.global_step > 5
    # Another seed: nothing of the fresh model may survive in the resumed one.
    again = trainer(
        tiny_model(**build, seed=1), data, held_out, folder, output_dir=str(tmp_path / "again"), **keys
    )
    if "lora" in build:
        again.model.load_state_dict(base_weights(through.model), strict=False)
    train(again, again.cfg, folder)
    assert history(again) == history(through)
    assert same_weights(weights(again.model), weights(through.model))
    assert again.trained_tokens == through.trained_tokens


def base_weights(model):
    """The frozen part of an adapted model: it is not in the checkpoint, but comes from the base model."""
    return {name: p for name, p in model.state_dict().items() if "lora_" not in name}


def test_two_runs_from_the_start_are_bit_identical(trainer, tmp_path):
    runs = []
    for name in "ab":
        run = trainer(tiny_model(lora=True, dropout=0.1), rows(10), output_dir=str(tmp_path / name))
        train(run, run.cfg)
        runs.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert same_weights(*runs)


def test_resuming_at_the_end_of_an_epoch(trainer, tmp_path):
    data, keys = rows(8), {"num_epochs": 3, "saves_per_epoch": 1, "save_strategy": None}
    through = trainer(tiny_model(dropout=0.3), data, output_dir=str(tmp_path / "a"), **keys)
    train(through, through.cfg)
    folder = tmp_path / "a" / "checkpoint-4"
    again = trainer(
        tiny_model(dropout=0.3, seed=3), data, None, folder, output_dir=str(tmp_path / "b"), **keys
    )
    train(again, again.cfg, folder)
    assert losses(again) == losses(through)
    assert same_weights(weights(again.model), weights(through.model))


def test_run_jsonl_has_each_step_once_after_resuming(trainer, tmp_path):
    keys = {"max_steps": 6, "save_steps": 2, "save_strategy": "steps"}
    first = trainer(tiny_model(), rows(12), **keys)
    train(first, first.cfg)
    folder = tmp_path / "out" / "checkpoint-4"
    again = trainer(tiny_model(), rows(12), None, folder, **keys)
    train(again, again.cfg, folder)
    lines = [json.loads(line) for line in (tmp_path / "out" / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [line["kind"] for line in lines].count("end") == 1
    assert all(isinstance(line["loss"], float) for line in lines if line["kind"] == "train")


def finished(trainer, **keys):
    keys = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"} | keys
    run = trainer(tiny_model(), rows(8), **keys)
    result = train(run, run.cfg)
    assert result.complete
    assert result.steps == 4
    return run


def test_the_same_command_after_the_end_has_nothing_to_do(trainer, config):
    keys = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    run = finished(trainer)
    assert resume_point(config(**keys, auto_resume_from_checkpoints=True)) == ResumePoint(None, complete=True)
    # Another course is another command: it goes on from the newest checkpoint.
    longer = resume_point(config(**keys | {"max_steps": 8}, auto_resume_from_checkpoints=True))
    assert longer.folder == run.parts.output_dir / "checkpoint-4"
    assert not longer.complete
    assert resume_point(config(**keys)) == ResumePoint(None)


def test_a_longer_run_continues_a_finished_one(trainer, caplog, capsys):
    run = finished(trainer)
    folder = run.parts.output_dir / "checkpoint-4"
    longer = trainer(tiny_model(), rows(8), None, folder, max_steps=6, save_steps=2, save_strategy="steps")
    assert train(longer, longer.cfg, folder).steps == 6
    assert "(from args)" not in caplog.text + capsys.readouterr().err
    assert [line["step"] for line in longer.state.log_history if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("course", ["cosine", "linear", "rex"])
def test_a_longer_run_goes_on_with_the_rate_of_its_own_course(trainer, course, tmp_path):
    keys = {"save_steps": 2, "save_strategy": "steps", "lr_scheduler": course, "logging_steps": 1}
    finished(trainer, **keys)
    whole = trainer(tiny_model(), rows(8), output_dir=str(tmp_path / "whole"), **keys | {"max_steps": 8})
    train(whole, whole.cfg)
    folder = tmp_path / "out" / "checkpoint-4"
    longer = trainer(tiny_model(), rows(8), None, folder, **keys | {"max_steps": 8})
    train(longer, longer.cfg, folder)
    rates = [[x["learning_rate"] for x in history(run) if "learning_rate" in x] for run in (longer, whole)]
    assert rates[0][4:] == rates[1][4:]
    assert rates[0][4] > 0


def test_a_longer_run_evaluates_and_saves_at_no_steps_but_its_own(trainer):
    keys = {"save_steps": 2, "save_strategy": "steps", "eval_steps": 2, "eval_strategy": "steps"}
    first = trainer(tiny_model(), rows(8), rows(4), max_steps=4, **keys)
    train(first, first.cfg)
    folder = first.parts.output_dir / "checkpoint-4"
    longer = trainer(tiny_model(), rows(8), rows(4), folder, max_steps=8, **keys)
    train(longer, longer.cfg, folder)
    evaluated = [line["step"] for line in longer.state.log_history if "eval_loss" in line]
    assert [step for step in evaluated if step > 4] == [6, 8]
    saved = {int(p.name.removeprefix("checkpoint-")) for p in folder.parent.glob("checkpoint-*")}
    assert saved == {2, 4, 6, 8}


def test_what_was_made_of_earlier_weights_is_set_aside(trainer, capsys):
    output = finished(trainer).parts.output_dir
    assert not (output / "earlier").exists()
    for round_ in ("earlier", "earlier-2"):
        (output / "merged").mkdir()
        (output / "merged" / "model.safetensors").write_text(round_)
        (output / "evaluation.json").write_text("{}")
        (output / "lm_eval.json").write_text("{}")
        (output / "notes.txt").write_text("mine")
        finished(trainer)
        assert sorted(p.name for p in (output / round_).iterdir()) == [
            "evaluation.json",
            "lm_eval.json",
            "merged",
        ]
        assert (output / round_ / "merged" / "model.safetensors").read_text() == round_
        assert not (output / "merged").exists()
        assert (output / "notes.txt").exists()
        assert "`merged`, `evaluation.json`, `lm_eval.json` came from the weights" in " ".join(
            capsys.readouterr().err.split()
        )


def test_a_head_that_is_the_embedding_is_not_called_missing(trainer, capsys):
    def tied(seed):
        model = tiny_model(seed=seed)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return model

    keys = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    run = trainer(tied(42), rows(8), **keys)
    train(run, run.cfg)
    folder = run.parts.output_dir / "checkpoint-2"
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    capsys.readouterr()
    again = trainer(tied(5), rows(8), None, folder, **keys)
    train(again, again.cfg, folder)
    assert "missing" not in capsys.readouterr().err
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight
    ours, first = (r.model.state_dict() for r in (again, run))
    assert all(torch.equal(ours[name], first[name]) for name in first)
    again._issue_warnings_after_load(
        SimpleNamespace(missing_keys=["lm_head.weight", "a"], unexpected_keys=["b"])
    )
    said = " ".join(capsys.readouterr().err.split())
    assert "lacks 1 of the model's weights, such as `a`" in said
    assert "has 1 weights that the model has not, such as `b`" in said


def test_a_run_killed_before_the_final_weights_only_writes_them(trainer):
    run = finished(trainer)
    output = run.parts.output_dir
    expected = load_file(output / "model.safetensors")
    (output / "model.safetensors").unlink()
    (output / "run.json").unlink()
    folder = output / "checkpoint-4"
    again = trainer(
        tiny_model(seed=5), rows(8), None, folder, max_steps=4, save_steps=2, save_strategy="steps"
    )
    result = train(again, again.cfg, folder)
    assert result.complete
    assert result.loss is None
    assert same_weights(load_file(output / "model.safetensors"), expected)


def damaged(folder: Path, how: str) -> None:
    if how == "truncated":
        with (folder / "optimizer.pt").open("r+b") as stream:
            stream.truncate(1000)
    elif how == "flipped":
        with (folder / "model.safetensors").open("r+b") as stream:
            stream.seek(5000)
            byte = stream.read(1)[0]
            stream.seek(5000)
            stream.write(bytes([byte ^ 1]))
    elif how == "missing":
        (folder / "scheduler.pt").unlink()
    else:
        (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "manifest"])
def test_a_damaged_checkpoint_is_skipped_and_named(trainer, config, capsys, how):
    output = finished(trainer).parts.output_dir
    damaged(output / "checkpoint-4", how)
    keys = {"max_steps": 9, "auto_resume_from_checkpoints": True}
    assert resume_point(config(**keys)).folder == output / "checkpoint-2"
    assert "checkpoint-4 is skipped" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        resume_point(config(resume_from_checkpoint=str(output / "checkpoint-4")))


def test_without_any_checkpoint_auto_starts_fresh_and_true_does_not(config):
    assert resume_point(config(auto_resume_from_checkpoints=True)) == ResumePoint(None)
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        resume_point(config(resume_from_checkpoint="true"))
    with pytest.raises(CheckpointError, match="is not a folder"):
        resume_point(config(resume_from_checkpoint="nowhere/checkpoint-3"))


def test_checkpoints_of_an_earlier_run_are_left_alone(trainer, config):
    output = finished(trainer).parts.output_dir
    newer = trainer(
        tiny_model(), rows(8), max_steps=3, save_steps=1, save_strategy="steps", save_total_limit=1
    )
    train(newer, newer.cfg)
    assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    point = resume_point(config(max_steps=9, auto_resume_from_checkpoints=True))
    assert point.folder == output / "checkpoint-3"


def test_changed_data_is_told(trainer, capsys):
    folder = finished(trainer).parts.output_dir / "checkpoint-2"
    trainer(tiny_model(), rows(8, seed=77), None, folder, max_steps=4)
    assert "the training data or how it is batched has changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(trainer, capsys, number, code):
    run = trainer(tiny_model(), rows(20))

    class Sender(type(run.callback_handler.callbacks[0])):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    run.add_callback(Sender())
    result = train(run, run.cfg)
    assert (result.exit_code, result.steps, result.complete) == (code, 3, False)
    assert result.checkpoint == run.parts.output_dir / "checkpoint-3"
    assert f"--resume-from-checkpoint {result.checkpoint}" in capsys.readouterr().err
    assert not (run.parts.output_dir / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    through = trainer(tiny_model(), rows(20))
    train(through, through.cfg)
    again = trainer(tiny_model(seed=2), rows(20), None, result.checkpoint)
    train(again, again.cfg, result.checkpoint)
    assert same_weights(weights(again.model), weights(through.model))


def test_a_signal_during_evaluation_does_not_wait_for_its_end(trainer):
    run = trainer(tiny_model(), rows(8), rows(40, seed=1), evals_per_epoch=1, eval_batch_size=1)

    class Sender(type(run.callback_handler.callbacks[0])):
        seen = 0

        def on_prediction_step(self, args, state, control, **kwargs):
            if state.global_step:
                self.seen += 1
                if self.seen == 2:
                    os.kill(os.getpid(), signal.SIGTERM)

    sender = Sender()
    run.add_callback(sender)
    result = train(run, run.cfg)
    assert sender.seen == 2
    assert result.exit_code == 143
    assert result.checkpoint is not None


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from transformers import AutoTokenizer
from axolotl.config import load_config
from axolotl.config.resolve import resolve
from axolotl.train.session import build_trainer, resume_point, train
from train.miniature import CPU, rows, tiny_model
cfg, _ = resolve(load_config(sys.argv[2]), CPU)
point = resume_point(cfg)
tokenizer = AutoTokenizer.from_pretrained(cfg.model.base_model)
trainer = build_trainer(cfg, tiny_model(lora=True, dropout=0.1), tokenizer, rows(30), rows(4, seed=8), CPU, point.folder)
sys.exit(train(trainer, cfg, point.folder).exit_code)
"""


@pytest.mark.slow
def test_kill_9_then_the_same_command_ends_with_the_same_weights(config, tmp_path):
    keys = {
        "num_epochs": 6,
        "save_steps": 5,
        "save_strategy": "steps",
        "evals_per_epoch": 1,
        "sample_packing": True,
    }
    keys |= {"auto_resume_from_checkpoints": True, "gradient_accumulation_steps": 2, "micro_batch_size": 1}
    tests = str(Path(__file__).resolve().parents[1])
    results = []
    for name, kills in (("whole", 0), ("broken", 3)):
        cfg = config(**keys, output_dir=str(tmp_path / name))
        file = tmp_path / f"{name}.yml"
        file.write_text(cfg.resolved_yaml())
        command = [sys.executable, "-c", CHILD, tests, str(file)]
        log = tmp_path / name / "run.jsonl"
        for _ in range(kills):
            before = log.read_text().count('"train"') if log.exists() else 0
            child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 120
            while child.poll() is None and time.monotonic() < deadline:
                if log.exists() and log.read_text().count('"train"') >= before + 7:
                    child.kill()
                time.sleep(0.005)
            assert child.wait() == -signal.SIGKILL
        assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
        results.append((load_file(tmp_path / name / "adapter_model.safetensors"), log.read_text()))
    assert same_weights(results[0][0], results[1][0])
    curves = [[json.loads(line).get("loss") for line in text.splitlines()] for _, text in results]
    assert curves[0] == curves[1]
    assert all(isinstance(p, torch.Tensor) for p in results[0][0].values())
