"""Rules about precision, attention, losses, kernels and memory."""

from __future__ import annotations

from collections.abc import Iterator

from axolotl.config.attention import BACKENDS, LATER, PACKED, SHORT, backend_of
from axolotl.config.config import Config
from axolotl.config.keys import did_you_mean, nearest
from axolotl.config.rules.rulebook import conflict, rule, warning
from axolotl.errors import Problem

_LOSSES = (
    "cut_cross_entropy",
    "chunked_cross_entropy",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
)


@rule("bf16", "fp16", "bfloat16", "float16", "float32")
def one_precision(cfg: Config) -> Iterator[Problem]:
    """Training computes in one number type."""
    model = cfg.model
    chosen = {
        "bfloat16": [k for k in ("bf16", "bfloat16") if getattr(model, k) in (True, "full")],
        "float16": [k for k in ("fp16", "float16") if getattr(model, k)],
        "float32": [k for k in ("float32",) if model.float32],
    }
    kinds = [keys for keys in chosen.values() if keys]
    if len(kinds) > 1:
        first, second = kinds[0][0], kinds[1][0]
        yield conflict(
            f"`{first}` and `{second}` cannot both be true.", "Set one of them to false.", first, second
        )


@rule("attn_implementation")
def attention_is_known(cfg: Config) -> Iterator[Problem]:
    """A name of ours, or a kernel on the Hub."""
    name = cfg.model.attn_implementation
    if name is None or name in BACKENDS or "/" in name:
        return
    if name in LATER:
        yield conflict(
            f"`attn_implementation: {name}` is known, but not available yet.",
            "Leave it out to have the best one chosen.",
            "attn_implementation",
            kind="unavailable",
        )
        return
    short = name.lower().replace("-", "_")
    near = [SHORT[short]] if short in SHORT else nearest(name, BACKENDS)
    yield conflict(
        f"`attn_implementation` is `{name}`; it takes {', '.join(f'`{n}`' for n in BACKENDS)}, or a kernel "
        "on the Hub.",
        did_you_mean(near) or "Leave it out to have the best one chosen.",
        "attn_implementation",
        kind="invalid_value",
    )


@rule("flex_attn_compile_kwargs", "attn_implementation")
def flex_options_need_flex(cfg: Config) -> Iterator[Problem]:
    """Its compile options do nothing for other kinds of attention."""
    if cfg.model.flex_attn_compile_kwargs and cfg.model.attn_implementation != "flex_attention":
        yield warning(
            "`flex_attn_compile_kwargs` has no effect without `attn_implementation: flex_attention`.",
            "Delete it, or choose flex attention.",
            "flex_attn_compile_kwargs",
            "attn_implementation",
        )


@rule("attn_kernel", "attn_implementation", "sample_packing")
def attention_kernel_is_for_packed_rows(cfg: Config) -> Iterator[Problem]:
    """It says how our packed attention is computed, which other implementations replace."""
    if cfg.model.attn_kernel is None:
        return
    if (own := backend_of(cfg.model.attn_implementation or "")) is not None and own.packed != PACKED:
        yield conflict(
            f"`attn_kernel` has no part in `attn_implementation: {cfg.model.attn_implementation}`.",
            "Keep one of them.",
            "attn_kernel",
            "attn_implementation",
        )
    elif not (cfg.data.sample_packing or cfg.data.batch_flattening):
        yield warning(
            "`attn_kernel` has no effect without `sample_packing`.",
            "Set `sample_packing: true`, or delete it.",
            "attn_kernel",
            "sample_packing",
        )


@rule(*_LOSSES)
def one_cross_entropy(cfg: Config) -> Iterator[Problem]:
    """Each of these replaces the loss."""
    chosen = [key for key in _LOSSES if getattr(cfg.kernels, key)]
    if len(chosen) > 1:
        yield conflict(
            f"{' and '.join(f'`{k}`' for k in chosen)} each replace the loss.", "Keep one of them.", *chosen
        )


@rule("chunked_cross_entropy_num_chunks", "chunked_cross_entropy")
def chunks_need_chunking(cfg: Config) -> Iterator[Problem]:
    """Their number does nothing by itself."""
    if cfg.kernels.chunked_cross_entropy_num_chunks and not cfg.kernels.chunked_cross_entropy:
        yield warning(
            "`chunked_cross_entropy_num_chunks` has no effect without `chunked_cross_entropy`.",
            "Set `chunked_cross_entropy: true`.",
            "chunked_cross_entropy_num_chunks",
        )


@rule("lora_fp8_base", "adapter", "load_in_4bit", "load_in_8bit", "fsdp_config", "deepspeed")
def eight_bit_base_is_for_lora(cfg: Config) -> Iterator[Problem]:
    """Only frozen 16-bit weights on one process can be held in 8-bit floats."""
    if not cfg.kernels.lora_fp8_base:
        return
    for other, on, why in (
        ("adapter", cfg.adapter.adapter != "lora", "needs `adapter: lora`"),
        ("load_in_4bit", cfg.model.load_in_4bit, "and `load_in_4bit` both say how the weights are held"),
        ("load_in_8bit", cfg.model.load_in_8bit, "and `load_in_8bit` both say how the weights are held"),
        ("fsdp_config", cfg.distributed.fsdp_config is not None, "does not work with FSDP"),
        ("deepspeed", bool(cfg.distributed.deepspeed), "does not work with DeepSpeed"),
    ):
        if on:
            yield conflict(f"`lora_fp8_base` {why}.", "Keep one of them.", "lora_fp8_base", other)


@rule("fp32_norms", "fp32_norm_classes", "fsdp_config", "fsdp_version")
def float32_norms_are_a_matter_of_fsdp(cfg: Config) -> Iterator[Problem]:
    """Only FSDP 2 can hold some modules in another precision."""
    if cfg.model.fp32_norms and not (cfg.distributed.fsdp_config and fsdp_version(cfg) == 2):
        yield conflict(
            "`fp32_norms` needs FSDP, version 2.",
            "Add `fsdp_version: 2` and `fsdp_config:`, or delete it.",
            "fp32_norms",
            "fsdp_version",
        )
    if cfg.model.fp32_norm_classes and not cfg.model.fp32_norms:
        yield warning(
            "`fp32_norm_classes` has no effect without `fp32_norms`.",
            "Set `fp32_norms: true`.",
            "fp32_norm_classes",
        )


def fsdp_version(cfg: Config) -> int:
    """The version of FSDP that the config asks for, at either level; 2 where it does not say."""
    inner = cfg.distributed.fsdp_config.fsdp_version if cfg.distributed.fsdp_config else None
    return cfg.distributed.fsdp_version or inner or 2
