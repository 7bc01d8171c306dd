"""A run from start to end: what it writes, what it says, and how it ends when things go wrong."""

from __future__ import annotations

import errno
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl.distributed.failure import launch_name
from axolotl.errors import CheckpointError, EnvironmentProblem, ModelError
from axolotl.model.attention import PACKED
from axolotl.train.session import train
from axolotl.train.steps import TrainingDiverged
from train.miniature import losses, rows, same_weights, tiny_model, weights


def test_full_training_leaves_a_model_that_loads(trainer, tmp_path, tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"
    run = trainer(tiny_model(), rows(8), sample_packing=True)
    result = train(run, run.cfg)
    output = tmp_path / "out"
    assert result.complete
    assert result.exit_code == 0
    assert result.steps == run.parts.volume.total_steps
    names = {p.name for p in output.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
    } <= names
    assert {"axolotl_config.yml", "run.json", "run.jsonl"} <= names
    assert not any(n.startswith(".tmp") or n == "training_args.bin" for n in names)
    assert PACKED not in (output / "config.json").read_text()
    assert json.loads((output / "config.json").read_text())["use_cache"] is True
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert same_weights(weights(loaded), weights(run.model))
    assert AutoTokenizer.from_pretrained(output).chat_template == "{{ messages[0].content }}"
    said = json.loads((output / "run.json").read_text())
    assert said["complete"] is True
    # A launcher that starts the run again finds it by this name.
    assert said["launch"] == launch_name() and said["launch_options"] == []


def test_an_adapter_and_only_it_is_written(trainer, tmp_path, capsys):
    run = trainer(
        tiny_model(lora=True),
        rows(8),
        rows(3),
        adapter="lora",
        lora_r=4,
        lora_alpha=8,
        lora_target_linear=True,
    )
    train(run, run.cfg)
    output = tmp_path / "out"
    names = {p.name for p in output.iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "generation_config.json",
        "tokenizer.json",
    } <= names
    assert "model.safetensors" not in names
    said = capsys.readouterr().err
    assert "axolotl merge-lora" in said
    assert "axolotl inference" in said
    assert "evaluation loss" in said
    card = (output / "README.md").read_text()
    assert "adapter for" in card
    assert "`tiny-llama3`" in card
    # A folder of this machine is no base that the Hub would take.
    assert "base_model:" not in card
    assert "learning_rate: 0.01" in (output / "axolotl_config.yml").read_text()


def test_the_probe_refuses_a_model_that_mixes_documents(trainer):
    class Leaky(type(tiny_model())):
        def forward(self, *args, position_ids=None, **kwargs):
            for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
                kwargs.pop(name, None)
            return super().forward(*args, **kwargs)

    model = tiny_model()
    model.__class__ = Leaky
    with pytest.raises(ModelError, match="would see each other"):
        trainer(model, rows(8), sample_packing=True)
    trainer(model, rows(8))


def test_save_total_limit_and_best_model(trainer, tmp_path):
    keys = {
        "num_epochs": 4,
        "evals_per_epoch": 1,
        "saves_per_epoch": 1,
        "save_strategy": None,
        "save_total_limit": 2,
    }
    run = trainer(
        tiny_model(), rows(10), rows(4, seed=2), load_best_model_at_end=True, learning_rate=0.3, **keys
    )
    train(run, run.cfg)
    lines = [line for line in run.state.log_history if "eval_loss" in line and line["step"]]
    best = min(lines, key=lambda line: line["eval_loss"])["step"]
    assert best < run.state.global_step, "the course of this test must get worse towards the end"
    kept = {p.name for p in (tmp_path / "out").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", f"checkpoint-{run.state.global_step}"}
    final = load_file(tmp_path / "out" / "model.safetensors")
    assert same_weights(final, load_file(tmp_path / "out" / f"checkpoint-{best}" / "model.safetensors"))


def test_early_stopping(trainer):
    keys = {"num_epochs": 30, "evals_per_epoch": 1, "early_stopping_patience": 2, "learning_rate": 0.3}
    run = trainer(tiny_model(), rows(6), rows(4, seed=2), **keys)
    train(run, run.cfg)
    values = [line["eval_loss"] for line in run.state.log_history if "eval_loss" in line]
    assert run.state.global_step < run.parts.volume.total_steps
    assert values.index(min(values)) == len(values) - 3


def test_a_loss_that_is_no_number_ends_the_run(trainer):
    run = trainer(tiny_model(), rows(30))
    original = run.compute_loss
    run.compute_loss = lambda *a, **k: original(*a, **k) * (math.nan if run.state.global_step >= 2 else 1.0)
    with pytest.raises(TrainingDiverged, match="not a finite number 3 times"):
        train(run, run.cfg)
    assert run.state.global_step == 4
    bad = json.loads((run.parts.output_dir / "bad_batch.json").read_text())
    assert (bad["step"], bad["not_finite"], len(bad["micro_batches"])) == (5, "loss", 1)
    expected = run.order.bins_of(4)
    assert [row["row"] for row in bad["micro_batches"][0]["rows"]] == [i for each in expected for i in each]
    assert all(row["text"] and row["trained_tokens"] for row in bad["micro_batches"][0]["rows"])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_without_a_number_changes_no_weight(trainer, where):
    run = trainer(tiny_model(), rows(12), weight_decay=0.1)
    original, seen = run.compute_loss, {}

    def poisoned(*args, **kwargs):
        step = run.state.global_step
        if step == 2:
            seen["before"] = weights(run.model)
            seen["moments"] = [s["exp_avg"].clone() for s in run.optimizer.state.values()]
        if step == 3:
            seen["after"] = weights(run.model)
            assert all(
                torch.equal(a, s["exp_avg"])
                for a, s in zip(seen["moments"], run.optimizer.state.values(), strict=True)
            )
        loss = original(*args, **kwargs)
        if step != 2:
            return loss
        if where == "loss":
            return loss * math.nan
        # The loss is a number; the slope of a square root at 0 is none.
        return loss + 0 * torch.sqrt(loss * 0)

    run.compute_loss = poisoned
    train(run, run.cfg)
    assert same_weights(seen["before"], seen["after"])
    assert run.bad_steps == 1 and run.bad_streak == 0
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    events = [json.loads(x) for x in (run.parts.output_dir / "run.jsonl").read_text().splitlines()]
    assert [e["message"] for e in events if e["kind"] == "event"] == [
        f"The {where} of step 3 is not a finite number: the step is left out (1 so far)."
    ]


def test_one_bad_loss_is_logged_and_forgotten(trainer):
    run = trainer(tiny_model(), rows(12), learning_rate=1e-12)
    original = run.training_step

    def once(model, inputs, *rest):
        loss = original(model, inputs, *rest)
        if run.state.global_step == 2:
            run._failed_losses = run._failed_losses + 1
        return loss

    run.training_step = once
    train(run, run.cfg)
    assert [math.isnan(x) for x in losses(run)] == [False, False, True, False, False, False]


def test_loss_watchdog(trainer):
    run = trainer(tiny_model(), rows(20), loss_watchdog_threshold=1.0, loss_watchdog_patience=2)
    with pytest.raises(TrainingDiverged, match="loss_watchdog_threshold"):
        train(run, run.cfg)
    assert run.state.global_step == 2


def test_a_full_disk_does_not_end_the_run(trainer, tmp_path, monkeypatch, capsys):
    saved = []

    def full(written, final):
        saved.append(final.name)
        if len(saved) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(written, final)

    from axolotl.train.checkpoint import publish

    monkeypatch.setattr("axolotl.train.saving.publish", full)
    run = trainer(tiny_model(), rows(8), save_steps=2, save_strategy="steps")
    assert train(run, run.cfg).complete
    assert saved == ["checkpoint-2", "checkpoint-4"]
    assert [p.name for p in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-4"]
    assert "step 2 could not be saved" in capsys.readouterr().err


def test_final_weights_that_cannot_be_written_leave_the_old_ones(trainer, tmp_path, monkeypatch):
    run = trainer(tiny_model(), rows(4))
    output = tmp_path / "out"
    output.mkdir(exist_ok=True)
    (output / "model.safetensors").write_text("of an earlier run")

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(run), "rehearse", lambda self: None)
    monkeypatch.setattr(type(run), "save_model", fail)
    waited = []
    monkeypatch.setattr("axolotl.train.saving.time.sleep", waited.append)
    with pytest.raises(CheckpointError, match="final weights could not be written"):
        train(run, run.cfg)
    assert (output / "model.safetensors").read_text() == "of an earlier run"
    assert waited == [5, 10, 20]


def test_an_output_dir_that_cannot_be_made_is_told(trainer, tmp_path):
    run = trainer(tiny_model(), rows(4))
    (tmp_path / "file").write_text("")
    run.parts.output_dir = tmp_path / "file" / "out"
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        train(run, run.cfg)


def test_a_checkpoint_on_request(trainer, tmp_path):
    run = trainer(tiny_model(), rows(12), dynamic_checkpoint={"enabled": True, "check_interval": 2})
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "axolotl_checkpoint.save").write_text("")
    train(run, run.cfg)
    assert [p.name for p in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-2"]


@pytest.mark.parametrize("steps", [1, 99], ids=["some steps", "more than there are"])
def test_the_profiler_writes_a_trace(trainer, tmp_path, steps):
    run = trainer(tiny_model(), rows(8), profiler_steps=steps, profiler_steps_start=1, gc_collect_steps=-1)
    train(run, run.cfg)
    assert json.loads((tmp_path / "out" / "profile.json").read_text())["traceEvents"]


def test_run_jsonl_says_what_it_promises(trainer, tmp_path):
    run = trainer(tiny_model(), rows(8), rows(3), evals_per_epoch=2)
    train(run, run.cfg)
    lines = [json.loads(line) for line in (tmp_path / "out" / "run.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == [
        "eval",
        "train",
        "train",
        "eval",
        "train",
        "train",
        "eval",
        "end",
    ]
    promised = {"loss", "ppl", "grad_norm", "learning_rate", "tokens", "trained_tokens", "tokens_per_second"}
    for line in lines:
        assert {"step", "epoch", "time"} <= set(line)
        if line["kind"] == "train":
            assert promised | {"seconds_per_step", "peak_memory_gib"} <= set(line)
        if line["kind"] == "eval":
            assert {"eval_loss", "eval_ppl", "eval_runtime"} <= set(line)


def test_tensorboard_gets_the_figures(trainer, tmp_path):
    run = trainer(tiny_model(), rows(4), use_tensorboard=True)
    train(run, run.cfg)
    assert list((tmp_path / "out" / "runs").rglob("events.out.tfevents*"))


def test_worker_processes_read_the_same_rows(trainer):
    data = rows(8)
    alone, helped = trainer(tiny_model(), data), trainer(tiny_model(), data, dataloader_num_workers=2)
    alone.train()
    helped.train()
    assert losses(alone) == losses(helped)


def test_a_shuffled_selection_of_a_dataset_is_followed(trainer):
    data = rows(20)
    chosen = [7, 3, 3, 19, 0]
    reader = trainer(tiny_model(), data.select(chosen)).parts.batches.rows
    for i, source in enumerate(chosen):
        ids, labels = reader.row(i)
        assert np.array_equal(ids, data[source]["input_ids"])
        assert np.array_equal(labels, data[source]["labels"])
    assert torch.equal(
        torch.from_numpy(reader.lengths), torch.tensor([len(data[i]["input_ids"]) for i in chosen])
    )
