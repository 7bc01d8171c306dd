"""How a run is spread over GPUs, and what of the model each of them holds."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl.config.axes import axes_of
from axolotl.config.distributed import DistributedSection
from axolotl.errors import ConfigError
from axolotl.registry import PACKAGE_ROOT

SHIPPED = PACKAGE_ROOT / "assets" / "deepspeed_configs"


@dataclass(frozen=True)
class Layout:
    """Which GPUs share what. `shards` GPUs divide a copy of the model among them."""

    title: str
    gpus: int = 1
    shards: int = 1
    weights: bool = False
    """Weights are divided; layers are gathered when they are needed."""
    reshards: bool = True
    """Gathered layers are given back after the forward pass."""
    gradients: bool = False
    state: bool = False
    master_copies: bool = False
    """The optimizer keeps float32 copies of the weights and of its own states (DeepSpeed)."""
    state_on_host: bool = False
    weights_on_host: bool = False
    tensor: int = 1
    """GPUs that share each matrix product."""
    context: int = 1
    """GPUs that share each row."""

    @property
    def copies(self) -> int:
        """Batches that are worked on at once."""
        return max(1, self.gpus // (self.tensor * self.context))


def layout_of(distributed: DistributedSection, gpus: int | None, present: int) -> Layout:
    """The layout that the config asks for on `gpus` GPUs; None: as many as it names, else those present.

    Raises ConfigError for a number of GPUs that the sizes of the config do not divide.
    """
    tensor, context = distributed.tensor_parallel_size or 1, distributed.context_parallel_size or 1
    shard = max(0, distributed.dp_shard_size or 0)
    named = max(1, shard) * (distributed.dp_replicate_size or 1) * tensor * context
    wants = bool(distributed.deepspeed or distributed.fsdp_config) or named > 1
    count = gpus or max(distributed.world_size or 1, named, present if wants else 1)
    if count == 1 and not distributed.deepspeed:
        return Layout("one GPU")
    axes = axes_of(distributed, count)
    if axes is None:
        raise ConfigError(
            f"{_gpus(count)} cannot be divided as the config says (its sizes make {named}).",
            f"Name {named} with `--gpus`, or other values of `dp_shard_size`, `dp_replicate_size`, "
            "`context_parallel_size` and `tensor_parallel_size`.",
        )
    common: dict[str, Any] = {"gpus": count, "tensor": axes.tensor, "context": axes.context}
    if distributed.deepspeed:
        zero = _zero(distributed.deepspeed)
        stage = int(zero.get("stage", 0) or 0)
        return Layout(
            f"DeepSpeed ZeRO-{stage}, {_gpus(count)}",
            shards=count,
            weights=stage >= 3,
            gradients=stage >= 2,
            state=stage >= 1,
            master_copies=True,
            state_on_host=_on_host(zero.get("offload_optimizer")),
            weights_on_host=_on_host(zero.get("offload_param")),
            **common,
        )
    options = distributed.fsdp_config
    if options:
        host = bool(options.offload_params)
        return Layout(
            f"FSDP, {_gpus(count)}{_together(axes.tensor)}",
            shards=axes.weight_shards,
            weights=True,
            gradients=True,
            state=True,
            reshards=options.reshard_after_forward is not False,
            state_on_host=host,
            weights_on_host=host,
            **common,
        )
    way = "DDP" if axes.tensor == 1 or axes.replicate > 1 else "tensor parallel"
    return Layout(f"{way}, {_gpus(count)}{_together(axes.tensor)}", **common)


def _together(tensor: int) -> str:
    return f", of which {tensor} share each matrix product" if tensor > 1 else ""


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def _on_host(offload: Any) -> bool:
    return isinstance(offload, dict) and offload.get("device") in ("cpu", "nvme")


def _zero(written: str | dict[str, Any]) -> dict[str, Any]:
    """The `zero_optimization` of a DeepSpeed config; of one that cannot be read, the stage that its name says."""
    if isinstance(written, dict):
        return dict(written.get("zero_optimization") or {})
    for file in (Path(written).expanduser(), SHIPPED / Path(written).name):
        try:
            found: dict[str, Any] = (
                json.loads(file.read_text(encoding="utf-8")).get("zero_optimization") or {}
            )
            return found
        except (OSError, ValueError, AttributeError):
            continue
    stage = re.search(r"zero[-_]?(\d)", written)
    return {"stage": int(stage.group(1))} if stage else {}
