"""A run in miniature: rows of random tokens and a Llama of a few thousand weights."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl.config.resolve import Hardware
from axolotl.train.session import seed_everything

VOCAB = 4096
CPU = Hardware(device="cpu", gpu_names=(), bf16=False, tf32=False, cpus=1, gpu_memory_bytes=())


def rows(count: int, seed: int = 0, longest: int = 60) -> datasets.Dataset:
    """Rows of uneven length whose first third is masked."""
    draw = np.random.default_rng(seed)
    ids = [
        draw.integers(5, 200, n).tolist()
        for n in np.clip(draw.lognormal(3.0, 0.7, count), 4, longest).astype(int)
    ]
    labels = [[-100] * (len(each) // 3) + each[len(each) // 3 :] for each in ids]
    return datasets.Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids], "labels": labels}
    )


def tiny_model(*, lora: bool = False, dropout: float = 0.0, attention: str = "sdpa", seed: int = 42) -> Any:
    """A Llama with random weights, the same for the same seed."""
    seed_everything(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attention_dropout=dropout,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config)
    if not lora:
        return model
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=dropout,
            target_modules=["q_proj", "v_proj", "down_proj"],
            task_type="CAUSAL_LM",
        ),
    )


def losses(trainer: Any) -> list[float]:
    """The logged training losses."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the trained weights."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same numbers, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
