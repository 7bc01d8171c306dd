"""LoRA's kernels in a rehearsal: the same groups of layers as in a run, with frozen weights that have no content."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from axolotl.config.kernels import KernelsSection
from axolotl.kernels import lora
from axolotl.kernels.frozen import Frozen
from axolotl.kernels.nf4 import FourBitStack
from axolotl.kernels.norms import Norm
from axolotl.model.decoder_layers import PROJECTIONS as PROJECTIONS_OF_ATTENTION
from axolotl.model.decoder_layers import Halves, fuse_decoder_layer
from axolotl.model.lora_layers import Group, Waiting, fuse_linears, fuse_mlp, hold_in_eight_bits, misfit
from axolotl.model.replace import Replacements
from axolotl.model.shapes import GatedMlp
from axolotl.plan.skeleton import PackedLinear

PROJECTIONS = {"lora_qkv_kernel": ("q_proj", "k_proj", "v_proj"), "lora_o_kernel": ("o_proj",)}


class _PackedStack(FourBitStack):
    """Frozen packed weights that share their input."""

    def __init__(self, layers: list[PackedLinear]) -> None:
        self.layers = layers
        self.N, self.K = sum(each.out_features for each in layers), layers[0].in_features

    def widened(self, dtype: torch.dtype, room: int) -> torch.Tensor | None:
        wide = torch.empty(self.N, self.K + room, dtype=dtype, device=self.layers[0].packed.device)
        start = 0
        for each in self.layers:
            wide[start : start + each.out_features, : self.K] = each.unpacked(dtype)
            start += each.out_features
        return wide


class _Planned(Group):
    def _frozen(self, bases: list[Any], room: int, made: Replacements) -> Frozen:
        if all(isinstance(each, PackedLinear) for each in bases):
            return _PackedStack(bases)
        return super()._frozen(bases, room, made)


def _reached(base: Any) -> bool:
    return type(base) is nn.Linear or (isinstance(base, PackedLinear) and base.bits == 4)


@dataclass(frozen=True)
class Shapes:
    """What a model consists of, found before its tensors are fake."""

    mlps: dict[nn.Module, GatedMlp]
    """Its gated feed-forward layers."""
    pre_norm: list[Any]
    """Its decoder layers whose halves can be one pass each."""


def fuse_lora(model: Any, kernels: KernelsSection, shapes: Shapes) -> Replacements:
    """Gives a model on fake tensors the LoRA kernels that the keys ask for, where its layers take them. What it returns
    is to be held as long as the model, as a run does: it may hold memory.

    `model` is transformers' model, without PEFT's wrapper.
    """
    made = Replacements()
    groups: dict[nn.Module, Group] = {}
    waiting: dict[nn.Module, Waiting] = {}

    def group(layers: Sequence[Any], *, fold: bool = True) -> _Planned | None:
        if any(not isinstance(each, nn.Module) or misfit(each, _reached) for each in layers):
            return None
        found = _Planned(layers, made, fold=fold)
        groups.update(dict.fromkeys(layers, found))
        return found

    if kernels.lora_fp8_base:
        for module in list(model.modules()):
            base = getattr(module, "base_layer", None)
            if type(base) is nn.Linear and not misfit(module) and not base.weight.requires_grad:
                hold_in_eight_bits(base, made)
                alone = group([module], fold=False)
                assert alone is not None
                fuse_linears(alone, made, "")
    if kernels.lora_mlp_kernel:
        for module, mlp in shapes.mlps.items():
            fits = all(
                not misfit(each, _reached) for each in (mlp.gate, mlp.up, mlp.down) if each is not None
            )
            first = group([mlp.gate] if mlp.up is None else [mlp.gate, mlp.up]) if fits else None
            down = group([mlp.down]) if fits else None
            if first is not None and down is not None:
                fuse_mlp(module, mlp, first, down, made, "")
    for key, names in PROJECTIONS.items():
        if getattr(kernels, key):
            for module in list(model.modules()):
                layers: list[Any] = [getattr(module, name, None) for name in names]
                found = group(layers, fold=key != "lora_o_kernel")
                if found is not None:
                    waiting[layers[0]] = fuse_linears(found, made, "")
    for layer in shapes.pre_norm:
        halves = _halves(layer, shapes.mlps.get(layer.mlp), groups, waiting)
        if halves is not None:
            fuse_decoder_layer(layer, halves, made, "")
    return made


def _halves(
    layer: Any, mlp: GatedMlp | None, groups: dict[nn.Module, Group], waiting: dict[nn.Module, Waiting]
) -> Halves | None:
    q, _, _, o = (getattr(layer.self_attn, name) for name in PROJECTIONS_OF_ATTENTION)
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if mlp is None or any(norm.weight.requires_grad for norm in norms):
        return None
    qkv, output, gate_up, down = (groups.get(each) for each in (q, o, mlp.gate, mlp.down))
    if qkv is None or output is None or gate_up is None or down is None:
        return None
    # What a norm computes does not matter here.
    norm = Norm(1e-6, 0.0, True)
    return Halves(norm, norm, qkv, waiting[q], output, gate_up, down, mlp)


@contextmanager
def places_without_content() -> Iterator[None]:
    """Inside, a tensor's place is that of its storage: fake tensors have no memory that could be pointed at."""
    before = lora.place
    try:
        lora.place = lambda tensor: tensor.untyped_storage()._cdata
        yield
    finally:
        lora.place = before
