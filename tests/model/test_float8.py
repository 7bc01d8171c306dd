"""Products in 8-bit floats for full fine-tuning, emulated on the CPU: near the plain ones, learned with, and undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from axolotl.model.float8 import train_in_float8
from axolotl.model.recompute import Recompute, apply_recompute
from axolotl.model.replace import Replacements
from model.families import build
from model.test_patch import run

pytestmark = pytest.mark.extras


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_gradients_are_near_and_everything_can_be_undone(family: str) -> None:
    model = build(family).train()
    expected, names = run(model), list(model.state_dict())
    made = Replacements()
    count = train_in_float8(model, made, emulate=True)
    assert count == made.counts["8-bit product"] >= 12
    assert type(model.get_output_embeddings()) is nn.Linear
    assert list(model.state_dict()) == names
    loss, found = run(model)
    assert loss == pytest.approx(expected[0], rel=0.05) and loss != expected[0]
    flat = [torch.cat([g[n].flatten() for n in names if n in g]) for g in (found, expected[1])]
    assert float(torch.cosine_similarity(*flat, dim=0)) > 0.95
    made.undo()
    again = run(model)
    assert again[0] == expected[0]
    assert all(torch.equal(again[1][n], g) for n, g in expected[1].items())


def test_recomputed_layers_round_alike() -> None:
    found = []
    for how in (None, Recompute(), Recompute(keeps=("attention", "down_proj"))):
        model, made = build("llama").train(), Replacements()
        train_in_float8(model, made, emulate=True)
        apply_recompute(model, how, torch.device("cpu"), made)
        found.append(run(model))
    for other in found[1:]:
        assert other[0] == found[0][0]
        assert all(torch.equal(other[1][n], g) for n, g in found[0][1].items())


def test_it_learns() -> None:
    def course(eight: bool) -> list[float]:
        model: Any = build("llama").train()
        if eight:
            train_in_float8(model, Replacements(), emulate=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids = torch.arange(3, 27).reshape(2, 12)
        losses = []
        for _ in range(12):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    plain, ours = course(False), course(True)
    assert ours[-1] < 0.7 * ours[0]
    assert ours == pytest.approx(plain, rel=0.15)
