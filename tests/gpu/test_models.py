"""Whole models on the GPU with all kernels beside plain transformers and PEFT: loss and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from axolotl.config.kernels import KernelsSection
from axolotl.model.patch import Bench, apply_kernels
from kernels.comparing import error
from model.families import CONFIGS, batch, build
from model.test_patch import LIGER, LORA, LOSS, base_of

pytestmark = pytest.mark.gpu


def run(model, autocast: bool) -> tuple[float, dict[str, torch.Tensor]]:
    inputs = {k: v.cuda() for k, v in batch(4, 70).items()}
    items = torch.tensor(201.0, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = model(**inputs, num_items_in_batch=items, use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_loss_and_gradients(family, lora, half):
    exact = run(build(family, lora=lora).cuda(), False)
    ours = build(family, lora=lora).cuda()
    if half and lora:
        for parameter in ours.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    keys = KernelsSection(**LOSS, **LIGER, **(LORA if lora else {}))
    dtype = torch.bfloat16 if half else torch.float32
    made = apply_kernels(Bench(base_of(ours), keys, torch.device("cuda"), dtype, 280, strict=True))
    assert made.counts["fused loss"] == 1
    if lora and family in ("llama", "mistral", "qwen2", "qwen3", "gemma"):
        assert made.counts["LoRA decoder layer"] == 2
    loss, gradients = run(ours, half)
    assert loss == pytest.approx(exact[0], rel=2e-2 if half else 2e-4)
    assert gradients.keys() == exact[1].keys()
    if half:
        plain = build(family, lora=lora).cuda()
        if lora:
            for parameter in plain.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
        _, others = run(plain, True)
    for name, gradient in exact[1].items():
        # In half precision no worse than plain transformers and PEFT are.
        limit = 1.5 * error(others[name], gradient) + 0.02 if half else 2e-3
        assert error(gradients[name], gradient) <= limit, name


def test_another_model_in_the_process_is_not_touched():
    plain = build("llama").cuda()
    before = run(plain, False)
    apply_kernels(
        Bench(
            build("llama").cuda(), KernelsSection(**LOSS, **LIGER), torch.device("cuda"), torch.float32, 280
        )
    )
    plain.zero_grad()
    after = run(plain, False)
    assert before[0] == after[0]
    assert isinstance(plain, AutoModelForCausalLM.from_config(CONFIGS["llama"]).__class__)
