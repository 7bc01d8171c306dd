"""Each rule: a config that breaks it is told with the keys' places and a remedy; a sound config breaks none."""

from __future__ import annotations

from pathlib import Path

import pytest

from axolotl.config import load_config
from axolotl.config.descriptions import state
from axolotl.config.keys import owner
from axolotl.config.old_keys import CHOICES, RENAMED
from axolotl.config.rules import RULES
from axolotl.errors import ConfigError, Problem

BASE = {
    "base_model": "base_model: x",
    "datasets": "datasets: [{path: a, type: alpaca}]",
    "learning_rate": "learning_rate: 1e-4",
}
LORA = "adapter: lora\nlora_r: 8\nlora_alpha: 8\nlora_target_linear: true"

# Rule, what is written beside (or instead of) the base, kind, keys of the problem.
BROKEN = [
    ("base_model_is_there", "base_model:", "missing", "base_model"),
    ("datasets_are_there", "datasets:", "missing", "datasets"),
    ("datasets_are_there", "datasets: []", "missing", "datasets"),
    ("every_dataset_has_a_path", "datasets: [{type: alpaca}]", "missing", "datasets[0].path"),
    (
        "one_source_of_evaluation",
        "val_set_size: 0.1\ntest_datasets: [{path: b}]",
        "conflict",
        "val_set_size test_datasets",
    ),
    ("val_set_size_leaves_rows", "val_set_size: 1", "invalid_value", "val_set_size"),
    ("val_set_size_leaves_rows", "val_set_size: 2.5", "invalid_value", "val_set_size"),
    (
        "a_stream_needs_its_steps",
        "datasets:\npretraining_dataset: a",
        "missing",
        "pretraining_dataset max_steps",
    ),
    ("a_stream_needs_its_steps", "streaming: true", "missing", "streaming max_steps"),
    (
        "a_stream_holds_no_rows_out",
        "streaming: true\nmax_steps: 5\nval_set_size: 0.1",
        "warning",
        "val_set_size streaming",
    ),
    (
        "evaluation_needs_rows",
        "streaming: true\nmax_steps: 5\nval_set_size: 0.1\neval_steps: 2",
        "warning",
        "eval_steps val_set_size",
    ),
    (
        "the_best_needs_evaluation",
        "streaming: true\nmax_steps: 5\nval_set_size: 0.1\neval_steps: 2\nearly_stopping_patience: 3",
        "conflict",
        "early_stopping_patience val_set_size",
    ),
    (
        "one_kind_of_training_data",
        "pretraining_dataset: b\nmax_steps: 5",
        "conflict",
        "pretraining_dataset datasets",
    ),
    (
        "every_corpus_has_a_path",
        "datasets:\npretraining_dataset: {skip: 3}\nmax_steps: 5",
        "missing",
        "pretraining_dataset[0].path",
    ),
    (
        "a_stream_is_never_whole",
        "streaming: true\nmax_steps: 5\ndataset_exact_deduplication: true",
        "conflict",
        "dataset_exact_deduplication streaming",
    ),
    (
        "pretraining_keys_need_a_corpus",
        "pretrain_multipack_attn: false",
        "warning",
        "pretrain_multipack_attn",
    ),
    ("jinja_needs_its_text", "chat_template: jinja", "missing", "chat_template"),
    (
        "jinja_needs_its_text",
        "datasets: [{path: a, chat_template: jinja}]",
        "missing",
        "datasets[0].chat_template",
    ),
    (
        "a_template_has_one_source",
        "chat_template: chatml\nchat_template_jinja: t.jinja",
        "warning",
        "chat_template_jinja chat_template",
    ),
    (
        "a_template_has_one_source",
        "chat_template: tokenizer_default\nchat_template_jinja: t.jinja",
        "warning",
        "chat_template_jinja chat_template",
    ),
    (
        "shards_are_counted_from_zero",
        "datasets: [{path: a, shards_idx: 1}]",
        "conflict",
        "datasets[0].shards_idx",
    ),
    (
        "shards_are_counted_from_zero",
        "datasets: [{path: a, shards: 2, shards_idx: 2}]",
        "invalid_value",
        "datasets[0].shards_idx",
    ),
    (
        "shards_are_counted_from_zero",
        "dataset_shard_num: 2\ndataset_shard_idx: 5",
        "invalid_value",
        "dataset_shard_idx",
    ),
    ("rows_fit_between_the_limits", "min_sample_len: 600", "conflict", "min_sample_len"),
    (
        "one_way_of_joining_rows",
        "sample_packing: true\nbatch_flattening: true",
        "conflict",
        "batch_flattening sample_packing",
    ),
    (
        "packed_rows_have_one_length",
        "sample_packing: true\ngroup_by_length: true",
        "warning",
        "group_by_length",
    ),
    (
        "one_order_of_rows",
        "curriculum_sampling: true\ngroup_by_length: true",
        "warning",
        "group_by_length curriculum_sampling",
    ),
    (
        "conversation_keys_need_conversations",
        "datasets: [{path: a, type: 'alpaca:chat', roles_to_train: [x]}]",
        "warning",
        "datasets[0].roles_to_train",
    ),
    (
        "a_dataset_is_listed_once",
        "datasets: [{path: a}, {path: b}, {path: a}]",
        "warning",
        "datasets[2] datasets[0]",
    ),
    ("learning_rate_is_there", "learning_rate:", "missing", "learning_rate"),
    (
        "a_step_has_one_size",
        "batch_size: 4\ngradient_accumulation_steps: 4",
        "conflict",
        "batch_size gradient_accumulation_steps",
    ),
    ("a_step_has_one_size", "batch_size: 1\nmicro_batch_size: 2", "conflict", "batch_size micro_batch_size"),
    ("a_step_has_one_size", "batch_size: 5\nmicro_batch_size: 2", "warning", "batch_size"),
    ("a_step_has_one_size", "batch_size: 4\nmicro_batch_size: 2", "warning", "batch_size"),
    (
        "loading_ahead_needs_workers",
        "dataloader_prefetch_factor: 2\ndataloader_num_workers: 0",
        "conflict",
        "dataloader_prefetch_factor",
    ),
    (
        "loading_ahead_needs_workers",
        "dataloader_prefetch_factor: 2",
        "conflict",
        "dataloader_prefetch_factor",
    ),
    ("one_length_of_warmup", "warmup_steps: 3\nwarmup_ratio: 0.1", "conflict", "warmup_steps warmup_ratio"),
    (
        "one_learning_rate_of_embeddings",
        "embedding_lr: 1\nembedding_lr_scale: 1",
        "warning",
        "embedding_lr embedding_lr_scale",
    ),
    (
        "groups_have_names_of_their_own",
        "lr_groups: [{name: a, modules: [q_proj], lr: 1e-4}, {name: a, modules: [v_proj], lr: 1e-5}]",
        "conflict",
        "lr_groups[1].name lr_groups[0].name",
    ),
    ("optim_args_are_pairs", "optim_args: fused", "invalid_value", "optim_args"),
    (
        "a_constant_end_needs_its_height",
        "cosine_constant_lr_ratio: 0.1",
        "conflict",
        "cosine_constant_lr_ratio",
    ),
    (
        "one_rhythm_of_evaluation",
        "val_set_size: 9\neval_steps: 2\nevals_per_epoch: 2",
        "conflict",
        "evals_per_epoch eval_steps",
    ),
    (
        "one_rhythm_of_evaluation",
        "val_set_size: 9\neval_steps: 2\neval_strategy: epoch",
        "conflict",
        "eval_steps eval_strategy",
    ),
    (
        "one_rhythm_of_evaluation",
        "val_set_size: 9\nevals_per_epoch: 2\neval_strategy: epoch",
        "conflict",
        "evals_per_epoch eval_strategy",
    ),
    ("samples_come_with_evaluations", "generate_samples: true", "conflict", "generate_samples"),
    (
        "sharded_states_save_themselves",
        "save_async: true\nfsdp_version: 2\nfsdp_config:\n  reshard_after_forward: true",
        "unavailable",
        "save_async",
    ),
    ("one_rhythm_of_saving", "save_steps: 2\nsaves_per_epoch: 2", "conflict", "saves_per_epoch save_steps"),
    ("one_rhythm_of_saving", "save_steps: 2\nsave_strategy: epoch", "conflict", "save_steps save_strategy"),
    (
        "one_rhythm_of_saving",
        "saves_per_epoch: 2\nsave_strategy: no",
        "warning",
        "save_strategy saves_per_epoch",
    ),
    ("evaluation_needs_rows", "evals_per_epoch: 4", "warning", "evals_per_epoch"),
    ("evaluation_needs_rows", "eval_steps: 4", "warning", "eval_steps"),
    ("evaluation_needs_rows", "eval_strategy: epoch", "warning", "eval_strategy"),
    ("evaluation_needs_rows", "eval_steps: 4\nval_set_size: 0", "conflict", "eval_steps val_set_size"),
    (
        "evaluation_needs_rows",
        "eval_strategy: epoch\nval_set_size: 0",
        "conflict",
        "eval_strategy val_set_size",
    ),
    ("the_best_needs_evaluation", "early_stopping_patience: 4", "conflict", "early_stopping_patience"),
    (
        "the_best_needs_evaluation",
        "load_best_model_at_end: true\nval_set_size: 9",
        "conflict",
        "load_best_model_at_end",
    ),
    (
        "the_best_needs_evaluation",
        "early_stopping_patience: 1\nval_set_size: 9\neval_steps: 10\nsave_steps: 15",
        "conflict",
        "save_steps eval_steps early_stopping_patience",
    ),
    ("the_best_needs_evaluation", "save_strategy: best", "missing", "save_strategy"),
    (
        "uploads_follow_saving",
        "hub_model_id: a/b\nhub_strategy: checkpoint\nsave_strategy: no",
        "warning",
        "hub_strategy save_strategy",
    ),
    ("uploads_follow_saving", "hub_strategy: end", "warning", "hub_strategy"),
    (
        "one_checkpoint_to_resume",
        "resume_from_checkpoint: a\nauto_resume_from_checkpoints: true",
        "warning",
        "resume_from_checkpoint auto_resume_from_checkpoints",
    ),
    (
        "resuming_needs_the_state",
        "save_only_model: true\nauto_resume_from_checkpoints: true",
        "warning",
        "save_only_model auto_resume_from_checkpoints",
    ),
    ("the_watchdog_needs_a_threshold", "loss_watchdog_patience: 3", "warning", "loss_watchdog_patience"),
    (
        "one_width_of_weights",
        LORA + "\nload_in_4bit: true\nload_in_8bit: true",
        "conflict",
        "load_in_8bit load_in_4bit",
    ),
    (
        "weights_are_quantised_once",
        LORA + "\ngptq: true\nload_in_8bit: true",
        "conflict",
        "gptq load_in_8bit",
    ),
    (
        "arguments_of_a_scheme",
        LORA + "\nmodel_quantization_config_kwargs: {dequantize: true}",
        "conflict",
        "model_quantization_config_kwargs",
    ),
    ("quantised_weights_need_an_adapter", "load_in_8bit: true", "conflict", "load_in_8bit"),
    ("quantised_weights_need_an_adapter", "load_in_4bit: true\nadapter:", "conflict", "load_in_4bit adapter"),
    ("qlora_trains_on_4_bits", LORA.replace("lora\n", "qlora\n", 1), "conflict", "adapter"),
    (
        "qlora_trains_on_4_bits",
        LORA.replace("lora\n", "qlora\n", 1) + "\nload_in_8bit: true",
        "conflict",
        "adapter load_in_8bit",
    ),
    ("lora_has_a_size", "adapter: lora\nlora_alpha: 8\nlora_target_linear: true", "missing", "adapter"),
    ("lora_has_a_size", "adapter: lora\nlora_r: 8\nlora_target_linear: true", "missing", "adapter"),
    (
        "lora_has_targets",
        "adapter: lora\nlora_r: 8\nlora_alpha: 8\nlora_target_linear: false",
        "missing",
        "lora_target_linear adapter",
    ),
    ("lora_keys_need_an_adapter", "lora_r: 8", "warning", "lora_r"),
    (
        "lora_keys_need_an_adapter",
        "lora_dropout: 0.1\npeft_use_dora: true",
        "warning",
        "lora_dropout peft_use_dora",
    ),
    ("lora_keys_need_an_adapter", "merge_lora: true", "warning", "merge_lora"),
    (
        "a_saved_adapter_keeps_its_shape",
        LORA + "\nlora_model_dir: out",
        "warning",
        "lora_r lora_alpha lora_target_linear lora_model_dir",
    ),
    (
        "the_rate_of_adapted_embeddings_needs_its_ratio",
        LORA + "\nloraplus_lr_embedding: 1e-5",
        "warning",
        "loraplus_lr_embedding",
    ),
    (
        "an_adapter_freezes_the_rest",
        LORA + "\nunfrozen_parameters: [lm_head]",
        "warning",
        "unfrozen_parameters adapter",
    ),
    ("limits_of_memory_need_a_map", "max_memory: {0: 10GiB}", "warning", "max_memory"),
    ("limits_of_memory_need_a_map", "gpu_memory_limit: 10", "warning", "gpu_memory_limit"),
    (
        "synthetic_keys_need_synthetic_rows",
        "datasets: [{path: a, type: alpaca, sequence_length: 8}]",
        "warning",
        "datasets[0].sequence_length",
    ),
    (
        "target_patterns_are_valid",
        LORA + "\nlora_target_modules: '(q|k_proj'",
        "invalid_value",
        "lora_target_modules",
    ),
    (
        "adapted_parameters_have_no_dropout",
        LORA + "\nlora_target_parameters: [w]\nlora_dropout: 0.1",
        "conflict",
        "lora_dropout lora_target_parameters",
    ),
    (
        "one_way_of_grouping_parameters",
        LORA + "\nloraplus_lr_ratio: 2\nlr_groups: [{name: a, modules: [b], lr: 1}]",
        "conflict",
        "lr_groups loraplus_lr_ratio",
    ),
    (
        "an_adapter_chooses_its_layers_once",
        LORA + "\npeft_layers_to_transform: [1]\nunfrozen_parameters: [a]",
        "conflict",
        "peft_layers_to_transform unfrozen_parameters",
    ),
    (
        "a_layers_pattern_needs_layers",
        LORA + "\npeft_layers_pattern: [layers]",
        "conflict",
        "peft_layers_pattern",
    ),
    (
        "fused_layers_cannot_be_adapted",
        LORA + "\nflash_attn_fuse_mlp: true",
        "conflict",
        "flash_attn_fuse_mlp adapter",
    ),
    ("lora_kernels_have_limits", "lora_mlp_kernel: true", "warning", "lora_mlp_kernel"),
    (
        "lora_kernels_have_limits",
        LORA + "\nload_in_8bit: true\nlora_o_kernel: true",
        "warning",
        "lora_o_kernel load_in_8bit",
    ),
    (
        "mended_tokens_are_trained",
        LORA + "\nfix_untrained_tokens: 3\npeft_trainable_token_indices: [4]",
        "warning",
        "fix_untrained_tokens peft_trainable_token_indices",
    ),
    ("bnb_options_need_bnb", "bnb_config_kwargs: {a: 1}", "warning", "bnb_config_kwargs"),
    (
        "random_weights_are_trained_in_full",
        LORA + "\nreinit_weights: true",
        "warning",
        "reinit_weights adapter",
    ),
    (
        "frozen_weights_need_new_checkpointing",
        "unfrozen_parameters: [a]\ngradient_checkpointing: true\ngradient_checkpointing_kwargs: {use_reentrant: true}",
        "conflict",
        "gradient_checkpointing_kwargs.use_reentrant unfrozen_parameters",
    ),
    ("one_precision", "bf16: true\nfp16: true", "conflict", "bf16 fp16"),
    ("one_precision", "float32: true\nfloat16: true", "conflict", "float16 float32"),
    ("attention_is_known", "attn_implementation: flash", "invalid_value", "attn_implementation"),
    ("attention_is_known", "attn_implementation: sage", "unavailable", "attn_implementation"),
    ("flex_options_need_flex", "flex_attn_compile_kwargs: {a: 1}", "warning", "flex_attn_compile_kwargs"),
    (
        "one_cross_entropy",
        "liger_cross_entropy: true\ncut_cross_entropy: true",
        "conflict",
        "cut_cross_entropy liger_cross_entropy",
    ),
    (
        "attention_kernel_is_for_packed_rows",
        "attn_kernel: padded\nattn_implementation: sdpa\nsample_packing: true",
        "conflict",
        "attn_kernel attn_implementation",
    ),
    ("attention_kernel_is_for_packed_rows", "attn_kernel: auto", "warning", "attn_kernel"),
    ("eight_bit_base_is_for_lora", "lora_fp8_base: true", "conflict", "lora_fp8_base adapter"),
    (
        "eight_bit_base_is_for_lora",
        LORA + "\nload_in_8bit: true\nlora_fp8_base: true",
        "conflict",
        "lora_fp8_base load_in_8bit",
    ),
    (
        "chunks_need_chunking",
        "chunked_cross_entropy_num_chunks: 3",
        "warning",
        "chunked_cross_entropy_num_chunks",
    ),
    (
        "tiles_and_fused_activations",
        "tiled_mlp: true\nliger_glu_activation: true\ntiled_mlp_use_original_mlp: false",
        "conflict",
        "tiled_mlp liger_glu_activation tiled_mlp_use_original_mlp",
    ),
    ("compile_options_need_compiling", "torch_compile_options: {a: 1}", "conflict", "torch_compile_options"),
    (
        "compile_options_need_compiling",
        "torch_compile: true\ntorch_compile_options: {a: 1}\ntorch_compile_mode: default",
        "conflict",
        "torch_compile_options torch_compile_mode",
    ),
    (
        "checkpointing_options_need_checkpointing",
        "gradient_checkpointing_kwargs: {use_reentrant: false}",
        "warning",
        "gradient_checkpointing_kwargs",
    ),
    ("offloading_needs_checkpointing", "activation_offloading: true", "conflict", "activation_offloading"),
    (
        "offloading_needs_checkpointing",
        "selective_checkpointing: true",
        "conflict",
        "selective_checkpointing",
    ),
    (
        "checkpoints_of_pytorch_know_only_whole_layers",
        "gradient_checkpointing: 3\ngradient_checkpointing_kwargs: {use_reentrant: true}",
        "warning",
        "gradient_checkpointing_kwargs.use_reentrant",
    ),
    (
        "checkpoints_of_pytorch_know_only_whole_layers",
        "gradient_checkpointing: true\nactivation_offloading: disk\ngradient_checkpointing_kwargs: {debug: true}",
        "warning",
        "gradient_checkpointing_kwargs.debug",
    ),
    (
        "what_can_be_kept_is_named",
        "gradient_checkpointing: true\nselective_checkpointing: {save: []}",
        "conflict",
        "selective_checkpointing.save",
    ),
    (
        "what_can_be_kept_is_named",
        "gradient_checkpointing: true\nselective_checkpointing: {save: [mlp.down_proj]}",
        "conflict",
        "selective_checkpointing.save",
    ),
    (
        "eight_bit_products_are_for_whole_models",
        LORA + "\nfp8: true\ntorch_compile: true",
        "conflict",
        "fp8 adapter",
    ),
    (
        "eight_bit_products_are_for_whole_models",
        "fp8: true\nfp16: true\nbf16: false\ntorch_compile: true",
        "conflict",
        "fp8 fp16",
    ),
    ("eight_bit_products_want_compiling", "fp8: true", "warning", "fp8 torch_compile"),
    (
        "rows_are_not_known_to_fsdp",
        "unfrozen_parameters: [lm_head, 'embed_tokens.weight[2:]']\nfsdp_version: 2\nfsdp_config: {offload_params: false}",
        "conflict",
        "unfrozen_parameters fsdp_config",
    ),
    ("tiles_need_tiling", "tiled_mlp_num_shards: 4", "warning", "tiled_mlp_num_shards"),
    ("float32_norms_are_a_matter_of_fsdp", "fp32_norms: true", "conflict", "fp32_norms"),
    ("float32_norms_are_a_matter_of_fsdp", "fp32_norm_classes: [a]", "warning", "fp32_norm_classes"),
    (
        "one_way_of_sharding",
        "deepspeed: a.json\nfsdp_config: {offload_params: true}",
        "conflict",
        "deepspeed fsdp_config",
    ),
    ("one_way_of_sharding", "deepspeed: a.json\nfsdp: [full_shard]", "conflict", "deepspeed fsdp_config"),
    ("ray_has_to_be_asked_for", "ray_num_workers: 2", "warning", "ray_num_workers"),
    ("deepcompile_needs_deepspeed", "deepcompile: true", "conflict", "deepcompile"),
    ("shards_of_whom", "dp_shard_size: 2", "conflict", "dp_shard_size"),
    ("shards_of_whom", "dp_shard_size: 2\ndeepspeed: z.json", "conflict", "dp_shard_size deepspeed"),
    ("shards_of_whom", "dp_shard_size: -3\nfsdp_config: {}", "conflict", "dp_shard_size"),
    ("one_version_of_fsdp", "fsdp_version: 2", "warning", "fsdp_version"),
    (
        "one_version_of_fsdp",
        "fsdp_version: 2\nfsdp_config: {version: 1}",
        "conflict",
        "fsdp_version fsdp_config.version",
    ),
    (
        "one_version_of_fsdp",
        "fsdp_version: 1\nfsdp_config: {offload_params: true}",
        "warning",
        "fsdp_version fsdp_config",
    ),
    (
        "fsdp_options_fit_together",
        "fsdp_config: {auto_wrap_policy: SIZE_BASED_WRAP}",
        "missing",
        "fsdp_config.auto_wrap_policy",
    ),
    (
        "fsdp_options_fit_together",
        "fsdp_config: {cpu_offload_pin_memory: false}",
        "conflict",
        "fsdp_config.cpu_offload_pin_memory",
    ),
    (
        "the_optimizer_can_be_sharded",
        "optimizer: adamw_8bit\nfsdp_version: 2\nfsdp_config: {offload_params: true}",
        "conflict",
        "optimizer fsdp_config",
    ),
    (
        "the_optimizer_can_be_sharded",
        "optimizer: adamw_8bit\nfsdp_version: 1\nfsdp_config: {offload_params: true}",
        "conflict",
        "optimizer fsdp_config",
    ),
    (
        "the_optimizer_can_be_sharded",
        "optimizer: adafactor\nfsdp_version: 2\nfsdp_config: {offload_params: true}",
        "conflict",
        "optimizer fsdp_config",
    ),
    (
        "fsdp_options_fit_together",
        "fsdp_config: {mixed_precision_policy: int8}",
        "invalid_value",
        "fsdp_config.mixed_precision_policy",
    ),
    (
        "fsdp_options_fit_together",
        "fsdp_config: {state_dict_type: LOCAL_STATE_DICT}",
        "warning",
        "fsdp_config.state_dict_type",
    ),
    ("the_optimizer_can_be_sharded", "optimizer: muon\ndeepspeed: a.json", "conflict", "optimizer deepspeed"),
    (
        "the_optimizer_takes_parts_of_matrices",
        "optimizer: paged_adamw_8bit\ntensor_parallel_size: 2",
        "conflict",
        "optimizer tensor_parallel_size",
    ),
    (
        "what_shares_no_products",
        "deepspeed: a.json\ntensor_parallel_size: 2",
        "conflict",
        "tensor_parallel_size deepspeed",
    ),
    (
        "what_shares_no_products",
        "adapter: qlora\nload_in_4bit: true\ntensor_parallel_size: 2",
        "conflict",
        "tensor_parallel_size load_in_4bit",
    ),
    (
        "what_shares_no_products",
        "torch_compile: true\ntensor_parallel_size: 2",
        "conflict",
        "tensor_parallel_size torch_compile",
    ),
    (
        "shared_rows_have_limits",
        "context_parallel_size: 2\nsample_packing: true\nmicro_batch_size: 2",
        "conflict",
        "micro_batch_size context_parallel_size",
    ),
    (
        "shared_rows_have_limits",
        "sequence_parallel_degree: 2\nsdp_attention: true",
        "conflict",
        "sdp_attention sequence_parallel_degree",
    ),
    (
        "who_can_share_rows",
        "context_parallel_size: 2\ndeepspeed: z.json",
        "conflict",
        "context_parallel_size deepspeed",
    ),
    (
        "one_limit_of_memory",
        "max_memory: {0: 20GiB}\ngpu_memory_limit: 20",
        "conflict",
        "max_memory gpu_memory_limit",
    ),
    ("plugins_are_known", "plugins: [axolotl.integrations.ligr.LigerPlugin]", "invalid_value", "plugins[0]"),
]


