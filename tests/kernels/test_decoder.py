"""The halves of a decoder layer beside plain torch in float64, and what they keep for the backward pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.kernels.decoder import norm_linears, output_and_mlp
from axolotl.kernels.lora import padded, plain_lora, plain_lora_mlp
from axolotl.kernels.norms import Norm, plain_rms_norm
from kernels.comparing import assert_like_twin
from kernels.test_lora import group_of, layers

LLAMA, GEMMA = Norm(1e-5, 0.0, True), Norm(1e-6, 1.0, False)


def normed(x: torch.Tensor, weight: torch.Tensor, norm: Norm) -> torch.Tensor:
    return plain_rms_norm(x, weight.to(x), norm.eps, offset=norm.offset, round_first=norm.round_first)


def first_half(norm: Norm, shape: tuple[int, ...], sizes: list[int], folded: bool, bias: bool) -> None:
    H = shape[-1]
    parts = layers(H, sizes, [1 + i for i in range(len(sizes))], 3, bias)
    group = group_of(parts, folded)
    weight = torch.rand(H) + 0.5

    def twin(h, *low):
        x, count = normed(h, weight, norm), len(parts)
        made = [
            plain_lora(x, w.to(x), low[i], low[count + i], s, None if c is None else c.to(x))
            for i, (w, _, _, s, c) in enumerate(parts)
        ]
        return (*made, h * 1)

    op = lambda h, *low: norm_linears(h, weight, norm, group)  # noqa: E731
    assert_like_twin(op, twin, [torch.randn(*shape, requires_grad=True), *group.parameters], 3e-5)


def second_half(norm: Norm, shape: tuple[int, ...], A: int, M: int, folded: bool, act: str) -> None:
    H = shape[-1]
    (out,) = layers(A, [H], [3], seed=4)
    gate, up = layers(H, [M, M], [3, 2])
    (down,) = layers(M, [H], [4], seed=1)
    output, gate_up, below = group_of([out], False), group_of([gate, up], folded), group_of([down], folded)
    weight = torch.rand(H) + 0.5

    def twin(attended, h, oa, ob, a0, a1, b0, b1, a2, b2):
        middle = h + plain_lora(attended, out[0].to(h), oa, ob, out[3])
        parts = [
            (gate[0].to(h), a0, b0, gate[3]),
            (up[0].to(h), a1, b1, up[3]),
            (down[0].to(h), a2, b2, down[3]),
        ]
        return middle + plain_lora_mlp(normed(middle, weight, norm), parts, act)

    def op(attended, h, *low):
        return output_and_mlp(attended, h, output, weight, norm, gate_up, below, act)

    inputs = [torch.randn(*shape[:-1], A, requires_grad=True), torch.randn(*shape, requires_grad=True)]
    parameters = [*output.parameters, *gate_up.parameters, *below.parameters]
    assert_like_twin(op, twin, [*inputs, *parameters], 3e-5)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from([(1, 5), (2, 7, 12), (0, 4), (3, 4)]),
    sizes=st.lists(st.integers(1, 13), min_size=1, max_size=3),
    norm=st.sampled_from([LLAMA, GEMMA]),
    folded=st.booleans(),
    bias=st.booleans(),
)
def test_first_half(shape, sizes, norm, folded, bias):
    first_half(norm, shape, sizes, folded, bias)


@pytest.mark.parametrize("shape", [(1, 5), (2, 7, 12), (0, 4)])
@pytest.mark.parametrize(("A", "M"), [(3, 11), (16, 2)])
@pytest.mark.parametrize("norm", [LLAMA, GEMMA])
@pytest.mark.parametrize("folded", [False, True])
def test_second_half(shape, A, M, norm, folded):
    second_half(norm, shape, A, M, folded, "silu")


@pytest.mark.extras
@pytest.mark.parametrize("norm", [LLAMA, GEMMA])
def test_halves_with_the_programs(interpreter, norm):
    first_half(norm, (2, 7, 12), [5, 3, 3], True, True)
    second_half(norm, (2, 7, 12), 8, 11, True, "silu")
    second_half(norm, (1, 5), 3, 2, False, "gelu_tanh")


@pytest.mark.extras
def test_gradients_that_are_one_number_everywhere(interpreter):
    H = 8
    parts = layers(H, [5], [2])
    weight = torch.rand(H) + 0.5
    found = []
    for together in (True, False):
        h = torch.linspace(-1, 1, 3 * H).view(3, H).requires_grad_()
        y, residual = norm_linears(h, weight, LLAMA, group_of(parts, True))
        if together:
            y.sum().backward(inputs=[h], retain_graph=True)
            # The gradient of a sum is one number in the memory.
            residual.sum().backward(inputs=[h])
        else:
            torch.autograd.backward(
                [y, residual], [torch.ones_like(y), torch.ones_like(residual)], inputs=[h]
            )
        found.append(h.grad)
    assert torch.allclose(*found, atol=1e-6)


def test_what_is_kept():
    T, H, A, M, r = 30, 16, 8, 40, 2
    weight = torch.ones(H)
    qkv = group_of(layers(H, [8, 4, 4], [r] * 3), True)
    output = group_of(layers(A, [H], [r]), False)
    gate_up, down = group_of(layers(H, [M, M], [r, r]), True), group_of(layers(M, [H], [r]), True)
    kept: dict[int, torch.Tensor] = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    def numbers() -> int:
        return sum(t.untyped_storage().nbytes() // t.element_size() for t in kept.values())

    h = torch.randn(T, H, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        norm_linears(h, weight, LLAMA, qkv)
    assert numbers() == T * H + H + T + T * (H + padded(3 * r))
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output_and_mlp(torch.randn(T, A), h, output, weight, LLAMA, gate_up, down, "silu")
    middle = T * H + T * (H + padded(2 * r)) + T
    assert numbers() == T * A + T * padded(r) + H + middle + T * 2 * M + T * padded(r)
