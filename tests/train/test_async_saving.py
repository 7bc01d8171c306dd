"""`save_async`: a thread writes the checkpoints, and nothing else is different."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
import time

import pytest
import torch
from torch import nn

from axolotl.train import saving
from axolotl.train.background import Background
from axolotl.train.checkpoint import damage, publish
from axolotl.train.session import train
from axolotl.train.snapshot import Copies, take
from train.miniature import losses, rows, same_weights, tiny_model, weights

KEYS = {"num_epochs": 2, "save_steps": 3, "save_strategy": "steps", "evals_per_epoch": 1}
# They tell of the moment at which they were written, or of the folder.
PARTICULAR = {
    "axolotl_config.json",
    "manifest.json",
    "axolotl_state.json",
    "training_args.bin",
    "trainer_state.json",
}


def contents(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("lora", [False, True])
def test_the_checkpoints_are_the_same_byte_for_byte(trainer, tmp_path, lora):
    found = []
    for at_once in (True, False):
        run = trainer(
            tiny_model(lora=lora, dropout=0.1),
            rows(12),
            rows(4, seed=3),
            save_async=not at_once,
            output_dir=str(tmp_path / f"out-{at_once}"),
            **KEYS,
        )
        assert run.saves_in_background is not at_once
        assert train(run, run.cfg).complete
        found.append(run)
    ours, theirs = (
        {p.name: contents(p) for p in run.parts.output_dir.glob("checkpoint-*")} for run in reversed(found)
    )
    assert ours.keys() == theirs.keys() and len(ours) == 4
    for name in ours:
        assert ours[name].keys() == theirs[name].keys()
        different = {f for f in ours[name] if ours[name][f] != theirs[name][f]}
        assert different <= PARTICULAR, (name, different)
    assert losses(found[0]) == losses(found[1])
    states = [
        json.loads((run.parts.output_dir / "checkpoint-6" / "trainer_state.json").read_text())
        for run in found
    ]
    for state in states:
        for line in state["log_history"]:
            for key in [k for k in line if "second" in k or "runtime" in k or "memory" in k]:
                del line[key]
    assert states[0]["log_history"] == states[1]["log_history"]
    assert states[0].keys() == states[1].keys()
    assert states[0]["stateful_callbacks"] == states[1]["stateful_callbacks"]


def test_it_resumes_bit_for_bit_although_training_went_on_while_it_was_written(trainer, monkeypatch):
    seen = []

    def late(written, final):
        # Two more steps change the weights before a byte of this checkpoint is on its way.
        deadline = time.monotonic() + 20
        while run.state.global_step < min(seen[-1] + 2, 12) and time.monotonic() < deadline:
            time.sleep(0.001)
        publish(written, final)

    run = trainer(tiny_model(dropout=0.1), rows(12), save_async=True, **KEYS)
    save = run._save

    def slow(folder, state_dict=None):
        if state_dict is not None:
            seen.append(int(folder.rpartition("-")[2]))
            time.sleep(0.05)
        save(folder, state_dict=state_dict)

    monkeypatch.setattr(run, "_save", slow)
    monkeypatch.setattr(saving, "publish", late)
    train(run, run.cfg)
    folder = run.parts.output_dir / "checkpoint-3"
    assert damage(folder) is None
    again = trainer(tiny_model(dropout=0.1, seed=9), rows(12), None, folder, **KEYS)
    train(again, again.cfg, folder)
    assert same_weights(weights(again.model), weights(run.model))
    assert losses(again) == losses(run)


def test_a_step_does_not_wait_for_the_disk_and_the_end_does(trainer, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    during = []

    def hold(written, final):
        begun.set()
        assert go_on.wait(30)
        publish(written, final)

    run = trainer(tiny_model(), rows(12), save_async=True, save_steps=3, save_strategy="steps")
    monkeypatch.setattr(saving, "publish", hold)

    class Steps(type(run.callback_handler.callbacks[0])):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                assert begun.wait(30)
                during.append([p.name for p in run.parts.output_dir.glob("checkpoint-*")])
                go_on.set()

    run.add_callback(Steps())
    assert train(run, run.cfg).complete
    assert during == [[]], "step 5 was done while checkpoint 3 was still being written"
    assert sorted(p.name for p in run.parts.output_dir.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
    ]


def test_a_disk_that_refuses_in_the_background_is_told_and_tried_again(trainer, monkeypatch, capsys):
    monkeypatch.setattr(saving, "FIRST_WAIT", 1e-9)
    tried = []

    def refuse(written, final):
        tried.append(final.name)
        if len(tried) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(written, final)

    monkeypatch.setattr(saving, "publish", refuse)
    run = trainer(tiny_model(), rows(60), save_async=True, save_steps=20, save_strategy="steps")
    assert train(run, run.cfg).complete
    assert tried[0] == "checkpoint-20" and len(tried) >= 3
    assert run.save_failures == 0 and not list(run.parts.output_dir.glob(".tmp*"))
    said = capsys.readouterr().err.replace("\n", " ")
    assert "The checkpoint of step 20 could not be saved: No space left on device" in said
    events = [json.loads(x) for x in (run.parts.output_dir / "run.jsonl").read_text().splitlines()]
    assert sum(e["kind"] == "event" and "could not be saved" in e["message"] for e in events) == 2


def test_a_mistake_of_ours_in_the_background_is_no_trouble_of_the_disk(trainer, monkeypatch):
    def broken(written, final):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(saving, "publish", broken)
    run = trainer(tiny_model(), rows(12), save_async=True, save_steps=2, save_strategy="steps")
    with pytest.raises(ZeroDivisionError):
        train(run, run.cfg)


def test_retention_and_the_best_checkpoint(trainer):
    run = trainer(
        tiny_model(),
        rows(12),
        rows(4, seed=3),
        save_async=True,
        save_total_limit=2,
        load_best_model_at_end=True,
        num_epochs=3,
        evals_per_epoch=2,
        save_steps=3,
        save_strategy="steps",
    )
    train(run, run.cfg)
    best = run.state.best_model_checkpoint
    assert best is not None and best.endswith(f"checkpoint-{run.state.best_global_step}")
    left = sorted(p.name for p in run.parts.output_dir.glob("checkpoint-*"))
    assert len(left) == 2 and f"checkpoint-{run.state.best_global_step}" in left
    evaluations = [line["eval_loss"] for line in run.state.log_history if "eval_loss" in line]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(evaluations), abs=1e-6)


def test_a_model_that_only_saves_itself_is_saved_at_once_and_told(trainer, capsys):
    run = trainer(tiny_model(), rows(8), save_async=True, save_steps=2, save_strategy="steps")
    run.model.hf_quantizer = object()
    assert not run.saves_in_background


def test_trackers_hear_of_a_checkpoint_when_it_is_there(trainer):
    run = trainer(tiny_model(), rows(8), save_async=True, save_steps=2, save_strategy="steps")
    seen = []
    run.published.append(
        lambda state: seen.append(
            (state.global_step, (run.checkpoint_folder().parent / f"checkpoint-{state.global_step}").is_dir())
        )
    )
    train(run, run.cfg)
    assert seen == [(2, True), (4, True)]


def test_a_snapshot_shares_nothing_with_what_training_changes(trainer):
    run = trainer(tiny_model(), rows(8), save_async=True)
    run.create_optimizer_and_scheduler(4)
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    run.optimizer.step()
    copies = Copies(torch.device("cpu"))
    shot = take(run, copies)
    before = {k: v.clone() for k, v in shot.weights.items()}
    moments = [s["exp_avg"].clone() for s in shot.files["optimizer.pt"]["state"].values()]
    run.optimizer.step()
    torch.rand(1)
    assert all(torch.equal(before[k], shot.weights[k]) for k in before)
    assert all(
        torch.equal(a, s["exp_avg"])
        for a, s in zip(moments, shot.files["optimizer.pt"]["state"].values(), strict=True)
    )
    assert not torch.equal(shot.files["rng_state.pth"]["cpu"], torch.get_rng_state())
    size = copies.bytes()
    take(run, copies)
    assert copies.bytes() == size, "memory is used again"


def test_tied_weights_are_copied_once_and_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
            self.register_buffer("count", torch.zeros(2))

    from axolotl.train.snapshot import _weights

    net, copies = Tied(), Copies(torch.device("cpu"))
    found = _weights(net, copies)
    assert found["a.weight"].data_ptr() == found["b.weight"].data_ptr() != net.a.weight.data_ptr()
    assert found["frozen"].data_ptr() == net.frozen.data_ptr()
    assert found["count"].data_ptr() != net.count.data_ptr()
    assert copies.bytes() == 16 * 4 + 2 * 4


def test_work_in_the_background_is_done_in_order_and_its_errors_come_back():
    done, background = [], Background("test")
    background.start(lambda: (time.sleep(0.05), done.append(1)))
    assert background.busy
    background.start(lambda: done.append(2))
    background.wait()
    assert done == [1, 2] and not background.busy
    background.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.wait()
    background.wait()
