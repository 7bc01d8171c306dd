"""Rules about `tensor_parallel_size`: what does not go together with matrices of which each process holds a part."""

from __future__ import annotations

from collections.abc import Iterator

from axolotl.config.config import Config
from axolotl.config.rules.devices import OWN_STATE, WHOLE_MATRICES, WHOLE_STATE
from axolotl.config.rules.rulebook import conflict, rule
from axolotl.errors import Problem


@rule(
    "tensor_parallel_size",
    "deepspeed",
    "adapter",
    "load_in_8bit",
    "load_in_4bit",
    "peft_use_dora",
    "lora_target_parameters",
    "torch_compile",
    "fp8",
    "lora_fp8_base",
    "unfrozen_parameters",
    "fsdp_config",
    "rl",
)
def what_shares_no_products(cfg: Config) -> Iterator[Problem]:
    """Each of these reads or writes whole matrices, or brings a way of dividing of its own."""
    if (cfg.distributed.tensor_parallel_size or 1) < 2:
        return
    model, adapter, fsdp = cfg.model, cfg.adapter, cfg.distributed.fsdp_config
    rows = any("[" in name for name in model.unfrozen_parameters or ())
    shard = "Shard the model with `fsdp_config` (and `fsdp_version: 2`) instead"
    for key, is_so, why, remedy in (
        ("deepspeed", cfg.distributed.deepspeed, "DeepSpeed divides the model its own way", f"{shard}."),
        (
            "load_in_4bit",
            model.load_in_4bit,
            "weights in 4 bits are packed and cannot be divided",
            f"{shard}.",
        ),
        (
            "load_in_8bit",
            model.load_in_8bit,
            "weights in 8 bits are packed and cannot be divided",
            f"{shard}.",
        ),
        (
            "adapter",
            adapter.adapter not in (None, "lora", "qlora"),
            "of adapters only LoRA is divided",
            f"{shard}.",
        ),
        ("peft_use_dora", adapter.peft_use_dora, "DoRA measures whole matrices", "Delete `peft_use_dora`."),
        (
            "lora_target_parameters",
            adapter.lora_target_parameters,
            "adapters on bare parameters are not divided",
            "Name layers with `lora_target_modules`.",
        ),
        (
            "torch_compile",
            cfg.train.torch_compile is True,
            "divided layers are not compiled",
            "Delete `torch_compile`.",
        ),
        ("fp8", model.fp8, "products in 8 bits are of whole matrices", "Delete `fp8`."),
        (
            "lora_fp8_base",
            cfg.kernels.lora_fp8_base,
            "weights in 8 bits are not divided",
            "Delete `lora_fp8_base`.",
        ),
        ("unfrozen_parameters", rows, "a range of rows means rows of the whole matrix", "Delete the range."),
        (
            "fsdp_config.cpu_ram_efficient_loading",
            fsdp is not None and fsdp.cpu_ram_efficient_loading is False,
            "each process reads its own part of the weights",
            "Delete `cpu_ram_efficient_loading: false`.",
        ),
        (
            "rl",
            cfg.method.rl is not None,
            "it is available for supervised training only",
            "Delete `tensor_parallel_size`.",
        ),
    ):
        if is_so:
            yield conflict(
                f"`tensor_parallel_size` does not go together with `{key.rpartition('.')[2]}`: {why}.",
                remedy,
                "tensor_parallel_size",
                key,
            )


@rule("tensor_parallel_size", "optimizer")
def the_optimizer_takes_parts_of_matrices(cfg: Config) -> Iterator[Problem]:
    """Some optimizers need whole matrices, or hold a state that cannot be divided."""
    name = cfg.optim.optimizer
    if (cfg.distributed.tensor_parallel_size or 1) < 2:
        return
    if name in (*WHOLE_STATE, *WHOLE_MATRICES) or any(part in name for part in OWN_STATE):
        yield conflict(
            f"`optimizer: {name}` does not work with `tensor_parallel_size`.",
            "Choose another optimizer, such as `adamw_torch_fused`.",
            "optimizer",
            "tensor_parallel_size",
        )
