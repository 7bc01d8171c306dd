"""Automatic values, all in one place: a pure function of the config and of the hardware."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from axolotl.config.config import Config
from axolotl.config.plugins import has_plugin

SEED = 42
MAX_PROCESSES = 16


FUSED = "`fused_kernels` asks for it"


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the machine can do. Memory is in bytes, one number per GPU."""

    device: Literal["cpu", "cuda", "mps"] = "cpu"
    gpu_names: tuple[str, ...] = ()
    bf16: bool = False
    tf32: bool = False
    cpus: int = 1
    gpu_memory_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Resolution:
    """One automatic value and the reason for it."""

    key: str
    value: Any
    reason: str


def resolve(cfg: Config, hardware: Hardware) -> tuple[Config, list[Resolution]]:
    """Fills every automatic value. Returns the new config, and what was filled in and why; both are deterministic."""
    resolutions: list[Resolution] = []
    for step in _STEPS:
        found = [r for r in step(cfg, hardware) if cfg.get(r.key) != r.value]
        cfg = cfg.with_values({r.key: r.value for r in found}, {r.key: r.reason for r in found})
        resolutions += found
    return cfg, resolutions


def _precision(cfg: Config, hardware: Hardware) -> list[Resolution]:
    model = cfg.model
    asked = model.fp16 or model.float16 or model.bfloat16 or model.float32
    if model.bf16 == "full":
        return [Resolution("bf16", True, "`full` also evaluates in bf16, which is always so here")]
    if model.bf16 != "auto":
        return []
    if asked:
        return [Resolution("bf16", False, "another precision is asked for")]
    if hardware.bf16:
        return [Resolution("bf16", True, "this hardware computes in bf16")]
    if hardware.device == "cuda" and model.fp16 is None:
        reason = "this GPU has no bf16"
        return [Resolution("bf16", False, reason), Resolution("fp16", True, reason)]
    return [Resolution("bf16", False, "this hardware has no fast bf16")]


def _tf32(cfg: Config, hardware: Hardware) -> list[Resolution]:
    if cfg.model.tf32 != "auto":
        return []
    return [
        Resolution("tf32", hardware.tf32, "this GPU has TF32" if hardware.tf32 else "no GPU with TF32 here")
    ]


def _seed(cfg: Config, hardware: Hardware) -> list[Resolution]:
    return (
        [] if cfg.train.seed is not None else [Resolution("seed", SEED, "a fixed seed makes runs repeatable")]
    )


