"""The keys of a DeepSpeed configuration, block by block. DeepSpeed itself imports for seconds, and passes over what it does
not know at the top level.
"""

from __future__ import annotations

KEYS: dict[str, frozenset[str]] = {
    "": frozenset(
        [
            "activation_checkpointing",
            "aio",
            "bf16",
            "checkpoint",
            "comet",
            "comms_logger",
            "communication_data_type",
            "compile",
            "csv_monitor",
            "data_types",
            "disable_allgather",
            "disable_python_gc",
            "dump_state",
            "flops_profiler",
            "fp16",
            "gradient_accumulation_steps",
            "gradient_clipping",
            "gradient_predivide_factor",
            "log_level",
            "memory_breakdown",
            "optimizer",
            "prescale_gradients",
            "scheduler",
            "seq_parallel_communication_data_type",
            "steps_per_print",
            "tensorboard",
            "timers",
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "use_data_before_expert_parallelism",
            "vocabulary_size",
            "wall_clock_breakdown",
            "wandb",
            "zero_allow_untested_optimizer",
            "zero_force_ds_cpu_optimizer",
            "zero_optimization",
        ]
    ),
    "zero_optimization": frozenset(
        [
            "allgather_bucket_size",
            "allgather_partitions",
            "allgather_sequential",
            "compute_grad_norm",
            "contiguous_gradients",
            "cpu_offload",
            "cpu_offload_param",
            "cpu_offload_use_pin_memory",
            "elastic_checkpoint",
            "enable_sanity_checks",
            "gather_16bit_weights_on_model_save",
            "ignore_unused_parameters",
            "leaf_module",
            "legacy_stage1",
            "load_from_fp32_weights",
            "log_trace_cache_warnings",
            "max_live_parameters",
            "max_reuse_distance",
            "memory_efficient_linear",
            "model_persistence_threshold",
            "module_granularity_threshold",
            "offload_optimizer",
            "offload_param",
            "overlap_comm",
            "override_module_apply",
            "param_persistence_threshold",
            "parameter_alignment",
            "pipeline_loading_checkpoint",
            "prefetch_bucket_size",
            "reduce_bucket_size",
            "reduce_scatter",
            "round_robin_gradients",
            "save_muon_momentum_buffer_in_memory",
            "stage",
            "stage3_allgather_sequential",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_gather_fp16_weights_on_model_save",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_model_persistence_threshold",
            "stage3_module_granularity_threshold",
            "stage3_param_persistence_threshold",
            "stage3_prefetch_bucket_size",
            "stage3_use_all_reduce_for_fetch_params",
            "sub_group_size",
            "use_all_reduce_for_fetch_params",
            "use_multi_rank_bucket_allreduce",
            "zenflow",
            "zero_hpz_partition_size",
            "zero_quantized_gradients",
            "zero_quantized_nontrainable_weights",
            "zero_quantized_weights",
        ]
    ),
    "zero_optimization.offload_optimizer": frozenset(
        [
            "buffer_count",
            "cpuadam_cores_perc",
            "device",
            "fast_init",
            "nvme_path",
            "pin_memory",
            "pipeline_read",
            "pipeline_write",
            "ratio",
            "super_offload",
        ]
    ),
    "zero_optimization.offload_param": frozenset(
        ["buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory"]
    ),
    "bf16": frozenset(
        [
            "bf16_master_weights_and_grads",
            "bf16_optimizer_states",
            "check_grad_overflow",
            "enabled",
            "immediate_grad_update",
        ]
    ),
    "fp16": frozenset(
        [
            "auto_cast",
            "consecutive_hysteresis",
            "enabled",
            "fp16_master_weights_and_grads",
            "hysteresis",
            "initial_scale_power",
            "loss_scale",
            "loss_scale_window",
            "min_loss_scale",
        ]
    ),
    "compile": frozenset(
        [
            "autoep_non_moe",
            "debug_log",
            "deepcompile",
            "double_buffer",
            "free_activation",
            "free_activation_threshold",
            "keep_all_input_tensors",
            "keep_int_input_tensors",
            "offload_activation",
            "offload_activation_pin_memory",
            "offload_opt_states",
            "offload_parameters",
            "passes",
            "symmetric_memory",
            "sync_after_allgather",
            "sync_after_reduce",
            "sync_before_allgather",
            "sync_before_reduce",
            "backend",
            "disable",
            "kwargs",
        ]
    ),
    "optimizer": frozenset({"type", "params", "legacy_fusion"}),
    "scheduler": frozenset({"type", "params"}),
}

GONE = frozenset(
    [
        "amp",
        "compression_training",
        "curriculum_learning",
        "eigenvalue",
        "elasticity",
        "graph_harvesting",
        "nebula",
        "progressive_layer_drop",
        "quantize_training",
        "sparse_attention",
        "sparse_gradients",
    ]
)
"""Blocks that DeepSpeed had once and refuses today."""

ELSEWHERE: dict[str, str] = {
    "bfloat16": "Its name is `bf16`.",
    "data_efficiency": "Order and length of the rows are the YAML's.",
    "dataloader_drop_last": "The YAML's `dataloader_drop_last` decides.",
    "expert_parallel": "It is not available here.",
    "gradient_allreduce_op": "The loss is a mean over all trained tokens, which needs `mean`.",
    "hybrid_engine": "It is not available here.",
    "managed_gradient_accumulation": "The YAML's `gradient_accumulation_steps` decides.",
    "pipeline": "It is not available here.",
    "tensor_parallel": "The YAML's key for it is `tensor_parallel_size`.",
    "torch_autocast": "The YAML's `bf16` and `fp16` decide.",
    "weight_quantization": "A base in fewer bits is `load_in_4bit` or `load_in_8bit`.",
}
"""Blocks that would do nothing here, or something else than the YAML says."""

OLD_COMPILE = ("disable", "backend", "kwargs")
"""How DeepSpeed's configs once said what `torch_compile` says; it refuses them today."""

CHOICES: dict[str, tuple[object, ...]] = {
    "zero_optimization.stage": (1, 2, 3),
    "zero_optimization.offload_optimizer.device": ("none", "cpu", "nvme"),
    "zero_optimization.offload_param.device": ("none", "cpu", "nvme"),
}
COUNTS = (
    "train_micro_batch_size_per_gpu",
    "train_batch_size",
    "gradient_accumulation_steps",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.sub_group_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
)
"""Keys that take a whole number (`1e9` counts as one) or `auto`."""
SWITCHES = (
    "bf16.enabled",
    "fp16.enabled",
    "zero_optimization.overlap_comm",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.reduce_scatter",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.offload_param.pin_memory",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "wall_clock_breakdown",
)
"""Keys that take true, false or, where accelerate fills them in, `auto`."""
