"""Keys that make training faster or leaner without changing what it computes: kernels and losses."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from axolotl.config.section import NonNegativeFloat, PositiveInt, Section, Steps, Text, idle, later

TUNING = "no program here is tuned by a file"
KERNELS = "this kernel is not built yet, and the plain path computes the same"
HEAD = "the output head's gradient is always summed in float32"
MOE = "mixture-of-experts kernels"


class KernelsSection(Section):
    """Faster paths: kernels, fused losses. Where none fits, the plain path computes the same."""

    title: ClassVar[str] = "Kernels and losses"

    fused_kernels: bool | None = None
    """Every kernel of ours that fits: norms, rotary embedding, gated activations, LoRA and the loss. Unset: on an NVIDIA
    GPU of the Ampere generation or newer, where neither weights nor rows are divided among GPUs."""
    lora_fp8_base: bool = False
    """Hold the frozen weights under LoRA in 8-bit floats and multiply in them (experimental; needs a Hopper GPU)."""
    lora_mlp_kernel: bool | None = None
    """LoRA of a feed-forward layer in one pass that keeps less for the backward pass."""
    lora_qkv_kernel: bool | None = None
    """LoRA of query, key and value in one matrix product."""
    lora_o_kernel: bool | None = None
    """LoRA of the attention's output projection in one matrix product."""
    lora_embedding_kernel: bool | None = idle(KERNELS)
    """Fused LoRA in the embeddings."""
    use_kernels: bool | None = idle(KERNELS)
    """Take kernels from the Hub where the model has some."""
    liger_rope: bool | None = None
    """Fused rotary embedding."""
    liger_rms_norm: bool | None = None
    """Fused RMS norm."""
    liger_rms_norm_gated: bool | None = idle(KERNELS)
    """Fused gated RMS norm."""
    liger_layer_norm: bool | None = idle(KERNELS)
    """Fused layer norm."""
    liger_glu_activation: bool | None = None
    """Fused gated activation of the feed-forward layers."""
    liger_cross_entropy: bool | None = None
    """Output head and cross entropy in one, as liger_fused_linear_cross_entropy."""
    liger_fused_linear_cross_entropy: bool | None = None
    """Output head and cross entropy in one, without whole logits."""
    liger_use_token_scaling: bool | None = later("losses weighted by token")
    """Weigh each token's loss by its probability."""
    cut_cross_entropy: bool | None = None
    """Cross entropy that never holds whole logits (Cut Cross-Entropy)."""
    chunked_cross_entropy: bool | None = None
    """Output head and cross entropy in one, in pieces of the tokens."""
    chunked_cross_entropy_num_chunks: PositiveInt | None = None
    """Number of these pieces."""
    cut_cross_entropy_accum_c_fp32: bool | None = idle(HEAD)
    """Sum the output head's gradient in float32."""
    cut_cross_entropy_c_grad_chunk_size: PositiveInt | Literal["auto"] | None = idle(HEAD)
    """Rows of the vocabulary for which that is done at a time."""
    flash_attn_cross_entropy: bool | None = None
    """Output head and cross entropy in one, as cut_cross_entropy."""
    flash_attn_fuse_mlp: bool | None = idle(KERNELS)
    """Fuse the feed-forward layers, as old versions of flash-attention did."""
    use_dft: bool | None = later("losses weighted by token")
    """Weigh each token's loss by its probability (dynamic fine-tuning)."""
    use_eaft: bool = later("entropy-aware losses", False)
    """Weigh each token's loss by the entropy of its prediction."""
    eaft_alpha: NonNegativeFloat = later("entropy-aware losses", 1.0)
    """Strength of that weighing."""
    eaft_k: PositiveInt = later("entropy-aware losses", 20)
    """Likeliest tokens from which entropy is estimated."""
    liger_kernel_impl: Text | None = idle(KERNELS)
    """Other programs for Liger's kernels: cutile or cutedsl."""
    fa_varlen_kwargs_in_collator: bool | None = idle("where packed rows begin is always found once per batch")
    """Find where packed rows begin once per batch, not in each layer."""
    autotune_cache_path: Text | None = idle(TUNING)
    """File of the programs' best settings."""
    autotune_profiles: list[dict[str, Any]] | None = idle(TUNING)
    """Settings to choose among, for each program."""
    autotune_neighborhood: PositiveInt | None = idle(TUNING)
    """How far from the best known setting others are tried."""
    tiled_mlp: bool | None = None
    """Compute feed-forward layers in tiles of tokens: long contexts in less memory; unset: where it costs nothing."""
    tiled_mlp_num_shards: PositiveInt | None = None
    """Number of these tiles; by default as many as have 4,096 tokens each, or 1,024 beside activation_offloading."""
    tiled_mlp_use_original_mlp: bool = True
    """Send the tiles through the model's own feed-forward code, or through its kernel; else through the plain formula."""
    dsv4_fp4_grouped_mode: Text | None = later(MOE)
    """Mode of DeepSeek V4's 4-bit grouped products."""
    dsv4_fp8_nonexpert_mode: Text | None = later(MOE)
    """Mode of DeepSeek V4's 8-bit layers outside the experts."""
    dsv4_fp8_lora_kernel: bool | None = later(MOE)
    """Fused LoRA on DeepSeek V4's 8-bit layers."""
    dsv4_shared_mlp_lora_kernel: bool | None = later(MOE)
    """Fused LoRA on DeepSeek V4's shared experts."""
    dsv4_bf16_all: bool | None = later(MOE)
    """Compute all of DeepSeek V4 in bfloat16."""
    use_dsv4_kernels: bool | None = later(MOE)
    """Kernels for DeepSeek V4."""
    use_glm_dsa_kernels: bool | None = later(MOE)
    """Kernels for GLM's sparse attention."""
    experts_implementation: Text | None = idle(KERNELS)
    """How transformers computes experts: eager, batched_mm, grouped_mm."""
    expert_backend: Text | None = idle(KERNELS)
    """Kernels for the experts: scattermoe or sonicmoe."""
    nonexpert_quantization: Text | None = later(MOE)
    """Quantisation of the layers outside the experts."""
    moe_grouped_backend: Text | None = idle(KERNELS)
    """Backend of grouped products."""
    moe_dequant_chunk_size: PositiveInt | None = later(MOE)
    """Experts that are dequantised at a time."""
    moe_bnb_fast: bool | None = later(MOE)
    """Faster experts in 4 bits."""
    nvfp4_merge_aware: bool | None = later(MOE)
    """Train so that merging into NVFP4 weights loses little."""
    nvfp4_merge_aware_start_step: Steps | None = later(MOE)
    """Step at which that begins."""
    dense_mixer: bool = later("DenseMixer", False)
    """Let every expert learn from every token (DenseMixer)."""
