"""The optimizers that torch, transformers and optional packages bring, and those known but not available here."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor

from axolotl.config.optim import OptimSection
from axolotl.errors import EnvironmentProblem
from axolotl.optim.combined import Combined
from axolotl.optim.groups import Group, is_embedding
from axolotl.optim.options import adam, adam_betas, options
from axolotl.optim.registry import optimizers
from axolotl.registry import require_extra


@optimizers.register(
    "adamw_torch_fused", "adamw_torch", "adamw_hf", keys=("adam_beta1", "adam_beta2", "adam_epsilon")
)
def adamw(groups: list[Group], optim: OptimSection, model: nn.Module) -> Optimizer:
    """torch's AdamW, in one fused kernel where every parameter allows it."""
    dense = {p.device.type for g in groups for p in g["params"]} <= {"cpu", "cuda"}
    floating = all(p.is_floating_point() for g in groups for p in g["params"])
    return torch.optim.AdamW(groups, **({"fused": dense and floating} | adam(optim)))


@optimizers.register("sgd", keys=())
def sgd(groups: list[Group], optim: OptimSection, model: nn.Module) -> Optimizer:
    return torch.optim.SGD(groups, lr=optim.learning_rate, **options(optim))


@optimizers.register("adagrad", keys=())
def adagrad(groups: list[Group], optim: OptimSection, model: nn.Module) -> Optimizer:
    return torch.optim.Adagrad(groups, lr=optim.learning_rate, **options(optim))


@optimizers.register("rmsprop", keys=())
def rmsprop(groups: list[Group], optim: OptimSection, model: nn.Module) -> Optimizer:
    return torch.optim.RMSprop(groups, lr=optim.learning_rate, **options(optim))


@optimizers.register("adafactor", keys=())
def adafactor(groups: list[Group], optim: OptimSection, model: nn.Module) -> Optimizer:
    """Adafactor at the learning rate of the schedule, not at one of its own making."""
    own: dict[str, Any] = {"scale_parameter": False, "relative_step": False}
    return Adafactor(groups, lr=optim.learning_rate, **(own | options(optim)))


@optimizers.register("muon", keys=("adam_beta1", "adam_beta2", "adam_epsilon"))
def muon(groups: list[Group], optim: OptimSection, model: nn.Module) -> Optimizer:
    """Muon for the matrices of the layers; AdamW for embeddings, head and vectors.

    `optim_args` go to Muon. Its steps are scaled to those of AdamW, so that one learning rate fits both.
    """
    if not hasattr(torch.optim, "Muon"):
        raise EnvironmentProblem(f"torch {torch.__version__} has no Muon.", "Install torch 2.9 or newer.")
    embeddings = {id(p) for name, p in model.named_parameters() if is_embedding(name)}
    matrices, others = [], []
    for group in groups:
        rest = {k: v for k, v in group.items() if k != "params"}
        chosen = [p for p in group["params"] if p.ndim == 2 and id(p) not in embeddings]
        left = [p for p in group["params"] if p.ndim != 2 or id(p) in embeddings]
        if chosen:
            matrices.append({"params": chosen, **rest})
        if left:
            others.append({"params": left, **rest})
    parts: list[Optimizer] = []
    if matrices:
        own: dict[str, Any] = {"adjust_lr_fn": "match_rms_adamw"}
        parts.append(torch.optim.Muon(matrices, lr=optim.learning_rate, **(own | options(optim))))
    if others:
        parts.append(adamw(others, optim.model_copy(update={"optim_args": None}), model))
    return Combined(*parts)


def _on_cpu(groups: list[Group]) -> bool:
    return all(p.device.type == "cpu" for group in groups for p in group["params"])


