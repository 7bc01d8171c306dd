"""Parameter groups: which trained parameters share a learning rate and a weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from axolotl.config.adapter import AdapterSection
from axolotl.config.model import TRAINED_ROWS
from axolotl.config.optim import OptimSection
from axolotl.errors import ConfigError, ModelError, Problem

Group = dict[str, Any]


def is_embedding(name: str) -> bool:
    """True for the token embeddings, the output head, and the copies of them that an adapter trains."""
    return any(
        part in name
        for part in ("embed_tokens", "lm_head", "lora_embedding", "wte.", "embed_in.", "embed_out.")
    )


def parameter_groups(model: nn.Module, optim: OptimSection, adapter: AdapterSection) -> list[Group]:
    """The groups for the optimizer, each with `params`, `name`, `weight_decay`, and `lr` where it is its own.

    Biases, norms and other vectors get no weight decay, and neither do embeddings with a learning rate of their own, nor
    weights of which a range of rows is trained: the other rows would decay too.
    Raises ConfigError where a group of `lr_groups` matches no trained parameter, ModelError where nothing is trained.
    """
    norms = {
        id(p)
        for m in model.modules()
        if "norm" in type(m).__name__.lower()
        for p in m.parameters(recurse=False)
    }
    found: dict[tuple[str | int, bool, Any], Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group, label, lr = _group_of(name, optim, adapter)
        decays = (
            group != "embeddings"
            and parameter.ndim > 1
            and id(parameter) not in norms
            and "bias" not in name
            and not hasattr(parameter, TRAINED_ROWS)
        )
        # An optimizer's step over many weights at once takes those that are divided alike.
        key = (group, decays, parameter.device_mesh if isinstance(parameter, DTensor) else None)
        if key not in found:
            label = label if decays or group == "embeddings" else f"{label}, no decay"
            found[key] = {"params": [], "name": label, "weight_decay": optim.weight_decay if decays else 0.0}
            if lr is not None:
                found[key]["lr"] = lr
        found[key]["params"].append(parameter)
    if not found:
        raise ModelError(
            "No parameter of the model is trained.", "Check `adapter` and `unfrozen_parameters`."
        )
    groups = {group for group, *_ in found}
    missing = [g.name for index, g in enumerate(optim.lr_groups or []) if index not in groups]
    if missing:
        raise ConfigError(
            Problem(
                f"The modules of `lr_groups` entry `{name}` match no trained parameter.",
                "Name parts of parameter names, such as `q_proj`.",
                "invalid_value",
                ("lr_groups",),
            )
            for name in missing
        )
    return list(found.values())


def _group_of(name: str, optim: OptimSection, adapter: AdapterSection) -> tuple[str | int, str, float | None]:
    """A parameter's group (the index in `lr_groups`, or one of ours), its name, and its learning rate where it is not
    the run's.
    """
    for index, each in enumerate(optim.lr_groups or []):
        if any(part in name for part in each.modules):
            return index, each.name, each.lr
    if adapter.loraplus_lr_ratio:
        if "lora_embedding" in name:
            return "lora embeddings", "lora embeddings", adapter.loraplus_lr_embedding
        if "lora_B" in name:
            return "lora_B", "lora_B", optim.learning_rate * adapter.loraplus_lr_ratio
    if is_embedding(name) and (optim.embedding_lr or optim.embedding_lr_scale):
        own = (
            optim.learning_rate * optim.embedding_lr_scale if optim.embedding_lr_scale else optim.embedding_lr
        )
        return "embeddings", "embeddings", own
    return "weights", "weights", None
