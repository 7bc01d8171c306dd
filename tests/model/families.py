"""Tiny models of the families that kernels are chosen for."""

from __future__ import annotations

from typing import Any

import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 131
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 8}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, **HEAD, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, **HEAD),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, **HEAD),
    "gemma": GemmaConfig(**SIZES, **HEAD),
    "gemma2": Gemma2Config(**SIZES, **HEAD, query_pre_attn_scalar=8, final_logit_softcapping=2.0),
    "phi3": Phi3Config(**SIZES),
    "phi": PhiConfig(**SIZES, partial_rotary_factor=0.5),
    "granite": GraniteConfig(**SIZES, logits_scaling=3.0),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
}
LINEAR = r".*\.(q_proj|k_proj|v_proj|o_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj)"


def build(
    family: str, *, lora: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """A model with random weights that are large enough to matter; with LoRA, both of its matrices are."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[family], attn_implementation="eager" if family == "gemma2" else "sdpa"
    ).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        elif parameter.ndim == 2:
            parameter.data.mul_(3)
    if not lora:
        return model
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | options
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return adapted


def batch(rows: int = 2, length: int = 11, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token rows with a few labels masked."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=draw)
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}
