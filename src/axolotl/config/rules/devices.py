"""Rules about several devices: FSDP, DeepSpeed, parallel axes, memory of devices."""

from __future__ import annotations

from collections.abc import Iterator

from axolotl.config.config import Config
from axolotl.config.rules.loss import fsdp_version
from axolotl.config.rules.rulebook import conflict, rule, warning
from axolotl.errors import Problem

FSDP_PRECISIONS = ("bf16", "bfloat16", "fp16", "float16", "fp32", "float32")
WHOLE_STATE = ("adafactor", "came_pytorch", "grokadamw", "ademamix")
OWN_STATE = ("8bit", "4bit", "bnb", "paged_")
WHOLE_MATRICES = (
    "muon",
    "flash_adamw",
    "flash_adam",
    "flash_sgd",
    "flash_sgdw",
    "flash_lion",
    "q_galore_adamw8bit",
)


@rule("deepspeed", "fsdp_config", "fsdp")
def one_way_of_sharding(cfg: Config) -> Iterator[Problem]:
    """DeepSpeed and FSDP both shard the model."""
    if cfg.distributed.deepspeed and cfg.distributed.fsdp_config:
        yield conflict(
            "`deepspeed` and `fsdp_config` both shard the model.",
            "Keep one of them.",
            "deepspeed",
            "fsdp_config",
        )


@rule("dp_shard_size", "dp_replicate_size", "fsdp_config", "deepspeed")
def shards_of_whom(cfg: Config) -> Iterator[Problem]:
    """The axes of copies and shards are FSDP's."""
    distributed = cfg.distributed
    if distributed.fsdp_config:
        if (size := distributed.dp_shard_size) is not None and size < -1:
            yield conflict(
                f"`dp_shard_size` is {size}.",
                "Write a number above 0, or -1 for all the rest.",
                "dp_shard_size",
            )
        return
    if (distributed.dp_shard_size or 1) > 1:
        other = "deepspeed" if distributed.deepspeed else None
        yield conflict(
            "`dp_shard_size` is about FSDP, "
            + ("but `deepspeed` shards the model." if other else "but there is no `fsdp_config`."),
            f"Delete `{other}` and add `fsdp_config:`, or delete `dp_shard_size`."
            if other
            else "Add `fsdp_config:` (with `fsdp_version: 2`), or delete `dp_shard_size`.",
            "dp_shard_size",
            *([other] if other else []),
        )


@rule("deepcompile", "deepspeed")
def deepcompile_needs_deepspeed(cfg: Config) -> Iterator[Problem]:
    """It is a part of DeepSpeed."""
    if cfg.distributed.deepcompile and not cfg.distributed.deepspeed:
        yield conflict(
            "`deepcompile` needs `deepspeed`.", "Add `deepspeed:`, or delete it.", "deepcompile", "deepspeed"
        )


@rule("use_ray", "ray_num_workers", "ray_run_name", "resources_per_worker")
def ray_has_to_be_asked_for(cfg: Config) -> Iterator[Problem]:
    """What Ray is told does nothing without it."""
    for key in ("ray_num_workers", "ray_run_name", "resources_per_worker"):
        if cfg.is_set(key) and not cfg.distributed.use_ray:
            yield warning(
                f"`{key}` has no effect without `use_ray: true`.", "Add it, or delete the line.", key
            )


@rule("fsdp_version", "fsdp_config")
def one_version_of_fsdp(cfg: Config) -> Iterator[Problem]:
    """The version stands once, at the top level."""
    config, version = cfg.distributed.fsdp_config, cfg.distributed.fsdp_version
    if config is None:
        if version is not None:
            yield warning(
                "`fsdp_version` has no effect without `fsdp_config`.", "Add `fsdp_config:`.", "fsdp_version"
            )
        return
    if version is not None and config.fsdp_version not in (None, version):
        yield conflict(
            f"`fsdp_version` is `{version}`, but `fsdp_config` says {config.fsdp_version}.",
            "Keep `fsdp_version` at the top level alone.",
            "fsdp_version",
            "fsdp_config.fsdp_version",
        )
    elif fsdp_version(cfg) == 1:
        yield warning(
            "`fsdp_version` 1 is the old FSDP: version 2 runs in its place, with the same results.",
            "Write `fsdp_version: 2`.",
            "fsdp_version",
            "fsdp_config",
        )


