"""The loss: that of a plain loop, whatever the batch is cut into, packed or padded, in training and evaluation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import get_cosine_schedule_with_warmup

from axolotl.data.packing import single_rows
from axolotl.train.rows import TokenRows
from axolotl.train.trainer import token_loss
from train.miniature import losses, rows, tiny_model


def plain_loop(model, data, *, batch: int, steps: int, lr: float = 1e-2):
    """Full batches of rows, each row on its own, the loss summed and divided by all trained tokens of the batch."""
    model.train()
    reader = TokenRows(data)
    order = single_rows(reader.lengths, seed=42).rows.tolist()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(int(0.03 * steps), 100), steps)
    seen = []
    for step in range(steps):
        total, targets = 0.0, 0
        for i in order[step * batch : (step + 1) * batch]:
            ids, labels = (torch.from_numpy(x.astype("int64"))[None] for x in reader.row(i))
            logits = model(input_ids=ids).logits
            total = total + F.cross_entropy(logits[0, :-1].float(), labels[0, 1:], reduction="sum")
            targets += int((labels[0, 1:] != -100).sum())
        loss = total / targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize("lora", [False, True])
def test_losses_are_those_of_a_plain_loop(trainer, lora):
    data = rows(24)
    ours = trainer(tiny_model(lora=lora), data, micro_batch_size=4)
    ours.train()
    reference = plain_loop(tiny_model(lora=lora), data, batch=4, steps=6)
    assert losses(ours) == pytest.approx(reference, abs=2e-5)


@pytest.mark.parametrize(("micro", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_a_batch_may_be_cut_into_pieces(trainer, micro, accumulation):
    data = rows(40)
    whole = trainer(tiny_model(lora=True), data, micro_batch_size=8, gradient_accumulation_steps=1)
    whole.train()
    pieces = trainer(
        tiny_model(lora=True), data, micro_batch_size=micro, gradient_accumulation_steps=accumulation
    )
    pieces.train()
    assert len(losses(pieces)) == 5
    assert losses(pieces) == pytest.approx(losses(whole), abs=2e-5)


@pytest.mark.parametrize("keys", [{}, {"attn_implementation": "sdpa"}, {"pad_to_sequence_len": False}])
def test_packed_rows_give_the_loss_of_separate_ones(trainer, keys):
    data = rows(16)
    packed = trainer(
        tiny_model(), data, micro_batch_size=8, sequence_len=512, sample_packing=True, num_epochs=3, **keys
    )
    separate = trainer(tiny_model(), data, micro_batch_size=16, sequence_len=512, num_epochs=3)
    assert packed.parts.volume.total_steps == separate.parts.volume.total_steps == 3
    packed.train()
    separate.train()
    assert losses(packed) == pytest.approx(losses(separate), abs=2e-5)


@pytest.mark.parametrize(
    "keys",
    [
        {"eval_batch_size": 1},
        {"eval_batch_size": 5},
        {"sample_packing": True},
        {"sample_packing": True, "eval_sample_packing": False},
        {"batch_flattening": True},
    ],
)
def test_evaluation_weighs_every_token_alike(trainer, keys):
    model, data = tiny_model(), rows(11, seed=5)
    total, targets = 0.0, 0
    reader = TokenRows(data)
    for i in range(len(data)):
        ids, labels = (torch.from_numpy(x.astype("int64")) for x in reader.row(i))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        total += F.cross_entropy(logits[:-1], labels[1:], reduction="sum").item()
        targets += int((labels[1:] != -100).sum())
    metrics = trainer(model, rows(4), data, **keys).evaluate()
    assert metrics["eval_loss"] == pytest.approx(total / targets, abs=1e-5)
    assert metrics["eval_ppl"] == pytest.approx(math.exp(total / targets), rel=1e-4)


def test_a_model_that_ignores_the_number_of_tokens_gets_our_loss(trainer):
    class Deaf(type(tiny_model())):
        def forward(self, *args, num_items_in_batch=None, **kwargs):
            return super().forward(*args, **kwargs)

    data = rows(16)
    model = tiny_model()
    model.__class__ = Deaf
    deaf = trainer(model, data, micro_batch_size=1, gradient_accumulation_steps=8)
    assert deaf.compute_loss_func is token_loss
    deaf.train()
    hearing = trainer(tiny_model(), data, micro_batch_size=8)
    assert hearing.compute_loss_func is None
    hearing.train()
    assert losses(deaf) == pytest.approx(losses(hearing), abs=2e-5)


def test_accumulation_is_exact_in_the_last_short_step(trainer):
    data = rows(11)
    pieces = trainer(tiny_model(), data, micro_batch_size=2, gradient_accumulation_steps=2, num_epochs=2)
    whole = trainer(tiny_model(), data, micro_batch_size=4, num_epochs=2)
    pieces.train()
    whole.train()
    assert len(losses(whole)) == 6
    assert losses(pieces) == pytest.approx(losses(whole), abs=2e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(trainer, reentrant):
    data = rows(8)
    keys = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    saving = trainer(tiny_model(lora=True), data, micro_batch_size=4, num_epochs=2, **keys)
    plain = trainer(tiny_model(lora=True), data, micro_batch_size=4, num_epochs=2)
    saving.train()
    plain.train()
    assert losses(saving) == pytest.approx(losses(plain), abs=1e-6)
    assert losses(plain)[-1] < losses(plain)[0]


def test_bf16_is_obeyed_on_a_cpu_and_close_to_float32(trainer):
    data = rows(8)
    rough = trainer(tiny_model(), data, micro_batch_size=8, bf16=True)
    fine = trainer(tiny_model(), data, micro_batch_size=8)
    rough.train()
    fine.train()
    assert rough.parts.autocast is torch.bfloat16
    assert losses(rough) != losses(fine)
    assert losses(rough) == pytest.approx(losses(fine), abs=0.02)


def test_real_tokens_are_counted_without_padding(trainer):
    data = rows(12)
    run = trainer(tiny_model(), data, micro_batch_size=3, sequence_len=64, sample_packing=True)
    run.train()
    trained = sum(sum(label != -100 for label in labels[1:]) for labels in data["labels"])
    last = [line for line in run.state.log_history if "loss" in line][-1]
    assert last["tokens"] == sum(map(len, data["input_ids"]))
    assert last["trained_tokens"] == trained
