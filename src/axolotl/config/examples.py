"""Usual values of keys, for remedies, `explain` and the docs."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from axolotl.config.keys import field_at
from axolotl.config.section import default_of, members
from axolotl.config.yaml_file import Path as KeyPath
from axolotl.config.yaml_file import scalar

EXAMPLES: dict[str, Any] = {
    "adapter": "lora",
    "attn_implementation": "flash_attention_2",
    "base_model": "NousResearch/Llama-3.2-1B",
    "bnb_config_kwargs": {"bnb_4bit_use_double_quant": True},
    "chat_template": "chatml",
    "chat_template_jinja": "./template.jinja",
    "chat_template_kwargs": {"enable_thinking": False},
    "context_parallel_size": 2,
    "data_files": ["train.jsonl"],
    "dataset_prepared_path": "last_run_prepared",
    "datasets": [{"path": "data.jsonl", "type": "alpaca"}],
    "deepspeed": "deepspeed_configs/zero2.json",
    "ds_type": "json",
    "early_stopping_patience": 3,
    "embedding_lr_scale": 0.5,
    "eot_tokens": ["<|im_end|>"],
    "eval_steps": 100,
    "evals_per_epoch": 4,
    "excess_length_strategy": "drop",
    "field_messages": "messages",
    "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "offload_params": False},
    "fsdp_version": 2,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "hub_model_id": "you/my-model",
    "learning_rate": 0.0002,
    "logging_steps": 1,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_model_dir": "./outputs/my-run",
    "lora_modules_to_save": ["embed_tokens", "lm_head"],
    "lora_r": 16,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "loraplus_lr_ratio": 16,
    "lr_scheduler": "cosine",
    "max_grad_norm": 1.0,
    "max_steps": 1000,
    "message_property_mappings": {"role": "from", "content": "value"},
    "micro_batch_size": 2,
    "model_type": "AutoModelForCausalLM",
    "neftune_noise_alpha": 5,
    "num_epochs": 3,
    "optimizer": "adamw_torch_fused",
    "output_dir": "./outputs/my-run",
    "overrides_of_model_config": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "path": "data.jsonl",
    "plugins": ["axolotl.integrations.liger.LigerPlugin"],
    "resume_from_checkpoint": "./outputs/my-run/checkpoint-100",
    "roles": {"user": ["human"], "assistant": ["gpt"]},
    "roles_to_train": ["assistant"],
    "save_steps": 100,
    "save_strategy": "steps",
    "save_total_limit": 3,
    "saves_per_epoch": 1,
    "seed": 42,
    "sequence_len": 2048,
    "special_tokens": {"pad_token": "<|end_of_text|>"},
    "split": "train",
    "test_datasets": [{"path": "test.jsonl", "type": "alpaca"}],
    "tokenizer_type": "AutoTokenizer",
    "tokens": ["<think>", "</think>"],
    "train_on_eos": "turn",
    "type": "chat_template",
    "unfrozen_parameters": ["^lm_head.weight$", "model.layers.2[0-9]+.mlp"],
    "val_set_size": 0.05,
    "wandb_project": "my-project",
    "warmup_ratio": 0.1,
    "warmup_steps": 10,
    "weight_decay": 0.01,
}


def example(model: type[BaseModel], path: KeyPath) -> str:
    """A usual value of the key at a path, as YAML on one line; empty where nothing sensible is known."""
    key = str(path[-1])
    value: Any = EXAMPLES.get(key)
    known = field_at(model, path)
    if value is None and known:
        kinds = members(known[0])
        choices = [a for k in kinds if get_origin(k) is Literal for a in get_args(k)]
        default = default_of(model, key) if len(path) == 1 else None
        if bool in kinds:
            value = True
        elif choices:
            value = choices[0]
        elif isinstance(default, str | int | float) and default != "":
            value = default
    return "" if value is None else in_yaml(value)


def in_yaml(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {in_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(in_yaml, value)) + "]"
    if value is None:
        return "null"
    if isinstance(value, str):
        plain = (
            isinstance(scalar(value), str)
            and not any(c in value for c in "[]{},:#&*!|>'\"%@`\n")
            and value.strip() == value
        )
        return value if plain else json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) and value < 1e-4 else str(value)