@rule("fsdp_config", "fsdp_final_state_dict_type")
def fsdp_options_fit_together(cfg: Config) -> Iterator[Problem]:
    """Some options of FSDP need others."""
    config = cfg.distributed.fsdp_config
    if config is None:
        return
    if config.auto_wrap_policy == "SIZE_BASED_WRAP" and config.min_num_params is None:
        yield conflict(
            "`auto_wrap_policy: SIZE_BASED_WRAP` needs `min_num_params`.",
            "Add `min_num_params:`.",
            "fsdp_config.auto_wrap_policy",
            kind="missing",
        )
    if config.cpu_offload_pin_memory is False and not (fsdp_version(cfg) == 2 and config.offload_params):
        yield conflict(
            "`cpu_offload_pin_memory: false` needs `offload_params` and version 2 of FSDP.",
            "Set `offload_params: true` and `fsdp_version: 2`, or delete it.",
            "fsdp_config.cpu_offload_pin_memory",
        )
    precision = config.mixed_precision_policy
    if precision is not None and precision.lower() not in FSDP_PRECISIONS:
        yield conflict(
            f"`mixed_precision_policy` is `{precision}`; it takes {', '.join(f'`{p}`' for p in FSDP_PRECISIONS)}.",
            "Delete the line to compute in the number type of the weights.",
            "fsdp_config.mixed_precision_policy",
            kind="invalid_value",
        )
    forms = {"fsdp_config.state_dict_type": config.state_dict_type}
    forms["fsdp_config.final_state_dict_type"] = config.final_state_dict_type
    forms["fsdp_final_state_dict_type"] = cfg.distributed.fsdp_final_state_dict_type
    for key, form in forms.items():
        if form == "LOCAL_STATE_DICT":
            yield warning(
                f"`{key}: LOCAL_STATE_DICT` is of the old FSDP: parts are written as SHARDED_STATE_DICT.",
                f"Write `{key.rpartition('.')[2]}: SHARDED_STATE_DICT`.",
                key,
            )


@rule("optimizer", "fsdp_config", "fsdp_version", "deepspeed")
def the_optimizer_can_be_sharded(cfg: Config) -> Iterator[Problem]:
    """Some optimizers need whole matrices, or cannot move their state."""
    name, distributed = cfg.optim.optimizer, cfg.distributed
    remedy = "Choose another optimizer, such as `adamw_torch_fused`."
    if distributed.fsdp_config and (name in WHOLE_STATE or any(part in name for part in OWN_STATE)):
        yield conflict(
            f"`optimizer: {name}` does not work with FSDP: its state cannot be divided and put together again.",
            remedy,
            "optimizer",
            "fsdp_config",
        )
    if distributed.deepspeed and name in WHOLE_MATRICES:
        yield conflict(f"`optimizer: {name}` does not work with DeepSpeed.", remedy, "optimizer", "deepspeed")


@rule("context_parallel_size", "micro_batch_size", "sample_packing", "attn_implementation")
def shared_rows_have_limits(cfg: Config) -> Iterator[Problem]:
    """Devices that share a row need flash attention, and one packed row at a time."""
    if (cfg.distributed.context_parallel_size or 1) < 2:
        return
    if cfg.data.sample_packing and cfg.train.micro_batch_size not in (1, "auto"):
        yield conflict(
            "`context_parallel_size` takes one packed row at a time, but `micro_batch_size` is "
            f"{cfg.train.micro_batch_size}.",
            "Set `micro_batch_size: 1`.",
            "micro_batch_size",
            "context_parallel_size",
        )
    attention = cfg.model.attn_implementation
    if attention is not None and "flash" not in attention:
        yield conflict(
            f"`context_parallel_size` needs flash attention, but `attn_implementation` is `{attention}`.",
            "Set `attn_implementation: flash_attention_2`.",
            "attn_implementation",
            "context_parallel_size",
        )


@rule("context_parallel_size", "deepspeed", "rl")
def who_can_share_rows(cfg: Config) -> Iterator[Problem]:
    """Rows are shared in supervised training, under DDP and FSDP."""
    if (cfg.distributed.context_parallel_size or 1) < 2:
        return
    if cfg.distributed.deepspeed:
        yield conflict(
            "`context_parallel_size` is not available together with `deepspeed`.",
            "Shard the model with `fsdp_config` (and `fsdp_version: 2`) instead.",
            "context_parallel_size",
            "deepspeed",
        )
    if cfg.method.rl is not None:
        yield conflict(
            f"`context_parallel_size` is available for supervised training only, not with `rl: {cfg.method.rl}`.",
            "Delete `context_parallel_size`.",
            "context_parallel_size",
            "rl",
        )


@rule("max_memory", "gpu_memory_limit")
def one_limit_of_memory(cfg: Config) -> Iterator[Problem]:
    """Both limit the memory of devices."""
    if cfg.model.max_memory and cfg.model.gpu_memory_limit is not None:
        yield conflict(
            "`max_memory` and `gpu_memory_limit` both limit the memory of devices.",
            "Keep one of them.",
            "max_memory",
            "gpu_memory_limit",
        )


def several_devices_needed(cfg: Config, processes: int) -> list[Problem]:
    """What divides a model among devices although there is one process on one device. Not a rule: it asks the machine."""
    if processes > 1:
        return []
    distributed, found = cfg.distributed, []
    divides = {
        "deepspeed": "DeepSpeed divides a model",
        "fsdp_config": "FSDP divides a model",
        "context_parallel_size": "this divides each row",
        "tensor_parallel_size": "this divides each matrix product",
    }
    for key, what in divides.items():
        if getattr(distributed, key) not in (None, 1, {}, ""):
            place = cfg.key_place(key)
            found.append(
                Problem(
                    f"`{key}`: there is one device and one process, and {what} among several.",
                    f"Delete the line `{key}:`, or start on several GPUs.",
                    "conflict",
                    (key,),
                    (place,),
                    cfg.excerpt(place),
                    "AX1407",
                )
            )
    return found
