"""LoRA in one GEMM, and the feed-forward layer that keeps the least, beside plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from axolotl.kernels.frozen import Dense
from axolotl.kernels.gates import ACTIVATIONS
from axolotl.kernels.lora import LoraGroup, lora_linears, lora_mlp, padded, plain_lora, plain_lora_mlp
from kernels.comparing import assert_like_twin, error, outputs_and_gradients


def layers(
    K: int, sizes: list[int], ranks: list[int], seed: int = 0, bias: bool = False, dtype=torch.float32
):
    draw = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return (torch.randn(*shape, generator=draw) / shape[-1] ** 0.5).to(dtype)

    return [
        (
            matrix(n, K),
            nn.Parameter(matrix(r, K)),
            nn.Parameter(matrix(n, r)),
            0.5 + i,
            matrix(n) if bias else None,
        )
        for i, (n, r) in enumerate(zip(sizes, ranks, strict=True))
    ]


def group_of(parts, folded: bool) -> LoraGroup:
    weights = [p[0].clone() for p in parts]
    base = Dense(weights, padded(sum(p[1].shape[0] for p in parts)) if folded else 0)
    return LoraGroup(
        base, [p[1] for p in parts], [p[2] for p in parts], [p[3] for p in parts], [p[4] for p in parts]
    )


def twin_of(parts):
    count = len(parts)

    def twin(x, *low):
        return tuple(
            plain_lora(x, w.to(x), low[i], low[count + i], s, None if c is None else c.to(x))
            for i, (w, _, _, s, c) in enumerate(parts)
        )

    return twin


@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(0, 9),
    K=st.integers(1, 17),
    sizes=st.lists(st.integers(1, 13), min_size=1, max_size=3),
    folded=st.booleans(),
    bias=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linears(T, K, sizes, folded, bias, strided, seed):
    parts = layers(K, sizes, [1 + i * 2 for i in range(len(sizes))], seed, bias)
    group = group_of(parts, folded)
    torch.manual_seed(seed)
    x = torch.randn(T, K * 2)[:, ::2] if strided else torch.randn(T, K)
    op = lambda x, *low: lora_linears(x, group)  # noqa: E731
    assert_like_twin(op, twin_of(parts), [x.requires_grad_(), *group.parameters], 2e-5)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("shape", [(1, 5), (2, 7, 12), (0, 4)])
def test_mlp(act, folded, shape):
    K, M = shape[-1], 11
    gate, up = layers(K, [M, M], [3, 2])
    (down,) = layers(M, [K], [4], seed=1)
    gate_up, below = group_of([gate, up], folded), group_of([down], folded)
    x = torch.randn(*shape, requires_grad=True)

    def twin(x, a0, a1, b0, b1, a2, b2):
        return plain_lora_mlp(
            x,
            [
                (gate[0].to(x), a0, b0, gate[3]),
                (up[0].to(x), a1, b1, up[3]),
                (down[0].to(x), a2, b2, down[3]),
            ],
            act,
        )

    op = lambda x, *low: lora_mlp(x, gate_up, below, act)  # noqa: E731
    assert_like_twin(op, twin, [x, *gate_up.parameters, *below.parameters], 1e-5)


def test_weights_that_the_optimizer_changed_are_used():
    parts = layers(6, [5, 4], [2, 2])
    group = group_of(parts, True)
    x = torch.randn(3, 6, requires_grad=True)
    optimizer = torch.optim.SGD(group.parameters, lr=0.05)
    for _ in range(3):
        expected = twin_of(parts)(x, *group.parameters)
        found = lora_linears(x, group)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
        sum(y.square().sum() for y in found).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_buffer_is_the_only_copy_of_a_weight_and_is_given_back():
    parts = layers(6, [5, 4], [2, 2])
    weights = [nn.Parameter(p[0].clone(), requires_grad=False) for p in parts]
    before = [w.detach().clone() for w in weights]
    base = Dense(weights, 4)
    assert base.wide.shape == (9, 10)
    assert all(w.untyped_storage().data_ptr() == base.wide.untyped_storage().data_ptr() for w in weights)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    base.release()
    assert all(w.is_contiguous() and torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 2


def test_float32_adapters_under_bfloat16_are_no_worse_than_peft():
    parts = layers(64, [48], [8])
    weights = parts[0][0].bfloat16()
    parts = [(weights, *parts[0][1:])]
    group = group_of(parts, True)
    x = torch.randn(20, 64)
    low = [p.detach().double().requires_grad_() for p in group.parameters]
    exact = outputs_and_gradients(twin_of(parts), [x.bfloat16().double().requires_grad_(), *low])
    ours = outputs_and_gradients(
        lambda x, *p: lora_linears(x, group), [x.bfloat16().requires_grad_(), *group.parameters]
    )

    def plain(x, a, b):
        with torch.autocast("cpu", torch.bfloat16):
            return plain_lora(x, weights, a, b, parts[0][3])

    peft = outputs_and_gradients(plain, [x.bfloat16().requires_grad_(), *group.parameters])
    assert ours[2].dtype is torch.float32
    for o, p, e in zip(ours, peft, exact, strict=True):
        assert error(o, e) <= 1.5 * error(p, e) + 1e-3


def test_a_feed_forward_layer_keeps_input_gate_and_up_only():
    K, M, r, T = 16, 40, 2, 30
    gate_up = group_of(layers(K, [M, M], [r, r]), True)
    down = group_of(layers(M, [K], [r], seed=1), True)
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        lora_mlp(torch.randn(T, K, requires_grad=True), gate_up, down, "silu")
    numbers = sum(t.untyped_storage().nbytes() // t.element_size() for t in kept.values())
    assert numbers == T * (K + padded(2 * r)) + T * 2 * M + T * padded(r)


@pytest.mark.extras
def test_mlp_with_the_programs(interpreter):
    test_mlp("silu", True, (2, 7, 12))
    test_mlp("gelu_tanh", False, (1, 5))
