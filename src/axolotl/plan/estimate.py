"""The plan of a run: parameters, memory, time, disk, for one GPU and for one config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from axolotl.config import Config
from axolotl.config.resolve import Hardware
from axolotl.distributed.fsdp import DEFERRED_BYTES
from axolotl.errors import ModelError, UserError
from axolotl.model.attention import AttentionChoice
from axolotl.optim.groups import is_embedding
from axolotl.plan.fused import fuse, on_tensors
from axolotl.plan.gpus import GIB, Gpu
from axolotl.plan.layout import Layout
from axolotl.plan.ledger import Account, Usage
from axolotl.plan.optimizer_state import State, Trained, optimizer_state
from axolotl.plan.rehearsal import ATTENTION, Batch, Manner, Rehearsal
from axolotl.plan.skeleton import build_skeleton, double_quantised, packed_bytes, packed_layers
from axolotl.plan.time import StepTime, step_time

CONTEXT = int(0.75 * GIB)
"""Bytes that the CUDA context takes beside PyTorch's allocator: what a first run on an H200 showed (memory_grid.json)."""
FRAGMENTATION = 0.02
"""Share of the moving memory (activations, logits, temporary) that is lost between blocks; an estimate."""
CATEGORIES = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "temporary")


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, and bytes as they are held on one GPU that has all of them."""

    total: int
    trained: int
    weight_bytes: int
    trained_bytes: int
    largest_layer_bytes: int
    """Of the repeated layers, the weights of the largest one."""
    outside_bytes: int
    """Weights outside of these layers: embeddings, head, last norm."""
    state: State


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the moment of most use."""

    by_category: dict[str, int]
    phase: str
    """When that is: forward, loss, backward of the loss, backward, or evaluation."""

    @property
    def allocated(self) -> int:
        """What torch.cuda.max_memory_allocated would show."""
        return sum(self.by_category.values())

    @property
    def fragmentation(self) -> int:
        moving = sum(self.by_category.get(k, 0) for k in ("activations", "logits", "temporary"))
        return int(FRAGMENTATION * moving)

    @property
    def needed(self) -> int:
        """With what the allocator loses and the CUDA context."""
        return self.allocated + self.fragmentation + CONTEXT


@dataclass(frozen=True)
class Requirement:
    """What a config needs of one GPU, without a word on its data beyond the shape of a batch."""

    parameters: Parameters
    training: Memory
    evaluation: Memory | None
    step: StepTime
    evaluated: float
    """Seconds of one forward pass of the evaluation; 0 where there is none."""
    batch: Batch
    phases: dict[str, int]
    """The most bytes in each phase of training, on a GPU that has all of the model."""
    notes: tuple[str, ...] = field(default=())
    host: dict[str, int] = field(default_factory=dict)
    """Bytes of RAM that all processes of a machine hold for the GPUs, by what they are for."""

    @property
    def needed(self) -> int:
        """Bytes that the GPU must have, for training and for evaluating."""
        return max(self.training.needed, self.evaluation.needed if self.evaluation else 0)


def requirement(
    cfg: Config,
    gpu: Gpu,
    hardware: Hardware,
    layout: Layout,
    attention: AttentionChoice,
    batch: Batch,
    *,
    usual: Batch | None = None,
    evaluation: Batch | None = None,
    vocabulary: int | None = None,
    depth: int | None = None,
) -> Requirement:
    """Rehearses a step of the resolved config on the layout's GPUs.

    `batch` decides the memory, `usual` (by default the same) the time; `depth` is another number of layers. Raises ModelError for a model that cannot be
    rehearsed, because what it does depends on the content of its tensors.
    """
    name = "eager" if attention.name == "eager" else ATTENTION
    model = build_skeleton(cfg.model, cfg.adapter, hardware, name, vocabulary, depth)
    whole: Any = model
    inner = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    notes: list[str] = []
    fuse(inner, cfg.kernels)
    parameters = count_parameters(model, cfg, layout)
    manner = _manner(cfg, parameters)
    batch, usual = _shared(batch, layout), _shared(usual or batch, layout)
    try:
        with Rehearsal(model, manner, on_tensors(inner, cfg.kernels)) as rehearsal:
            if cfg.kernels.lora_fp8_base:
                rehearsal.first_step(batch)
            rehearsal.step(batch)
            rehearsal.forget_gradients()
            usage, work = rehearsal.ledger.usage, rehearsal.ledger.account
            away = rehearsal.away
            training = _spread(usage, parameters, layout, manner.accumulates)
            looked = None
            if evaluation is not None:
                looked, seconds = _evaluated(
                    rehearsal, _shared(evaluation, layout), parameters, layout, gpu, cfg
                )
            if usual != batch:
                work = _again(rehearsal, usual)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelError(
            f"`{cfg.model.base_model}` cannot be planned: its step cannot be rehearsed ({reason})."
        ) from error
    if cfg.method.rl:
        notes.append(
            f"`rl: {cfg.method.rl}` is planned as supervised fine-tuning: what it adds is not counted."
        )
    if cfg.train.torch_compile is True:
        notes.append("`torch_compile` is planned as if it were off: it needs less memory and time.")
    if cfg.model.fp8:
        notes.append("`fp8` is planned as if it were off: its products take less time.")
    if layout.tensor > 1:
        notes.append("What layers hold between GPUs that share products is counted whole: it is less.")
    if layout.gpus > 1:
        notes.append(
            "What several GPUs hold and exchange is worked out from the strategy, and was compared with no run."
        )
    time = step_time(
        work,
        gpu,
        accumulation=cfg.train.gradient_accumulation_steps,
        bits16=_dtype(cfg) != torch.float32,
        update_bytes=parameters.state.traffic / (layout.shards if layout.state else 1) / layout.tensor,
        exchanged=_exchanged(parameters, layout, cfg, _hidden_bytes(inner, usual, _dtype(cfg))),
        shared=layout.tensor,
    )
    return Requirement(
        parameters,
        training,
        looked,
        time,
        seconds if evaluation is not None else 0.0,
        batch,
        dict(usage.by_phase),
        tuple(notes),
        _on_host(cfg, parameters, layout, away),
    )


