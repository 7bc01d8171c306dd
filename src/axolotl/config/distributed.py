"""The keys of runs on several devices: DDP, FSDP, DeepSpeed, parallel axes, Ray."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from axolotl.config.section import (
    Block,
    Int,
    NonNegativeInt,
    PositiveInt,
    Section,
    Text,
    idle,
    later,
    validated,
)

StateDict = Literal["FULL_STATE_DICT", "LOCAL_STATE_DICT", "SHARDED_STATE_DICT"]


class FsdpConfig(Block):
    """How FSDP shards the model."""

    fsdp_version: Literal[1, 2] | None = None
    """FSDP's version: 2 is today's, and runs what is written for 1 too."""
    activation_checkpointing: bool | None = None
    """Compute activations again in the backward pass."""
    offload_params: bool | None = None
    """Keep parameters in CPU memory while they are not needed."""
    sync_module_states: bool | None = idle("all processes get the same weights")
    """Send the weights of the first process to all others at the start."""
    cpu_ram_efficient_loading: bool | None = None
    """Each process reads its own part of the weights (on unless false); false: each loads the whole model first."""
    cpu_offload_pin_memory: bool | None = None
    """Pin the CPU memory of offloaded parameters."""
    use_orig_params: bool | None = idle("version 2 never hides them")
    """Keep the original parameters visible (version 1)."""
    state_dict_type: StateDict | None = None
    """Form in which checkpoints hold the weights: parts of all processes (SHARDED_STATE_DICT, the usual one), or whole
    safetensors beside them (FULL_STATE_DICT)."""
    final_state_dict_type: StateDict | None = None
    """Form in which the finished weights are saved: whole safetensors unless SHARDED_STATE_DICT is written."""
    auto_wrap_policy: Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"] | None = None
    """How the model is divided into units."""
    transformer_layer_cls_to_wrap: Text | list[Text] | None = None
    """Classes of the layers that are gathered one at a time; found by themselves where this is left out."""
    min_num_params: PositiveInt | None = None
    """Size from which a module becomes a unit."""
    reshard_after_forward: bool | None = None
    """Give gathered weights back after the forward pass: less memory, more traffic."""
    mixed_precision_policy: Text | None = None
    """Number type in which sharded weights are gathered and compute: bf16, fp16 or fp32; that of the weights unless set."""


class DistributedSection(Section):
    """Several devices: DDP, FSDP, DeepSpeed, parallel axes, Ray."""

    title: ClassVar[str] = "Several devices"

    ddp: bool | None = idle("the launcher decides")
    """Give every device a copy of the model."""
    ddp_timeout: PositiveInt | None = None
    """Seconds that processes wait for each other."""
    ddp_bucket_cap_mb: PositiveInt | None = None
    """Size of the packets in which gradients travel, in MB."""
    ddp_broadcast_buffers: bool | None = None
    """Send buffers from the first process to all others at each step."""
    ddp_find_unused_parameters: bool | None = None
    """Allow parameters that a step does not use."""
    deepspeed: Text | dict[str, Any] | None = None
    """DeepSpeed's configuration: a JSON file, or the mapping itself."""
    deepcompile: bool = validated("DeepCompile", False)
    """Let DeepSpeed compile the model."""
    fsdp_config: FsdpConfig | None = None
    """Shard the model over the devices with FSDP."""
    fsdp_version: Literal[1, 2] | None = None
    """FSDP's version: 2 is today's, and runs what is written for 1 too."""
    fsdp_final_state_dict_type: StateDict | None = None
    """Form in which the finished weights are saved: whole safetensors unless SHARDED_STATE_DICT is written."""
    dp_shard_size: Int | None = None
    """Devices over which the model is sharded; left out or -1: all that the other axes leave."""
    dp_replicate_size: PositiveInt | None = None
    """Copies of the sharded model."""
    tensor_parallel_size: PositiveInt | None = None
    """Devices that share each matrix product; the attention heads of the model have to be divisible by it."""
    context_parallel_size: PositiveInt | None = None
    """Devices that share each row; the attention heads of the model have to be divisible by it."""
    context_parallel: dict[str, Any] | None = later("ring and Ulysses attention")
    """Sizes of rings and groups among which each row is shared."""
    heads_k_stride: PositiveInt | None = idle("devices that share a row exchange all heads at once")
    """Attention heads that travel at a time between these devices, in a ring."""
    ring_attn_func: Text | None = idle(
        "devices that share a row exchange heads, not keys and values in a ring"
    )
    """How a ring would share attention: varlen_llama3 for packed rows, batch_ring, ..."""
    world_size: PositiveInt | None = None
    """Number of processes that `plan` counts with; a run has as many as its launcher starts."""
    local_rank: Int | None = idle("the launcher sets it")
    """Number of this process on its machine; set by the launcher."""
    use_ray: bool = False
    """Run on a Ray cluster."""
    ray_run_name: Text | None = None
    """Name of the run on Ray."""
    ray_num_workers: PositiveInt = 1
    """Workers on Ray."""
    resources_per_worker: dict[str, Any] | None = None
    """What each worker needs, such as `{GPU: 1}`."""
    expert_parallel_size: PositiveInt = later("expert parallelism", 1)
    """Devices that share the experts of a mixture-of-experts model."""
    expert_parallel_backend: Text = later("expert parallelism", "deep_ep")
    """How tokens travel to their experts."""
    expert_parallel_num_nvl_bytes: PositiveInt = later("expert parallelism", 256 << 20)
    """Size of the buffer within a machine."""
    expert_parallel_num_rdma_bytes: NonNegativeInt = later("expert parallelism", 0)
    """Size of the buffer between machines."""
    expert_parallel_token_capacity: PositiveInt | None = later("expert parallelism")
    """Tokens for which the buffers are sized."""
    expert_parallel_fallback_on_unsupported: bool = later("expert parallelism", True)
    """Go on without it where the hardware cannot."""
    expert_parallel_save_dispatch: bool = later("expert parallelism", False)
    """Keep what was exchanged instead of exchanging it again in the backward pass."""
    expert_parallel_dispatch_chunks: PositiveInt | None = later("expert parallelism")
    """Pieces in which tokens travel."""
