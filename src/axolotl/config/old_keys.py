"""Old spellings: what a key is called today, why another is gone, and leftovers that do no harm.

Each table maps an old key. Keys renamed quietly are spellings that people still write; the others get a warning.
"""

from __future__ import annotations

from typing import Any

# Another spelling of the same, no word lost about it.
ALIASES = {
    "type_of_model": "model_type",
    "model_revision": "revision_of_model",
    "model_config": "overrides_of_model_config",
    "model_kwargs": "overrides_of_model_kwargs",
}

# Called otherwise today.
RENAMED = {
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "dpo_beta": "rl_beta",
    "evaluation_strategy": "eval_strategy",
    "dataset_processes": "dataset_num_proc",
    "pretrain_multipack_buffer_size": "streaming_multipack_buffer_size",
    "sequence_parallel_degree": "context_parallel_size",
    "liger_swiglu": "liger_glu_activation",
    "flash_attn_cross_entropy_loss": "flash_attn_cross_entropy",
    "push_to_hub_model_id": "hub_model_id",
    "relora_steps": "jagged_restart_steps",
    "relora_warmup_steps": "jagged_restart_warmup_steps",
    "relora_anneal_steps": "jagged_restart_anneal_steps",
    "adam_eps": "adam_epsilon",
    "random_init_weights": "reinit_weights",
    "full_determinism": "deterministic",
    "sample_pack_sequentially": "sample_packing_sequentially",
}

# Booleans that choose one value of a new key; the first that is true wins.
CHOICES = {
    "xformers_attention": ("attn_implementation", "xformers"),
    "sage_attention": ("attn_implementation", "sage"),
    "flex_attention": ("attn_implementation", "flex_attention"),
    "flash_attention": ("attn_implementation", "flash_attention_2"),
    "sdp_attention": ("attn_implementation", "sdpa"),
    "eager_attention": ("attn_implementation", "eager"),
    "flash_attn_d512": ("large_head_attention", "triton_flash"),
    "gemma4_fp8_nonexpert": ("nonexpert_quantization", "fp8"),
    "gemma4_nf4_nonexpert": ("nonexpert_quantization", "nf4"),
    "use_scattermoe": ("expert_backend", "scattermoe"),
    "use_sonicmoe": ("expert_backend", "sonicmoe"),
}

# Gone: why, and what to write instead.
_TRL_GONE = "TRL has dropped this option. Delete the line."
_UNSLOTH = "These patches were dropped. Delete the line; `lora_mlp_kernel`, `lora_qkv_kernel` and `lora_o_kernel` are faster."
REMOVED = {
    "max_packed_sequence_len": "Set `sample_packing: true`; packed rows have `sequence_len` tokens.",
    "rope_scaling": "Write it under `overrides_of_model_config:` as `rope_scaling:`.",
    "dpo_use_logits_to_keep": _TRL_GONE,
    "dpo_generate_during_eval": _TRL_GONE,
    "dpo_norm_loss": _TRL_GONE,
    "rpo_alpha": "List `sft` among `dpo_loss_type` and give its weight in `dpo_loss_weights`.",
    "s2_attention": "Shifted sparse attention was dropped. Delete the line; `sample_packing` and a longer `sequence_len` serve.",
    "flash_attn_rms_norm": "Set `liger_rms_norm: true` instead.",
    "unsloth_cross_entropy_loss": "These patches were dropped. Set `cut_cross_entropy: true` instead.",
    "unsloth_lora_mlp": _UNSLOTH,
    "unsloth_lora_qkv": _UNSLOTH,
    "unsloth_lora_o": _UNSLOTH,
    "unsloth_rms_norm": "These patches were dropped. Set `liger_rms_norm: true` instead.",
    "unsloth_rope": "These patches were dropped. Set `liger_rope: true` instead.",
    "peft_adapter": "Adapters of this kind were dropped. Use `adapter: lora`.",
    "landmark_attention": "Landmark attention was dropped. Delete the line.",
    "xpos_rope": "This rotary embedding was dropped. Delete the line.",
    "wandb_api_key": "A config holds no such secret: set the environment variable WANDB_API_KEY, or run `wandb login`.",
    "load_4bit": "Set `load_in_4bit: true` and `adapter: qlora` instead.",
}

# Options of bitsandbytes that people write at the top level, as its own class names them.
BITSANDBYTES = (
    "bnb_4bit_use_double_quant",
    "bnb_4bit_quant_type",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
)

# Left over in old files, without effect there and here.
LEFTOVER = {
    "gptq_groupsize": "the GPTQ weights say so themselves",
    "gptq_model_v1": "the GPTQ weights say so themselves",
    "gptq_disable_exllama": "the GPTQ weights say so themselves",
    "torchdistx_path": "this package is gone",
    "flash_attn_fuse_qkv": "attention is fused where a kernel fits",
    "data_seed": "`seed` decides the order of the data too",
    "eval_max_new_tokens": "the evaluation generates no answers yet",
    "eval_table_max_new_tokens": "the evaluation generates no answers yet",
    "lora_out_dir": "the adapter is saved in `output_dir`",
    "sample_packing_seq_len_multiplier": "packed rows have `sequence_len` tokens",
    "log_sweep_min_lr": "the schedule `log_sweep` is gone",
    "log_sweep_max_lr": "the schedule `log_sweep` is gone",
    "is_multimodal": "`processor_type` says so",
    "base_model_ignore_patterns": "only the weights that are needed are downloaded",
    "debug": "use the flag `--debug` of `axolotl preprocess`",
    "is_preprocess": "the command decides that",
    "preprocess_iterable": "`streaming` decides that",
    "axolotl_config_path": "the command line decides that",
}

# Values that are called otherwise today.
VALUES = {"chat_template": ("inst", "mistral_v1")}

# Old sub-keys of fsdp_config.
FSDP_LEFTOVER = (
    "limit_all_gathers",
    "backward_prefetch",
    "backward_prefetch_policy",
    "forward_prefetch",
    "xla",
    "xla_fsdp_v2",
    "xla_fsdp_grad_ckpt",
)

# Old names inside blocks, and further forms of values; both are brought up to date before anything is checked.
FSDP_RENAMED = {
    "version": "fsdp_version",
    "cpu_offload": "offload_params",
    "sharding_strategy": "reshard_after_forward",
}
DATASET_RENAMED = {
    "message_field_role": "message_property_mappings",
    "message_field_content": "message_property_mappings",
    "train_on_split": "split",
}
OFFLOADING = ("offload", "offload_disk", "unsloth", "selective")
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

OLD_KEYS = frozenset(
    {*ALIASES, *RENAMED, *CHOICES, *REMOVED, *LEFTOVER, *BITSANDBYTES, "fsdp", "gc_steps", "save_safetensors"}
)


def is_off(value: Any) -> bool:
    """Whether a value says "not this": null, false, empty, or a mapping of nothing but null."""
    if isinstance(value, dict):
        return all(each is None or (isinstance(each, dict) and is_off(each)) for each in value.values())
    return value is None or value is False or value in ("", [])
