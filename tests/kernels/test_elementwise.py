"""Norm, rotary embedding and gated activations: Triton programs beside their twins in float64, and twins beside torch."""

from __future__ import annotations

import functools

import pytest
import torch

from axolotl.kernels.gates import (
    ACTIVATIONS,
    _value_and_slope,
    activation,
    gated,
    gated_backward,
    plain_gated,
)
from axolotl.kernels.norms import plain_rms_norm, rms_norm
from axolotl.kernels.rotary import plain_rotary, rotary
from axolotl.kernels.triton_language import installed, runs_on
from kernels.comparing import assert_like_twin

SHAPES = [(1, 3), (2, 3, 7), (3, 130)]


def random(*shape: int, seed: int = 0, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with a hole after each."""
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] * 2)
    wide[..., ::2] = x.detach()
    return wide[..., ::2].requires_grad_()


@pytest.mark.extras
@pytest.mark.parametrize("shape", [*SHAPES, (515, 5)])
@pytest.mark.parametrize(("offset", "round_first"), [(0.0, True), (1.0, False)])
@pytest.mark.parametrize("hole", [False, True])
def test_rms_norm(interpreter, shape, offset, round_first, hole):
    frozen = hole
    x, weight = random(*shape), random(shape[-1], seed=1, grad=not frozen)
    options = {"eps": 1e-5, "offset": offset, "round_first": round_first}
    x = strided(x) if hole else x
    assert_like_twin(
        lambda x, w: rms_norm(x, w, **options),
        lambda x, w: plain_rms_norm(x, w, **options),
        [x, weight],
        3e-6,
    )


@pytest.mark.extras
@pytest.mark.parametrize(
    ("B", "H", "G", "T", "D", "R"),
    [(1, 1, 1, 1, 2, 2), (2, 4, 2, 5, 8, 8), (1, 3, 1, 7, 12, 8), (3, 5, 5, 2, 6, 6)],
)
@pytest.mark.parametrize("layout", ["heads", "tokens", "unsqueeze"])
@pytest.mark.parametrize("shared", [False, True])
def test_rotary(interpreter, B, H, G, T, D, R, layout, shared):
    cos, sin = (
        random(1 if shared else B, T, R, seed=2, grad=False),
        random(1 if shared else B, T, R, seed=3, grad=False),
    )
    q, k = random(B, H, T, D), random(B, G, T, D, seed=1)
    axis = 1
    if layout == "tokens":  # as a projection leaves them
        q, k = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k))
    if layout == "unsqueeze":
        q, k, axis = random(B, T, H, D), random(B, T, G, D, seed=1), 2
    assert_like_twin(
        lambda q, k: rotary(q, k, cos, sin, axis),
        lambda q, k: plain_rotary(q, k, cos.to(q), sin.to(q), axis),
        [q, k],
        2e-6,
    )


@pytest.mark.extras
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["apart", "hole", "together"])
def test_gated(interpreter, shape, act, layout):
    gate, up = random(*shape), random(*shape, seed=1)
    if layout == "hole":
        gate, up = strided(gate), strided(up)
    if layout == "together":  # two halves of one product
        both = torch.cat((gate, up), dim=-1).detach()
        gate, up = (x.requires_grad_() for x in both.chunk(2, dim=-1))
    assert_like_twin(
        functools.partial(gated, act=act), functools.partial(plain_gated, act=act), [gate, up], 3e-6
    )


@pytest.mark.extras
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gated_backward_makes_the_value_again_over_its_input(interpreter, act):
    gate, up, dout = (random(5, 33, seed=s, grad=False) for s in range(3))
    expected = plain_gated(gate, up, act)
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    gated_backward(dout, gate, up, act, dgate, dup, dout)
    assert torch.allclose(dout, expected, atol=1e-6)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_slopes_by_hand_are_those_of_autograd(act):
    g = torch.linspace(-9, 9, 301, dtype=torch.float64, requires_grad=True)
    value = activation(act, g)
    (slope,) = torch.autograd.grad(value.sum(), g)
    ours = _value_and_slope(g.detach(), act)
    assert torch.allclose(ours[0], value) and torch.allclose(ours[1], slope)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gated_backward_by_torch(act):
    gate, up, dout = (random(4, 9, seed=s, grad=False).double() for s in range(3))
    gate.requires_grad_(), up.requires_grad_()
    value = plain_gated(gate, up, act)
    expected = torch.autograd.grad(value, (gate, up), dout)
    found = [torch.empty_like(gate), torch.empty_like(up)]
    gated_backward(dout, gate.detach(), up.detach(), act, *found, dout)
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.allclose(dout, value.detach())


def test_without_triton_the_twins_work():
    if installed():
        return  # the other tests run the programs
    x = random(3, 8)
    assert not runs_on(x)
    assert torch.equal(rms_norm(x, torch.ones(8), 1e-6), plain_rms_norm(x, torch.ones(8), 1e-6))
    assert torch.equal(gated(x, x, "silu"), plain_gated(x, x, "silu"))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_norm_is_that_of_transformers(family):
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = {"llama": LlamaRMSNorm, "gemma2": Gemma2RMSNorm}[family](24)
    module.weight.data.normal_()
    x = random(3, 24).to(torch.bfloat16)
    module.to(torch.bfloat16)
    gemma = family == "gemma2"
    ours = plain_rms_norm(x, module.weight, 1e-6, offset=float(gemma), round_first=not gemma)
    assert torch.equal(ours, module(x))