def _evaluated(
    rehearsal: Rehearsal, batch: Batch, parameters: Parameters, layout: Layout, gpu: Gpu, cfg: Config
) -> tuple[Memory, float]:
    ledger = rehearsal.ledger
    ledger.begin_anew()
    rehearsal.evaluate(batch)
    time = step_time(
        ledger.account,
        gpu,
        accumulation=1,
        bits16=_dtype(cfg) != torch.float32,
        update_bytes=0,
        exchanged=0,
        shared=layout.tensor,
    )
    return _spread(ledger.usage, parameters, layout), time.total


def _again(rehearsal: Rehearsal, batch: Batch) -> Account:
    rehearsal.ledger.begin_anew()
    rehearsal.step(batch)
    rehearsal.forget_gradients()
    return rehearsal.ledger.account


def _dtype(cfg: Config) -> torch.dtype:
    model = cfg.model
    if model.float32:
        return torch.float32
    if model.bf16 in (True, "full") or model.bfloat16:
        return torch.bfloat16
    return torch.float16 if model.fp16 or model.float16 else torch.float32


def _manner(cfg: Config, parameters: Parameters) -> Manner:
    train = cfg.train
    autocast = (
        torch.bfloat16 if cfg.model.bf16 in (True, "full") else torch.float16 if cfg.model.fp16 else None
    )
    return Manner(
        autocast,
        train=train,
        kernels=cfg.kernels,
        accumulates=train.gradient_accumulation_steps > 1,
        state_bytes=parameters.state.device,
        double_quantised=double_quantised(cfg.model),
    )


