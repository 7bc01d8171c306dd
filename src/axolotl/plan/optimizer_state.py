"""What optimizers keep: bytes of state for each trained parameter, by the optimizer's name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from axolotl.config.optim import OptimSection
from axolotl.optim.options import options
from axolotl.plan.ledger import BLOCK_BYTES

BNB_BLOCK, BNB_SMALLEST = 256, 4096
"""Numbers that share a scale in bitsandbytes' 8-bit states, and the size below which it keeps 32 bits."""
BNB_PAGED = 100_000
"""Numbers from which a paged state lies in memory that the driver may move to the host."""
AO_BLOCKS = {"8bit": (256, 1.0), "4bit": (128, 0.5), "fp8": (256, 1.0)}
"""torchao: numbers that share a scale, and bytes of each."""


@dataclass(frozen=True)
class Trained:
    """A trained parameter."""

    shape: tuple[int, ...]
    itemsize: int
    embedding: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class State:
    """Bytes that an optimizer keeps on the device, in pageable memory and in RAM, and those of one update."""

    device: int
    paged: int
    traffic: int
    """Bytes read and written by one step: gradients, parameters, state, and clipping."""
    host: int = 0
    """Bytes that are kept in RAM instead."""


Size = Callable[[Trained], float]


def _copies(count: float) -> Size:
    """`count` states in the parameter's own number type, and the number of steps."""
    return lambda p: count * p.numel * p.itemsize + BLOCK_BYTES


def _adafactor(extra: int = 0) -> Size:
    def size(p: Trained) -> float:
        if len(p.shape) < 2:
            return 4.0 * p.numel * (1 + extra)
        rows, columns = math.prod(p.shape[:-1]), math.prod(p.shape[:-2]) * p.shape[-1]
        return 4.0 * (rows + columns) + 4.0 * extra * p.numel

    return size


def _muon(p: Trained) -> float:
    matrix = len(p.shape) == 2 and not p.embedding
    return p.numel * p.itemsize if matrix else _copies(2)(p)


def _bnb(states: int, bits: int) -> Size:
    def size(p: Trained) -> float:
        if bits == 32 or p.numel < BNB_SMALLEST or p.embedding:
            return 4.0 * states * p.numel
        return states * (p.numel + 4.0 * math.ceil(p.numel / BNB_BLOCK))

    return size


def _ao(kind: str) -> Size:
    block, each = AO_BLOCKS[kind]

    def size(p: Trained) -> float:
        if p.numel < BNB_SMALLEST or p.numel % block:
            return 2.0 * p.numel * p.itemsize
        return 2 * (each * p.numel + 4.0 * p.numel / block)

    return size


def _kahan(p: Trained) -> float:
    return _copies(3 if p.itemsize == 2 else 2)(p)


SIZES: Mapping[str, Size] = {
    **dict.fromkeys(("adamw_torch_fused", "adamw_torch", "adamw_hf"), _copies(2)),
    "sgd": _copies(0),
    "adagrad": _copies(1),
    "rmsprop": _copies(1),
    "adafactor": _adafactor(),
    "muon": _muon,
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), _bnb(2, 8)),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw"), _bnb(2, 32)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), _bnb(1, 8)),
    "paged_lion_32bit": _bnb(1, 32),
    "ademamix": _bnb(3, 32),
    "paged_ademamix_32bit": _bnb(3, 32),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), _bnb(3, 8)),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_32bit"), _bnb(1, 32)),
    "rmsprop_bnb_8bit": _bnb(1, 8),
    **dict.fromkeys(("adamw_torch_8bit", "ao_adamw_8bit"), _ao("8bit")),
    **dict.fromkeys(("adamw_torch_4bit", "ao_adamw_4bit"), _ao("4bit")),
    "ao_adamw_fp8": _ao("fp8"),
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam"), _copies(2)),
    "schedule_free_sgd": _copies(1),
    **dict.fromkeys(("optimi_adamw", "stable_adamw"), _kahan),
    "came_pytorch": _adafactor(extra=1),
    "grokadamw": _copies(3),
}


def optimizer_state(optim: OptimSection, trained: Iterable[Trained]) -> State:
    """What the config's optimizer keeps for these parameters; one that is not in the table counts as AdamW."""
    size = SIZES.get(optim.optimizer, _copies(2))
    own: dict[str, Any] = options(optim)
    if optim.optimizer in ("sgd", "rmsprop") and own.get("momentum"):
        size = _copies(1 if optim.optimizer == "sgd" else 2)
    device, paged, traffic = 0.0, 0.0, 0.0
    clips = 0 if optim.max_grad_norm == 0 else 3
    for parameter in trained:
        state = size(parameter)
        if optim.optimizer.startswith("paged_") and parameter.numel >= BNB_PAGED:
            paged += state
        else:
            device += state
        traffic += (3 + clips) * parameter.numel * parameter.itemsize + 2 * state
    return State(int(device), int(paged), int(traffic))