def load(text: str, folder: Path) -> list[Problem]:
    """All problems of a text and the base lines that it does not replace, warnings among them."""
    lines = [
        line
        for key, line in BASE.items()
        if not any(each.startswith(f"{key}:") for each in text.splitlines())
    ]
    file = folder / "c.yml"
    file.write_text("\n".join([*lines, text]) + "\n", encoding="utf-8")
    try:
        return list(load_config(file).warnings)
    except ConfigError as error:
        return list(error.problems)


@pytest.mark.parametrize(
    ("name", "text", "kind", "keys"), BROKEN, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(BROKEN)]
)
def test_a_broken_rule_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, kind: str, keys: str
) -> None:
    with_rule = load(text, tmp_path)
    [rule] = [each for each in RULES if each.name == name]
    monkeypatch.setattr("axolotl.config.rules.rulebook.RULES", [each for each in RULES if each is not rule])
    found = [p for p in with_rule if p not in load(text, tmp_path)]
    assert found, "nothing is told that is not told without the rule as well"
    problem = found[0]
    assert problem.kind == kind
    assert set(keys.split()) <= set(problem.keys)
    today = RENAMED | {old: new for old, (new, _) in CHOICES.items()}
    assert {today.get(k, k) for k in (key.split(".")[0].split("[")[0] for key in problem.keys)} <= set(
        rule.keys
    ) | {
        "streaming",
        "pretraining_dataset",
    }
    written = [key for key in problem.keys if f"{key.split('[')[0].split('.')[0]}:" in text]
    assert len(problem.places) >= min(len(written), 1)
    assert problem.remedy or kind == "warning"
    assert problem.message.count("`") >= 2


