"""A hundred steps of each family with our kernels: the loss curve is that of plain transformers and PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from axolotl.model.patch import apply_kernels
from model.families import CONFIGS, VOCAB, build
from model.test_patch import LIGER, LORA, LOSS, bench

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3")


def curve(model: Any, steps: int) -> list[float]:
    """Losses of a model that learns sequences which count upwards from a random start."""
    model.train()
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, fused=True)
    seen = []
    for _ in range(steps):
        start = torch.randint(3, VOCAB, (4, 1), generator=draw)
        ids = (start + torch.arange(12)) % VOCAB
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(44.0), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_a_hundred_steps(family, lora):
    assert family in CONFIGS
    plain = curve(build(family, lora=lora), 100)
    ours = build(family, lora=lora)
    made = apply_kernels(bench(ours, **(LORA if lora else {}), **LOSS))
    assert made.counts["fused loss"] == 1
    found = curve(ours, 100)
    assert plain[-1] < 0.9 * plain[0]
    # Rounding in another order grows with the steps; a wrong gradient would show in the first few.
    assert found[:10] == pytest.approx(plain[:10], rel=1e-4)
    assert found == pytest.approx(plain, rel=2e-2)


@pytest.mark.extras
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_few_steps_with_the_programs(kernels_run, family):
    plain = curve(build(family, lora=True), 3)
    ours = build(family, lora=True)
    apply_kernels(bench(ours, strict=True, **LORA, **LIGER, **LOSS))
    assert curve(ours, 3) == pytest.approx(plain, rel=1e-4)