def _shared(batch: Batch, layout: Layout) -> Batch:
    """The part of a batch that one of the GPUs gets that share each row."""
    if layout.context == 1:
        return batch
    part = -(-batch.length // layout.context)
    return Batch(batch.rows, part, batch.pairs / layout.context, batch.packed, batch.masked)


def count_parameters(model: nn.Module, cfg: Config, layout: Layout) -> Parameters:
    """Parameters of a skeleton, trained and in all."""
    packed = {id(layer.weight): layer for layer in packed_layers(model)}
    total, trained, weight_bytes, trained_bytes = 0, 0, 0, 0
    kept: list[Trained] = []
    layers: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        total += count
        if id(parameter) in packed:
            layer = packed[id(parameter)]
            size = packed_bytes(count, layer.bits, layer.out_features, double_quantised(cfg.model))
        else:
            size = count * parameter.element_size()
        if parameter.requires_grad:
            trained += count
            trained_bytes += size
            kept.append(Trained(tuple(parameter.shape), parameter.element_size(), is_embedding(name)))
        weight_bytes += size
        layers[_layer(name)] = layers.get(_layer(name), 0) + size
    state = optimizer_state(cfg.optim, kept)
    if layout.master_copies:
        # DeepSpeed holds a float32 copy of each trained weight and its optimizer's two states in float32.
        state = State(12 * trained, 0, 30 * trained)
    if layout.state_on_host:
        state = State(0, 0, state.traffic, state.device + state.paged)
    outside = layers.pop("", 0)
    return Parameters(
        total, trained, weight_bytes, trained_bytes, max(layers.values(), default=0), outside, state
    )


def _layer(name: str) -> str:
    """The repeated layer that a parameter belongs to (`…layers.3`), or nothing."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if at is None else ".".join(parts[: at + 1])


def _spread(usage: Usage, parameters: Parameters, layout: Layout, accumulates: bool = False) -> Memory:
    """The peak as one of the layout's GPUs sees it."""
    peak = dict.fromkeys(CATEGORIES, 0) | {k: v for k, v in usage.peak.by_category.items() if v}
    if layout.gpus == 1:
        return Memory(peak, usage.peak.phase)
    parts = layout.shards
    layers = parameters.weight_bytes - parameters.outside_bytes
    if layout.weights:
        # Embeddings, last norm and head stay whole for the step; a layer is in use while the next one comes.
        gathered = min(2 * parameters.largest_layer_bytes, layers) if layout.reshards else layers
        held = (peak["weights"] + peak["adapter"]) // parts if not layout.weights_on_host else 0
        peak["weights"] = held + gathered + parameters.outside_bytes
        peak["adapter"] = 0
    if layout.gradients:
        # A layer's gradients are whole until they are divided, and are summed in float32.
        layer = min(parameters.largest_layer_bytes, parameters.trained_bytes)
        whole = min(parameters.trained_bytes, layer + parameters.outside_bytes)
        if accumulates and 4 * parameters.trained <= DEFERRED_BYTES:
            whole = parameters.trained_bytes
        peak["temporary"] += whole + 2 * layer
        peak["gradients"] = 0 if layout.state_on_host else peak["gradients"] // parts
    elif layout.copies > 1:
        # The buckets in which gradients are summed over the GPUs are a second copy of them.
        peak["temporary"] += parameters.trained_bytes // layout.tensor
    if layout.state and layout.shards > 1:
        peak["optimizer"] = peak["optimizer"] // parts
    if layout.tensor > 1:
        for key in ("weights", "adapter", "gradients", "optimizer"):
            peak[key] //= layout.tensor
    return Memory(peak, usage.peak.phase)


def _on_host(cfg: Config, parameters: Parameters, layout: Layout, away: int) -> dict[str, int]:
    """Bytes of RAM that the run holds for its GPUs, all of its processes together, by what they are for."""
    found: dict[str, int] = {}
    copies = max(1, layout.gpus // (layout.tensor * layout.shards))
    if layout.weights_on_host:
        found["offloaded weights"] = parameters.weight_bytes * copies
    if layout.state_on_host:
        found["offloaded optimizer and gradients"] = (
            parameters.state.host + parameters.trained_bytes
        ) * copies
    if away and cfg.train.activation_offloading != "disk":
        found["offloaded activations"] = away * layout.gpus
    if cfg.train.save_async and layout.shards == 1:
        adapter = cfg.adapter.adapter is not None
        state = 0 if cfg.train.save_only_model else parameters.state.device + parameters.state.paged
        found["copy for save_async"] = (
            parameters.trained_bytes if adapter else parameters.weight_bytes
        ) + state
    return found


def _hidden_bytes(model: Any, batch: Batch, dtype: torch.dtype) -> int:
    """Bytes of what all layers of a model hand on, for one micro batch."""
    config = model.config.get_text_config()
    layers, width = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)
    return int(batch.rows * batch.length * width * layers * dtype.itemsize)


def _exchanged(parameters: Parameters, layout: Layout, cfg: Config, hidden_bytes: int) -> float:
    """Bytes that each GPU sends in a step: gradients once around the ring, sharded weights twice for each micro batch,
    and the sums of products that GPUs share.
    """
    summed = 0.0
    if layout.tensor > 1:
        # Two sums a layer in the forward pass, two in the backward pass, two where it is computed again.
        sums = 6 if cfg.train.gradient_checkpointing else 4
        around = (layout.tensor - 1) / layout.tensor
        summed = 2 * around * sums * cfg.train.gradient_accumulation_steps * hidden_bytes
    if layout.copies < 2:
        return summed
    around = (layout.copies - 1) / layout.copies
    sent = 2 * parameters.trained_bytes * around
    if layout.weights:
        passes = 3 if cfg.train.gradient_checkpointing else 2
        sent += passes * cfg.train.gradient_accumulation_steps * parameters.weight_bytes * around
    return sent / layout.tensor + summed


def as_dict(found: Requirement) -> dict[str, Any]:
    """Plain data, memory in bytes and time in seconds."""
    return {
        "parameters": {"total": found.parameters.total, "trained": found.parameters.trained},
        "memory": {
            name: {
                "at": memory.phase,
                "bytes": dict(memory.by_category)
                | {"fragmentation": memory.fragmentation, "cuda_context": CONTEXT},
                "allocated": memory.allocated,
                "needed": memory.needed,
            }
            for name, memory in (("training", found.training), ("evaluation", found.evaluation))
            if memory is not None
        },
        "host_memory": dict(found.host),
        "step_seconds": {k: round(v, 6) for k, v in found.step.__dict__.items()},
        "evaluation_batch_seconds": round(found.evaluated, 6),
        "notes": list(found.notes),
    }