def test_every_rule_is_tested_and_says_what_it_protects() -> None:
    assert {rule.name for rule in RULES} == {name for name, *_ in BROKEN}
    assert all(rule.doc and rule.keys for rule in RULES)


@pytest.mark.parametrize(
    "text",
    [
        "",
        LORA,
        LORA + "\nload_in_8bit: true\nlora_dropout: 0.1\nunfrozen_parameters: []",
        LORA.replace("lora\n", "qlora\n", 1)
        + "\nload_in_4bit: true\nlora_qkv_kernel: true\nbnb_config_kwargs: {a: 1}",
        "adapter: lora\nlora_model_dir: out",
        "val_set_size: 0.1\nevals_per_epoch: 4\nsaves_per_epoch: 1\nwarmup_ratio: 0.1\nwarmup_steps: 0",
        "val_set_size: 50\neval_steps: 10\nsave_steps: 20\nearly_stopping_patience: 2\nload_best_model_at_end: true",
        "test_datasets: [{path: b, type: alpaca}]\nval_set_size: 0\neval_strategy: epoch\nsave_strategy: epoch",
        "num_epochs: 3\nmax_steps: 10\nbf16: auto\nfp16: false\ntf32: true\nsdp_attention: true\nsample_packing: true",
        "gradient_checkpointing: true\ngradient_checkpointing_kwargs: {use_reentrant: false}\nactivation_offloading: true",
        "fsdp_version: 2\nfsdp_config: {offload_params: true, cpu_offload_pin_memory: false}\nfp32_norms: true",
        "plugins: [axolotl.integrations.liger.LigerPlugin]\nliger_fused_linear_cross_entropy: true",
        "attn_implementation: kernels-community/flash-attn3\ncontext_parallel_size: 2\nsample_packing: true",
        "chat_template: jinja\nchat_template_jinja: t.jinja\ndatasets: [{path: a, type: chat_template, chat_template: jinja}]",
        "optimizer: muon\nadam_beta1: 0.9\noptim_args: a=1,b=2\nlr_scheduler: rex\ncosine_min_lr_ratio: 0.1",
    ],
)
def test_a_sound_config_breaks_no_rule(tmp_path: Path, text: str) -> None:
    # A key without effect is told by its field, not by a rule.
    found = [p for p in load(text, tmp_path) if state(owner(p.keys[0].split(".")[0]), p.keys[0]) != "idle"]
    assert [str(p) for p in found] == []


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("flash_attn", "flash_attention_2"),
        ("Flash-Attn-3", "flash_attention_3"),
        ("fa2", "flash_attention_2"),
        ("flashattention2", "flash_attention_2"),
    ],
)
def test_other_names_of_flash_attention(written: str, meant: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text(f"base_model: x\nattn_implementation: {written}\n")
    with pytest.raises(ConfigError) as told:
        load_config(str(file))
    [problem] = [p for p in told.value.problems if "attn_implementation" in p.keys]
    assert f"`{meant}`" in problem.remedy


def test_a_missing_key_names_the_file_in_which_it_should_stand(tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text("base_model: x\n")
    with pytest.raises(ConfigError) as told:
        load_config(str(file))
    assert {p.keys[0]: str(p.places[0]) for p in told.value.problems} == {
        "datasets": str(file),
        "learning_rate": str(file),
    }
