"""Adapters as training leaves them, made without training: shared by the tests of weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from axolotl.config.adapter import AdapterSection
from axolotl.config.model import ModelSection
from axolotl.model.adapter import add_adapter
from axolotl.model.load import load_model
from axolotl.model.tokenizer import load_tokenizer, new_token_ids

FIXTURES = Path(__file__).parent / "fixtures"
LLAMA, CHATML = str(FIXTURES / "tiny-llama3"), str(FIXTURES / "tiny-chatml")
CPU: Any = SimpleNamespace(device="cpu", bf16=False, tf32=False, cpus=1)


def lora(**keys: Any) -> AdapterSection:
    base = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8}
    if "lora_target_modules" not in keys:
        base["lora_target_linear"] = True
    return AdapterSection.model_validate(base | keys)


def section(base: str, **keys: Any) -> ModelSection:
    return ModelSection.model_validate({"base_model": base, **keys})


def train(
    folder: Path, base: str, adapter: AdapterSection, template: str = "{{ messages }}", **keys: Any
) -> Path:
    """An adapter as training leaves it: weights that are not at their start, with tokenizer and chat template."""
    model_section = section(base, **keys)
    tokenizer = load_tokenizer(model_section)
    model = load_model(model_section, adapter, tokenizer, CPU, training=True)
    peft_model = add_adapter(model, adapter, new_tokens=new_token_ids(tokenizer), seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    peft_model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
