"""Rules about what is kept, computed again, moved away or compiled."""

from __future__ import annotations

import re
from collections.abc import Iterator

from axolotl.config.config import Config
from axolotl.config.rules.rulebook import conflict, rule, warning
from axolotl.config.train import SelectiveCheckpointing
from axolotl.errors import Problem


@rule("tiled_mlp", "liger_glu_activation", "tiled_mlp_use_original_mlp")
def tiles_and_fused_activations(cfg: Config) -> Iterator[Problem]:
    """The replaced feed-forward layer would undo the fused activation."""
    kernels = cfg.kernels
    if kernels.tiled_mlp and kernels.liger_glu_activation and not kernels.tiled_mlp_use_original_mlp:
        yield conflict(
            "`tiled_mlp` without `tiled_mlp_use_original_mlp` undoes `liger_glu_activation`.",
            "Set `tiled_mlp_use_original_mlp: true`.",
            "tiled_mlp",
            "liger_glu_activation",
            "tiled_mlp_use_original_mlp",
        )


@rule("torch_compile_options", "torch_compile_mode", "torch_compile")
def compile_options_need_compiling(cfg: Config) -> Iterator[Problem]:
    """Options of torch.compile do nothing without it, and exclude its modes."""
    train = cfg.train
    if train.torch_compile_options and not train.torch_compile:
        yield conflict(
            "`torch_compile_options` needs `torch_compile`.",
            "Set `torch_compile: true`.",
            "torch_compile_options",
            "torch_compile",
        )
    if train.torch_compile_options and train.torch_compile_mode:
        yield conflict(
            "`torch_compile_options` and `torch_compile_mode` exclude each other.",
            "Keep one of them.",
            "torch_compile_options",
            "torch_compile_mode",
        )


@rule("gradient_checkpointing_kwargs", "gradient_checkpointing")
def checkpointing_options_need_checkpointing(cfg: Config) -> Iterator[Problem]:
    """Its options do nothing without it."""
    if cfg.train.gradient_checkpointing_kwargs and not cfg.train.gradient_checkpointing:
        yield warning(
            "`gradient_checkpointing_kwargs` has no effect without `gradient_checkpointing`.",
            "Set `gradient_checkpointing: true`.",
            "gradient_checkpointing_kwargs",
        )


@rule("activation_offloading", "selective_checkpointing", "gradient_checkpointing")
def offloading_needs_checkpointing(cfg: Config) -> Iterator[Problem]:
    """What is offloaded, or kept all the same, are the activations at the checkpoints."""
    train = cfg.train
    for key in ("activation_offloading", "selective_checkpointing"):
        if getattr(train, key) and not train.gradient_checkpointing:
            yield conflict(
                f"`{key}` needs `gradient_checkpointing`.",
                "Set `gradient_checkpointing: true`.",
                key,
                "gradient_checkpointing",
            )


@rule(
    "gradient_checkpointing_kwargs",
    "gradient_checkpointing",
    "activation_offloading",
    "selective_checkpointing",
)
def checkpoints_of_pytorch_know_only_whole_layers(cfg: Config) -> Iterator[Problem]:
    """PyTorch's own checkpoints keep layer inputs on the device, of all layers, and nothing else."""
    train = cfg.train
    options = [
        name
        for name, value in (train.gradient_checkpointing_kwargs or {}).items()
        if (name, value) != ("use_reentrant", False)
    ]
    finer = next(
        (
            key
            for key, on in (
                ("activation_offloading", train.activation_offloading),
                ("selective_checkpointing", train.selective_checkpointing),
                ("gradient_checkpointing", train.gradient_checkpointing not in (True, False)),
            )
            if on
        ),
        None,
    )
    if options and finer:
        at = f"gradient_checkpointing_kwargs.{options[0]}"
        more = f": {cfg.train.gradient_checkpointing}" if finer == "gradient_checkpointing" else ""
        yield warning(f"`{at}` has no effect beside `{finer}{more}`.", "Delete the line.", at)


@rule("selective_checkpointing")
def what_can_be_kept_is_named(cfg: Config) -> Iterator[Problem]:
    """Results are kept by the names of what makes them."""
    selective = cfg.train.selective_checkpointing
    if not isinstance(selective, SelectiveCheckpointing):
        return
    if not selective.save:
        yield conflict(
            "`selective_checkpointing.save` names nothing that is kept.",
            "Delete it to keep the results of attention, or set `selective_checkpointing: false`.",
            "selective_checkpointing.save",
        )
    for name in selective.save:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield conflict(
                f"`selective_checkpointing.save` names `{name}`; it takes `attention`, `matmul`, or names of linear "
                "layers such as `o_proj`.",
                "Name the layer itself, without a path.",
                "selective_checkpointing.save",
            )


@rule("tiled_mlp_num_shards", "tiled_mlp")
def tiles_need_tiling(cfg: Config) -> Iterator[Problem]:
    """The number of tiles is for layers that are tiled."""
    if cfg.kernels.tiled_mlp_num_shards and not cfg.kernels.tiled_mlp:
        yield warning(
            "`tiled_mlp_num_shards` has no effect without `tiled_mlp`.",
            "Set `tiled_mlp: true`.",
            "tiled_mlp_num_shards",
        )


@rule("fp8", "adapter", "load_in_4bit", "load_in_8bit", "fp16", "float32", "deepspeed")
def eight_bit_products_are_for_whole_models(cfg: Config) -> Iterator[Problem]:
    """Training in 8-bit floats is for trained 16-bit or 32-bit weights, under bf16."""
    model = cfg.model
    if not model.fp8:
        return
    for key, on, why, remedy in (
        (
            "adapter",
            cfg.adapter.adapter,
            "trains whole models, and `adapter` leaves their weights frozen",
            "Delete it; `lora_fp8_base: true` is what adapters have.",
        ),
        ("load_in_4bit", model.load_in_4bit, "and `load_in_4bit` exclude each other", "Keep one of them."),
        ("load_in_8bit", model.load_in_8bit, "and `load_in_8bit` exclude each other", "Keep one of them."),
        (
            "fp16",
            model.fp16 or model.float16,
            "computes the rest in bf16",
            "Set `bf16: true` instead of fp16.",
        ),
        ("float32", model.float32, "computes the rest in bf16", "Set `bf16: true` instead of float32."),
        ("deepspeed", cfg.distributed.deepspeed, "does not work with DeepSpeed", "Keep one of them."),
    ):
        if on:
            yield conflict(f"`fp8` {why}.", remedy, "fp8", key)
            return


@rule("fp8", "torch_compile")
def eight_bit_products_want_compiling(cfg: Config) -> Iterator[Problem]:
    """Uncompiled, finding the scales takes longer than the products save."""
    if cfg.model.fp8 and not cfg.train.torch_compile:
        yield warning(
            "`fp8` without `torch_compile` is slower than bf16: scaling is then done in many small steps.",
            "Set `torch_compile: true`.",
            "fp8",
            "torch_compile",
        )