def _bitsandbytes(name: str, groups: list[Group], model: nn.Module, arguments: dict[str, Any]) -> Optimizer:
    """An optimizer of bitsandbytes. Embeddings keep their state in 32 bits: 8 make them unstable."""
    package = require_extra("bitsandbytes", "bitsandbytes", f"`optimizer: {name}`", "optimizer")
    kind = {
        "adamw": "AdamW",
        "lion": "Lion",
        "ademamix": "AdEMAMix",
        "rmsprop": "RMSprop",
    }[next(k for k in ("ademamix", "adamw", "lion", "rmsprop") if k in name)]
    if "8bit" in name:
        overrides = package.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                overrides.register_module_override(module, "weight", {"optim_bits": 32})
    if kind == "AdEMAMix" and name.startswith("paged_") and _on_cpu(groups):
        raise EnvironmentProblem(
            f"The optimizer `{name}` needs a GPU.",
            f"Use `optimizer: {name.removeprefix('paged_').removesuffix('_32bit')}`.",
        )
    if kind != "RMSprop":
        arguments = {"is_paged": name.startswith("paged_")} | arguments
    return getattr(package.optim, kind)(groups, optim_bits=8 if "8bit" in name else 32, **arguments)


@optimizers.register(
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw",
    keys=("adam_beta1", "adam_beta2", "adam_epsilon"),
    extra="bitsandbytes",
    package="bitsandbytes",
)
def adamw_bitsandbytes(groups: list[Group], optim: OptimSection, model: nn.Module) -> Optimizer:
    """AdamW with its state in 8 bits, or paged out of the GPU's memory when that runs short."""
    return _bitsandbytes(optim.optimizer, groups, model, adam(optim))


@optimizers.register(
    "lion_8bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    keys=("adam_beta1", "adam_beta2"),
    extra="bitsandbytes",
    package="bitsandbytes",
)
def lion_bitsandbytes(groups: list[Group], optim: OptimSection, model: nn.Module) -> Optimizer:
    """Lion with its state in 8 bits, or paged."""
    own = {"lr": optim.learning_rate, "betas": adam_betas(optim, (0.9, 0.99))}
    return _bitsandbytes(optim.optimizer, groups, model, own | options(optim))


@optimizers.register(
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    keys=("adam_beta1", "adam_beta2", "adam_beta3", "adam_epsilon"),
    extra="bitsandbytes",
    package="bitsandbytes",
)
def ademamix(groups: list[Group], optim: OptimSection, model: nn.Module) -> Optimizer:
    """AdEMAMix: AdamW with a second, slower average of the gradients."""
    third = 0.9999 if optim.adam_beta3 is None else optim.adam_beta3
    own = {"lr": optim.learning_rate, "betas": (*adam_betas(optim), third), "eps": optim.adam_epsilon or 1e-8}
    return _bitsandbytes(optim.optimizer, groups, model, own | options(optim))


@optimizers.register(
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    keys=(),
    extra="bitsandbytes",
    package="bitsandbytes",
)
def rmsprop_bitsandbytes(groups: list[Group], optim: OptimSection, model: nn.Module) -> Optimizer:
    return _bitsandbytes(optim.optimizer, groups, model, {"lr": optim.learning_rate} | options(optim))


@optimizers.register(
    "adamw_torch_8bit",
    "adamw_torch_4bit",
    "ao_adamw_8bit",
    "ao_adamw_4bit",
    "ao_adamw_fp8",
    keys=("adam_beta1", "adam_beta2", "adam_epsilon"),
    extra="torchao",
    package="torchao",
)
def adamw_torchao(groups: list[Group], optim: OptimSection, model: nn.Module) -> Optimizer:
    """AdamW of torchao, its state in 8 bits, 4 bits or 8-bit floats."""
    package = require_extra("torchao.optim", "torchao", f"`optimizer: {optim.optimizer}`", "optimizer")
    kind = next(
        k for end, k in (("8bit", "8bit"), ("4bit", "4bit"), ("fp8", "Fp8")) if optim.optimizer.endswith(end)
    )
    return getattr(package, f"AdamW{kind}")(groups, **adam(optim))


