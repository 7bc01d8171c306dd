"""Our kernels in a rehearsal: the same operations with the same tensors kept, and programs that start nothing.

Where a kernel is for layers that a rehearsal cannot tell by their numbers, they are told by their structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from axolotl.config.kernels import KernelsSection
from axolotl.kernels import cross_entropy, fp8, gates, norms, rotary
from axolotl.model.decoder_layers import is_pre_norm
from axolotl.model.fused_loss import fuse_loss, unfit
from axolotl.model.replace import Replacements, with_global
from axolotl.model.shapes import GatedMlp, activation_of, rotary_of
from axolotl.plan.fused_lora import Shapes, fuse_lora, places_without_content
from axolotl.plan.ledger import Ledger

_LOSSES = (
    "cut_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "chunked_cross_entropy",
    "liger_cross_entropy",
    "flash_attn_cross_entropy",
)
_OF_LORA = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
_ON_TENSORS = (*_OF_LORA, "lora_fp8_base")
_FILES: tuple[Any, ...] = (cross_entropy, fp8, gates, norms, rotary)


def fuse(model: Any, kernels: KernelsSection) -> None:
    """Gives a skeleton the kernels that the keys ask for.

    `model` is transformers' model, without PEFT's wrapper.
    """
    made = Replacements()
    if any(getattr(kernels, key) for key in _LOSSES) and not unfit(model):
        fuse_loss(model, made, kernels.chunked_cross_entropy_num_chunks, triton=True)
    for module in list(model.modules()):
        if kernels.liger_rms_norm and _is_rms_norm(module):
            made.forward(module, _norm_forward)
        if kernels.liger_rope and (function := rotary_of(module)) is not None:
            forward = with_global(type(module).forward, function.__name__, rotary.rotary)
            if forward is not None:
                made.forward(module, forward)
        if kernels.liger_glu_activation and (mlp := _mlp(module)) is not None:
            made.forward(module, _gated_forward(mlp))


def on_tensors(model: Any, kernels: KernelsSection) -> Callable[[], Replacements]:
    """What gives a skeleton the kernels that move weights, to be called once these have (fake) memory."""
    if not any(getattr(kernels, key) for key in _ON_TENSORS):
        return Replacements
    mlps = {module: mlp for module in model.modules() if (mlp := _mlp(module)) is not None}
    pre_norm = (
        [layer for layer in model.modules() if is_pre_norm(layer)]
        if all(getattr(kernels, key) for key in _OF_LORA)
        else []
    )
    return lambda: fuse_lora(model, kernels, Shapes(mlps, pre_norm))


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = "rmsnorm" in type(module).__name__.lower()
    return named and isinstance(weight, nn.Parameter) and weight.ndim == 1 and not any(module.children())


def _norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    eps = float(getattr(self, "variance_epsilon", getattr(self, "eps", 1e-6)))
    return norms.rms_norm(hidden_states, self.weight, eps)


def _mlp(module: nn.Module) -> GatedMlp | None:
    parts = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
    act = getattr(module, "act_fn", None)
    gate, up, down = parts
    if not (isinstance(gate, nn.Module) and isinstance(up, nn.Module) and isinstance(down, nn.Module)):
        return None
    name = activation_of(act) if callable(act) else None
    return None if name is None else GatedMlp(gate, up, down, name)


def _gated_forward(mlp: GatedMlp) -> Any:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        assert mlp.up is not None
        out: torch.Tensor = mlp.down(gates.gated(mlp.gate(x), mlp.up(x), mlp.act))
        return out

    return forward


class _Silent:
    """Stands for a file of Triton programs: any program, on any grid, reads and writes its tensors and does nothing."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __getattr__(self, name: str) -> _Silent:
        return self

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            moved = sum(t.numel() * t.element_size() for t in args if isinstance(t, torch.Tensor))
            self._ledger.add("memory", 0.0, float(moved))

        return launch


@contextmanager
def silent_programs(ledger: Ledger) -> Iterator[None]:
    """Inside, kernels take the way of a GPU, and their programs are only counted."""
    before = [(file, name, getattr(file, name)) for file in _FILES for name in ("runs_on", "programs")]
    chunk, scaled, turned = dict(cross_entropy.CHUNK_LOGITS), fp8.has_scaled_gemm, fp8.turned

    def kept(values: torch.Tensor) -> torch.Tensor:
        # The copy for the backward pass stays, as the weights do.
        with ledger.during(ledger.phase, "weights"):
            return turned(values)

    try:
        for file in _FILES:
            file.runs_on = lambda x: True
            file.programs = lambda name: _Silent(ledger)
        fp8.has_scaled_gemm, fp8.turned = (lambda device: True), kept
        cross_entropy.CHUNK_LOGITS["cpu"] = chunk["cuda"]
        with places_without_content():
            yield
    finally:
        for file, name, value in before:
            setattr(file, name, value)
        fp8.has_scaled_gemm, fp8.turned = scaled, turned
        cross_entropy.CHUNK_LOGITS.update(chunk)