def _batch(cfg: Config, hardware: Hardware) -> list[Resolution]:
    train, found = cfg.train, []
    if train.micro_batch_size == "auto":
        found.append(Resolution("micro_batch_size", 1, "`auto` is worked out where training begins"))
    micro = 1 if train.micro_batch_size == "auto" else train.micro_batch_size
    if train.batch_size is not None and not cfg.is_set("gradient_accumulation_steps"):
        steps = max(1, train.batch_size // micro)
        found.append(Resolution("gradient_accumulation_steps", steps, "batch_size / micro_batch_size"))
    if train.eval_batch_size is None:
        found.append(Resolution("eval_batch_size", micro, "follows micro_batch_size"))
    if train.dataloader_num_workers is None:
        found.append(Resolution("dataloader_num_workers", 0, "the data is tokenised already"))
    return found


def _data(cfg: Config, hardware: Hardware) -> list[Resolution]:
    data, found = cfg.data, []
    if data.eval_sample_packing is None:
        found.append(Resolution("eval_sample_packing", data.sample_packing, "follows sample_packing"))
    if data.pad_to_sequence_len is None and data.sample_packing:
        found.append(Resolution("pad_to_sequence_len", True, "packed rows of one length keep memory steady"))
    if data.eval_sequence_len is None:
        found.append(Resolution("eval_sequence_len", data.sequence_len, "follows sequence_len"))
    if data.excess_length_strategy is None:
        found.append(
            Resolution("excess_length_strategy", "drop", "the usual treatment of rows that are too long")
        )
    if data.min_sample_len is None:
        found.append(Resolution("min_sample_len", 2, "shorter rows teach nothing"))
    if data.remove_unused_columns is None:
        found.append(
            Resolution("remove_unused_columns", False, "prepared rows hold only what training needs")
        )
    if data.dataset_num_proc is None:
        processes = max(1, min(hardware.cpus, MAX_PROCESSES))
        found.append(Resolution("dataset_num_proc", processes, "one for each CPU"))
    if data.chat_template is None and data.chat_template_jinja:
        found.append(Resolution("chat_template", "jinja", "chat_template_jinja is set"))
    return found


def _memory(cfg: Config, hardware: Hardware) -> list[Resolution]:
    train = cfg.train
    if train.gradient_checkpointing == "auto":
        return [Resolution("gradient_checkpointing", False, "`auto` is worked out where training begins")]
    if not train.gradient_checkpointing or train.gradient_checkpointing_kwargs:
        return []
    return [
        Resolution(
            "gradient_checkpointing_kwargs",
            {"use_reentrant": False},
            "works with every adapter and with frozen embeddings",
        )
    ]


def _compile(cfg: Config, hardware: Hardware) -> list[Resolution]:
    if cfg.train.torch_compile != "auto":
        return []
    on = hardware.device == "cuda"
    reason = "compiling pays on a GPU" if on else "compiling pays on a GPU, and there is none"
    return [Resolution("torch_compile", on, reason)]


def _fused(cfg: Config, hardware: Hardware) -> list[Resolution]:
    if cfg.kernels.fused_kernels is not None or not hardware.tf32 or cfg.model.trust_remote_code:
        return []
    spread = cfg.distributed
    divided = (
        spread.fsdp_config
        or spread.fsdp_version
        or spread.deepspeed
        or max(spread.tensor_parallel_size or 1, spread.context_parallel_size or 1) > 1
    )
    if divided or cfg.train.torch_compile is True:
        return []
    return [Resolution("fused_kernels", True, "this GPU runs them, and each is tried before it is used")]


def _losses(cfg: Config, hardware: Hardware) -> list[Resolution]:
    kernels = cfg.kernels
    others = (
        kernels.chunked_cross_entropy,
        kernels.liger_cross_entropy,
        kernels.liger_fused_linear_cross_entropy,
    )
    if kernels.cut_cross_entropy is None and not any(others):
        if has_plugin(cfg, "cut_cross_entropy"):
            return [Resolution("cut_cross_entropy", True, "its plugin is listed")]
        if kernels.fused_kernels:
            return [Resolution("cut_cross_entropy", True, FUSED)]
    return []


def _kernels(cfg: Config, hardware: Hardware) -> list[Resolution]:
    if not cfg.kernels.fused_kernels:
        return []
    wanted = ["liger_rms_norm", "liger_rope", "liger_glu_activation"]
    if cfg.adapter.adapter in ("lora", "qlora") and not (
        cfg.model.load_in_8bit or cfg.model.trust_remote_code
    ):
        wanted += ["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"]
    return [Resolution(k, True, FUSED) for k in wanted if cfg.get(k) is None]


def _tracking(cfg: Config, hardware: Hardware) -> list[Resolution]:
    tracking, found = cfg.tracking, []
    if tracking.use_wandb is None:
        found.append(Resolution("use_wandb", bool(tracking.wandb_project), "on when wandb_project is set"))
    if tracking.use_trackio is None:
        found.append(
            Resolution(
                "use_trackio", bool(tracking.trackio_project_name), "on when trackio_project_name is set"
            )
        )
    if tracking.use_mlflow is None:
        found.append(
            Resolution(
                "use_mlflow", bool(tracking.mlflow_experiment_name), "on when mlflow_experiment_name is set"
            )
        )
    if tracking.use_comet is None:
        found.append(
            Resolution("use_comet", bool(tracking.comet_project_name), "on when comet_project_name is set")
        )
    return found


def _distributed(cfg: Config, hardware: Hardware) -> list[Resolution]:
    distributed, found = cfg.distributed, []
    if distributed.fsdp_config and distributed.fsdp_version is None:
        version = distributed.fsdp_config.fsdp_version or 2
        found.append(Resolution("fsdp_version", version, "as fsdp_config says, else today's version"))
    if distributed.fsdp_config and distributed.fsdp_config.activation_checkpointing:
        reason = "`fsdp_config.activation_checkpointing` asks for it"
        found.append(Resolution("gradient_checkpointing", True, reason))
    return found


_STEPS: tuple[Callable[[Config, Hardware], list[Resolution]], ...] = (
    _precision,
    _tf32,
    _seed,
    _batch,
    _data,
    _distributed,
    _memory,
    _compile,
    _fused,
    _losses,
    _kernels,
    _tracking,
)
