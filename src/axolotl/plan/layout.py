"""How a run is spread over GPUs, and what of the model each of them holds."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl.config.distributed import DistributedSection
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
    """The layout that the config asks for on `gpus` GPUs; None: as many as it names, else those present."""
    tensor, context = distributed.tensor_parallel_size or 1, distributed.context_parallel_size or 1
    shard = distributed.dp_shard_size or 0
    named = max(1, shard) * (distributed.dp_replicate_size or 1) * tensor * context
    wants = bool(distributed.deepspeed or distributed.fsdp_config) or named > 1
    count = gpus or max(distributed.world_size or 1, named, present if wants else 1)
    common: dict[str, Any] = {"gpus": count, "tensor": tensor, "context": context}
    if count == 1 and not distributed.deepspeed:
        return Layout("one GPU")
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
    if distributed.fsdp_config or shard > 1:
        options = distributed.fsdp_config
        shards = (
            shard if shard > 1 else max(1, count // (tensor * context * (distributed.dp_replicate_size or 1)))
        )
        host = bool(options and options.offload_params)
        return Layout(
            f"FSDP, {_gpus(count)}",
            shards=shards,
            weights=True,
            gradients=True,
            state=True,
            state_on_host=host,
            weights_on_host=host,
            **common,
        )
    return Layout(f"DDP, {_gpus(count)}", **common)


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
