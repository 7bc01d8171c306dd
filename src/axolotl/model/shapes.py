"""What a module is, told by its shape and by what it does to a few numbers, not by its name or its model's.

Shapes: H width of the model, M width inside a feed-forward layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from axolotl.kernels.gates import ACTIVATIONS, activation
from axolotl.kernels.norms import Norm, plain_rms_norm
from axolotl.kernels.rotary import plain_rotary
from axolotl.model.replace import own_forward


@dataclass(frozen=True)
class GatedMlp:
    """`down(act(gate(x)) * up(x))`; with `up` None, the layer `gate` makes both, gate first."""

    gate: nn.Module
    up: nn.Module | None
    down: nn.Module
    act: str


def norm_of(module: nn.Module) -> Norm | None:
    """What kind of root-mean-square norm a module is, or None. Tried in bfloat16, where the rounding shows."""
    own = dict(module.named_parameters(recurse=False))
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        list(own) != ["weight"]
        or own["weight"].ndim != 1
        or any(module.children())
        or not isinstance(eps, float)
    ):
        return None
    if any(True for _ in module.buffers()):
        return None
    weight = own["weight"]
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(3, weight.shape[0], generator=draw) * 3).to(weight.device, torch.bfloat16)
    trial = torch.randn(weight.shape[0], generator=draw).to(weight.device, torch.bfloat16)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        try:
            out = functional_call(module, {"weight": trial}, (x,))
        except (RuntimeError, TypeError, ValueError):
            return None
        for offset, round_first in ((0.0, True), (1.0, False), (0.0, False)):
            if torch.equal(out, plain_rms_norm(x, trial, eps, offset=offset, round_first=round_first)):
                return Norm(eps, offset, round_first)
    return None


def activation_of(module: Any) -> str | None:
    """Which gated activation a callable is, or None."""
    x = torch.linspace(-6, 6, 97)
    with torch.no_grad():
        try:
            out = module(x)
        except (RuntimeError, TypeError, ValueError):
            return None
        return next((n for n in ACTIVATIONS if torch.allclose(out, activation(n, x), atol=1e-6)), None)


def mlp_of(module: nn.Module) -> GatedMlp | None:
    """The parts of a gated feed-forward layer, or None. The layer is tried on two tokens."""
    parts = dict(module.named_children())
    act = next((a for n, a in parts.items() if "act" in n and not _weights(a)), None) or getattr(
        module, "act_fn", None
    )
    layers = {n: m for n, m in parts.items() if _features(m)}
    name = activation_of(act) if callable(act) else None
    if name is None or set(parts) - set(layers) - {n for n, a in parts.items() if a is act}:
        return None
    gate, up, down = (layers.get(f"{n}_proj") for n in ("gate", "up", "down"))
    if gate is None and up is None and down is not None and "gate_up_proj" in layers:
        gate = layers["gate_up_proj"]
    if gate is None or down is None or len(layers) != 2 + (up is not None):
        return None
    into = _features(gate)
    if into is None or (up is not None and _features(up) != into):
        return None
    H, M = into
    if _features(down) != (M if up is not None else M // 2, H):
        return None
    found = GatedMlp(gate, up, down, name)
    return found if _acts_like(module, found, H) else None


def _acts_like(module: nn.Module, mlp: GatedMlp, width: int) -> bool:
    weight = next(module.parameters())
    # Weights may be held in fewer bits than anything is computed in.
    usual = (torch.float32, torch.bfloat16, torch.float16)
    dtype = next((p.dtype for p in module.parameters() if p.dtype in usual), torch.float32)
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    # Only what draws at random is stopped: 4-bit layers change their weights' layout when they are told to evaluate.
    random = [m for m in module.modules() if isinstance(m, nn.Dropout) and m.training]
    for each in random:
        each.eval()
    # Dropout that the module's own code does is a part of what it does, and shows in training alone.
    training, module.training = module.training, True
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            gate = mlp.gate(x)
            gate, up = gate.chunk(2, dim=-1) if mlp.up is None else (gate, mlp.up(x))
            expected = mlp.down(activation(mlp.act, gate) * up)
            out = own_forward(module)(x)
    except (RuntimeError, TypeError, ValueError):
        return False
    finally:
        module.training = training
        for each in random:
            each.train()
    return isinstance(out, torch.Tensor) and bool(
        torch.allclose(out, expected, rtol=1e-2 if dtype is not torch.float32 else 1e-5, atol=1e-5)
    )


def rotary_of(module: nn.Module) -> Callable[..., Any] | None:
    """The function `apply_rotary_pos_emb` that an attention layer's code calls, if it turns halves of heads."""
    forward: Any = type(module).forward
    if not hasattr(module, "q_proj") and not hasattr(module, "qkv_proj"):
        return None
    code = getattr(forward, "__code__", None)
    function = getattr(forward, "__globals__", {}).get("apply_rotary_pos_emb")
    if code is None or "apply_rotary_pos_emb" not in code.co_names or function is None:
        return None
    names = list(inspect.signature(function).parameters)
    if names[:4] != ["q", "k", "cos", "sin"]:
        return None
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8, generator=draw), torch.randn(1, 1, 3, 8, generator=draw)
    half = torch.randn(1, 3, 4, generator=draw)
    cos, sin = torch.cat((half.cos(), half.cos()), -1), torch.cat((half.sin(), half.sin()), -1)
    try:
        same = all(
            torch.allclose(a, b, atol=1e-6)
            for a, b in zip(function(q, k, cos, sin), plain_rotary(q, k, cos, sin), strict=True)
        )
    except (RuntimeError, TypeError, ValueError):
        return None
    return function if same else None


def _weights(module: Any) -> bool:
    return isinstance(module, nn.Module) and any(True for _ in module.parameters())


def _features(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, adapted or not."""
    K, N = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (K, N) if isinstance(K, int) and isinstance(N, int) and _weights(module) else None