@optimizers.register(
    "schedule_free_adamw",
    "schedule_free_radam",
    keys=("adam_beta1", "adam_beta2", "adam_epsilon"),
    extra="optimizers",
    package="schedulefree",
)
@optimizers.register("schedule_free_sgd", keys=(), extra="optimizers", package="schedulefree")
def schedule_free(groups: list[Group], optim: OptimSection, model: nn.Module) -> Optimizer:
    """An optimizer that averages its own path instead of following a schedule; use it with a constant one."""
    package = require_extra("schedulefree", "optimizers", f"`optimizer: {optim.optimizer}`", "optimizer")
    if optim.optimizer.endswith("sgd"):
        return package.SGDScheduleFree(groups, lr=optim.learning_rate, **options(optim))
    kind = package.RAdamScheduleFree if optim.optimizer.endswith("radam") else package.AdamWScheduleFree
    return kind(groups, **adam(optim))


@optimizers.register(
    "optimi_adamw",
    "stable_adamw",
    keys=("adam_beta1", "adam_beta2", "adam_epsilon"),
    extra="optimizers",
    package="optimi",
)
def optimi(groups: list[Group], optim: OptimSection, model: nn.Module) -> Optimizer:
    """AdamW of optimi, exact in pure bfloat16 by Kahan summation; or StableAdamW, which clips its own updates."""
    package = require_extra("optimi", "optimizers", f"`optimizer: {optim.optimizer}`", "optimizer")
    kind = package.StableAdamW if optim.optimizer == "stable_adamw" else package.AdamW
    # Left to itself it takes Triton wherever that is installed.
    own = {"triton": False} if _on_cpu(groups) else {}
    return kind(groups, **(own | adam(optim)))


@optimizers.register(
    "came_pytorch",
    keys=("adam_beta1", "adam_beta2", "adam_beta3", "adam_epsilon", "adam_epsilon2"),
    extra="optimizers",
    package="came_pytorch",
)
def came(groups: list[Group], optim: OptimSection, model: nn.Module) -> Optimizer:
    """CAME: Adafactor's memory with Adam's stability."""
    package = require_extra("came_pytorch", "optimizers", f"`optimizer: {optim.optimizer}`", "optimizer")
    third = 0.9999 if optim.adam_beta3 is None else optim.adam_beta3
    eps = (optim.adam_epsilon or 1e-30, optim.adam_epsilon2 or 1e-16)
    own = {"lr": optim.learning_rate, "betas": (*adam_betas(optim), third), "eps": eps}
    return package.CAME(groups, **(own | options(optim)))


def _unavailable(groups: list[Group], optim: OptimSection, model: nn.Module) -> Optimizer:
    why = optimizers.describe(optim.optimizer).facts["unavailable"]
    raise EnvironmentProblem(f"The optimizer `{optim.optimizer}` is not available: {why}.")


optimizers.register(
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adafactor",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "q_galore_adamw8bit",
    unavailable="GaLore's package is no longer kept up; LoRA or adamw_8bit save as much memory",
)(_unavailable)
optimizers.register(
    "apollo_adamw",
    "apollo_adamw_layerwise",
    unavailable="APOLLO is not built in yet; adamw_8bit saves memory too",
)(_unavailable)
optimizers.register(
    "lomo", "adalomo", unavailable="LOMO steps inside the backward pass, which this trainer does not do"
)(_unavailable)
optimizers.register(
    "adamw_anyprecision", unavailable="its package torchdistx was given up; use optimi_adamw"
)(_unavailable)
optimizers.register("dion", unavailable="Dion is not built in yet; use muon")(_unavailable)
optimizers.register("sinkgd", unavailable="SinkGD is not built in yet; use adafactor")(_unavailable)
optimizers.register(
    "flash_adamw",
    "flash_adam",
    "flash_sgd",
    "flash_sgdw",
    "flash_lion",
    unavailable="the flash optimizers are not built in yet; use adamw_torch_fused",
)(_unavailable)
optimizers.register(
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adamw_apex_fused",
    unavailable="use adamw_torch_fused on this platform",
)(_unavailable)
