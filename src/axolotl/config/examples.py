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
    "accelerator_config": {"dispatch_batches": False},
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_beta3": 0.9999,
    "adam_epsilon": 1e-08,
    "adam_epsilon2": 1e-16,
    "adapter": "lora",
    "added_tokens_overrides": {128041: "<|im_start|>"},
    "additional_special_tokens": ["<think>", "</think>"],
    "attn_implementation": "flash_attention_2",
    "base_model": "NousResearch/Llama-3.2-1B",
    "base_model_config": "NousResearch/Llama-3.2-1B",
    "batch_size": 8,
    "bnb_config_kwargs": {"bnb_4bit_use_double_quant": True},
    "bos_token": "<s>",
    "chat_template": "chatml",
    "chat_template_jinja": "./template.jinja",
    "chat_template_kwargs": {"enable_thinking": False},
    "chunked_cross_entropy_num_chunks": 8,
    "cls_model_config": "AutoConfig",
    "comet_experiment_config": {"disabled": False},
    "comet_experiment_key": "abc123",
    "comet_mode": "create",
    "comet_project_name": "my-project",
    "comet_workspace": "my-team",
    "context_parallel_size": 2,
    "conversation": "chatml",
    "cosine_constant_lr_ratio": 0.8,
    "cosine_min_lr_ratio": 0.1,
    "data_files": ["train.jsonl"],
    "dataloader_num_workers": 4,
    "dataloader_prefetch_factor": 2,
    "dataset_num_proc": 8,
    "dataset_prepared_path": "last_run_prepared",
    "dataset_shard_idx": 0,
    "dataset_shard_num": 10,
    "datasets": [{"path": "data.jsonl", "type": "alpaca"}],
    "ddp_bucket_cap_mb": 25,
    "ddp_timeout": 7200,
    "deepspeed": "deepspeed_configs/zero2.json",
    "default_system_message": "You are a helpful assistant.",
    "device": "cuda",
    "device_map": "auto",
    "dp_replicate_size": 2,
    "dp_shard_size": 4,
    "ds_type": "json",
    "dynamic_checkpoint": {"enabled": True, "check_interval": 50},
    "early_stopping_patience": 3,
    "embedding_lr": 1e-05,
    "embedding_lr_scale": 0.5,
    "eos_token": "<|im_end|>",
    "eot_tokens": ["<|im_end|>"],
    "eval_batch_size": 2,
    "eval_sequence_len": 2048,
    "eval_steps": 100,
    "eval_table_size": 5,
    "evals_per_epoch": 4,
    "excess_length_strategy": "drop",
    "experts_implementation": "grouped_mm",
    "field": "text",
    "field_human": "human",
    "field_input": "input",
    "field_instruction": "instruction",
    "field_messages": "messages",
    "field_model": "model",
    "field_output": "output",
    "field_system": "system",
    "field_thinking": "reasoning_content",
    "field_tools": "tools",
    "fix_untrained_tokens": [128011],
    "flex_attn_compile_kwargs": {"dynamic": False},
    "format": "User: {instruction} {input}\nAssistant:",
    "fp32_norm_classes": ["RMSNorm"],
    "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "offload_params": False},
    "fsdp_version": 2,
    "gc_collect_steps": 100,
    "gpu_memory_limit": 20,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradio_server_port": 7860,
    "lm_eval_tasks": ["arc_easy", "hellaswag"],
    "lm_eval_model": "outputs/mine/merged",
    "gradio_title": "My model",
    "heads_k_stride": 1,
    "hub_model_id": "you/my-model",
    "hub_revision": "main",
    "input_format": "{input}",
    "input_transform": "chatml",
    "learning_rate": 0.0002,
    "length": 1000,
    "local_rank": 0,
    "loftq_config": {"loftq_bits": 4},
    "logging_steps": 1,
    "lora_alpha": 32,
    "lora_alpha_pattern": {"q_proj": 64},
    "lora_dropout": 0.05,
    "lora_exclude_modules": ["lm_head"],
    "lora_model_dir": "./outputs/my-run",
    "lora_modules_to_save": ["embed_tokens", "lm_head"],
    "lora_r": 16,
    "lora_rank_pattern": {"q_proj": 32},
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "lora_target_parameters": ["mlp.experts.gate_up_proj"],
    "loraplus_lr_ratio": 16,
    "loss_watchdog_patience": 3,
    "loss_watchdog_threshold": 5.0,
    "lr": 1e-05,
    "lr_div_factor": 25,
    "lr_groups": [{"name": "head", "modules": ["lm_head"], "lr": 1e-05}],
    "lr_scheduler": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "max_dropped_fraction": 0.1,
    "max_grad_norm": 1.0,
    "max_input_id": 32000,
    "max_memory": {0: "20GiB", "cpu": "60GiB"},
    "max_steps": 1000,
    "max_time": 3600,
    "spike_patience": 5,
    "generation_top_p": 0.9,
    "generation_top_k": 50,
    "message_field_training": "training",
    "message_field_training_detail": "train_detail",
    "message_property_mappings": {"role": "from", "content": "value"},
    "metric_for_best_model": "eval_loss",
    "micro_batch_size": 2,
    "min_input_id": 100,
    "min_num_params": 100000000,
    "min_sample_len": 10,
    "mixed_precision_policy": "bf16",
    "mlflow_experiment_name": "my-project",
    "mlflow_run_name": "my-run",
    "mlflow_tracking_uri": "http://localhost:5000",
    "model_type": "AutoModelForCausalLM",
    "modules": ["lm_head"],
    "name": "en",
    "neftune_noise_alpha": 5,
    "no_input_format": "User: {instruction}\nAssistant:",
    "num_dataset_shards_to_save": 4,
    "num_epochs": 3,
    "optim_args": {"betas": [0.9, 0.95]},
    "optimizer": "adamw_torch_fused",
    "output_dir": "./outputs/my-run",
    "overrides_of_model_config": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "overrides_of_model_kwargs": {"use_cache": False},
    "pad_to_multiple_of": 64,
    "pad_token": "<|end_of_text|>",
    "path": "data.jsonl",
    "peft": {"loftq_config": {"loftq_bits": 4}},
    "peft_layer_replication": [[0, 16], [8, 24]],
    "peft_layers_pattern": ["layers"],
    "peft_layers_to_transform": [0, 1, 2],
    "peft_trainable_token_indices": [128011],
    "plugins": ["axolotl.integrations.liger.LigerPlugin"],
    "preprocess_shards": 4,
    "pretraining_dataset": [{"path": "allenai/c4", "name": "en"}],
    "profiler_steps": 10,
    "push_dataset_to_hub": "you",
    "ray_run_name": "my-run",
    "resources_per_worker": {"GPU": 1},
    "resume_from_checkpoint": "./outputs/my-run/checkpoint-100",
    "revision": "main",
    "revision_of_model": "main",
    "ring_attn_func": "varlen_llama3",
    "roles": {"user": ["human"], "assistant": ["gpt"]},
    "roles_to_train": ["assistant"],
    "sample_packing_eff_est": 0.98,
    "sample_packing_mp_start_method": "spawn",
    "save_steps": 100,
    "save_strategy": "steps",
    "save_total_limit": 3,
    "saves_per_epoch": 1,
    "seed": 42,
    "sequence_len": 2048,
    "sequence_length": 2048,
    "shards": 10,
    "shards_idx": 0,
    "skip": 1000,
    "special_tokens": {"pad_token": "<|end_of_text|>"},
    "split": "train",
    "system_format": "{system}\n",
    "system_prompt": "You are a helpful assistant.",
    "template_thinking_key": "reasoning_content",
    "tensor_parallel_size": 2,
    "test_datasets": [{"path": "test.jsonl", "type": "alpaca"}],
    "tiled_mlp_num_shards": 8,
    "tokenizer_config": "NousResearch/Llama-3.2-1B",
    "tokenizer_type": "AutoTokenizer",
    "tokens": ["<think>", "</think>"],
    "torch_compile_backend": "inductor",
    "torch_compile_options": {"max_autotune_gemm": True},
    "torch_empty_cache_steps": 50,
    "total_num_tokens": 1000000,
    "total_supervised_tokens": 500000,
    "trackio_project_name": "my-project",
    "trackio_run_name": "my-run",
    "trackio_space_id": "you/trackio",
    "train_on_eos": "turn",
    "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "trigger_file_path": "save_now",
    "type": "chat_template",
    "unfrozen_parameters": ["^lm_head.weight$", "model.layers.2[0-9]+.mlp"],
    "unk_token": "<unk>",
    "val_set_size": 0.05,
    "wandb_entity": "my-team",
    "wandb_log_model": "checkpoint",
    "wandb_mode": "offline",
    "wandb_name": "my-run",
    "wandb_project": "my-project",
    "wandb_run_id": "abc123",
    "wandb_watch": "gradients",
    "warmup_ratio": 0.1,
    "warmup_steps": 10,
    "weight": 2,
    "weight_decay": 0.01,
    "world_size": 8,
    "model_quantization_config_kwargs": {"dequantize": True},
    "quantization": {"weight_dtype": "int8"},
    "vllm": {"gpu_memory_utilization": 0.85},
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
