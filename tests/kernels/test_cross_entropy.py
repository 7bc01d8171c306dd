"""Head and cross-entropy in one, beside whole logits and autograd in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.kernels.cross_entropy import linear_cross_entropy, plain_linear_cross_entropy
from kernels.comparing import assert_like_twin, error, outputs_and_gradients


def problem(T: int, D: int, V: int, ignored: float, seed: int = 0, *, strided: bool = False):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(T, D * (2 if strided else 1), generator=draw)[:, :: 2 if strided else 1]
    weight = torch.randn(V, D, generator=draw) * 0.5
    targets = torch.randint(0, V, (T,), generator=draw)
    targets[torch.rand(T, generator=draw) < ignored] = -100
    return x.requires_grad_(), weight.requires_grad_(), targets


def ops(targets: torch.Tensor, items: float | None, **options):
    chunks, triton = options.pop("chunks", None), options.pop("triton", False)
    op = functools.partial(linear_cross_entropy, chunks=chunks, triton=triton, **options)
    return (
        lambda x, w, *b: op(x, w, targets, items, bias=b[0] if b else None),
        lambda x, w, *b: (
            plain_linear_cross_entropy(x, w, targets, items, bias=b[0] if b else None, **options)
            if x.dtype is not torch.float64
            else _exact(x, w, targets, items, b[0] if b else None, **options)
        ),
    )


def _exact(x, w, targets, items, bias, softcap=None, scale=1.0):
    z = x @ w.t() + (0 if bias is None else bias)
    z = z * scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    kept = targets != -100
    loss = (torch.logsumexp(z, 1) - z.gather(1, targets.clamp(min=0)[:, None])[:, 0])[kept].sum()
    return loss / (kept.sum() if items is None else items)


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 40),
    D=st.integers(1, 20),
    V=st.integers(2, 131),
    ignored=st.sampled_from([0.0, 0.4]),
    chunks=st.integers(1, 7),
    items=st.sampled_from([None, 7.0]),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([1.0, 0.25]),
    strided=st.booleans(),
    seed=st.integers(0, 999),
)
def test_it_is_the_plain_loss(T, D, V, ignored, chunks, items, softcap, scale, strided, seed):
    x, weight, targets = problem(T, D, V, ignored, seed, strided=strided)
    targets[0] = V - 1  # a mean over nothing is no number in either
    op, twin = ops(targets, items, chunks=chunks, softcap=softcap, scale=scale)
    # A loss near 0 is a small difference of large numbers: it is held against 1 more than itself.
    assert_like_twin(lambda *a: 1 + op(*a), lambda *a: 1 + twin(*a), [x, weight], 2e-5)


def test_a_bias_gets_its_gradient():
    x, weight, targets = problem(11, 6, 29, 0.2)
    op, twin = ops(targets, None, chunks=3)
    assert_like_twin(op, twin, [x, weight, torch.randn(29).requires_grad_()], 1e-5)


def test_a_frozen_head_costs_no_product_for_its_gradient():
    x, weight, targets = problem(16, 8, 50, 0.0)
    products = []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.mm:
                products.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    for head in (weight.detach(), weight):
        products.clear()
        with Count():
            linear_cross_entropy(x, head, targets, chunks=1, triton=False).backward()
        assert len(products) == (3 if head.requires_grad else 2)


def test_nothing_of_the_size_of_all_logits_is_held():
    T, D, V, chunks = 512, 8, 1000, 16
    x, weight, targets = problem(T, D, V, 0.0)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        linear_cross_entropy(x, weight.detach(), targets, chunks=chunks, triton=False).backward()
    assert largest <= T // chunks * V


def test_without_gradients_only_the_loss_is_made():
    x, weight, targets = problem(9, 4, 12, 0.3)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets, chunks=2)
    assert loss.item() == pytest.approx(plain_linear_cross_entropy(x, weight, targets).item(), rel=1e-6)
    assert not loss.requires_grad


def test_no_token_at_all_costs_nothing():
    x, weight, targets = problem(0, 4, 12, 0.0)
    loss = linear_cross_entropy(x, weight, targets, 1.0)
    loss.backward()
    assert loss.item() == 0 and x.grad.shape == (0, 4) and not weight.grad.any()
    x, weight, _ = problem(5, 4, 12, 0.0)
    linear_cross_entropy(x, weight, torch.full((5,), -100), 3.0).backward()
    assert not x.grad.any() and not weight.grad.any()


def test_an_incoming_gradient_scales_it():
    x, weight, targets = problem(9, 4, 12, 0.3)
    (linear_cross_entropy(x, weight, targets) * 3).backward()
    tripled = x.grad.clone()
    x.grad = None
    linear_cross_entropy(x, weight, targets).backward()
    assert torch.allclose(tripled, 3 * x.grad)


def test_hooks_that_move_saved_tensors_never_see_the_gradients():
    """What `activation_offloading` would carry to the CPU and back: nothing of the head's size, nor of the input's."""
    x, weight, targets = problem(20, 8, 50, 0.2)
    bias = torch.zeros(50, requires_grad=True)
    seen: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.shape)
        return tensor

    plain = plain_linear_cross_entropy(x, weight, targets, bias=bias)
    expected = torch.autograd.grad(plain, (x, weight, bias))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = linear_cross_entropy(x * 1.0, weight, targets, bias=bias)
    assert not [shape for shape in seen if shape.numel() > 1], seen
    loss.backward()
    for each, gradient in zip((x, weight, bias), expected, strict=True):
        torch.testing.assert_close(each.grad, gradient)


def test_gradients_are_given_once_and_not_held_beyond():
    x, weight, targets = problem(20, 8, 50, 0.2)
    loss = linear_cross_entropy(x, weight, targets)
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()  # no second derivative
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_bfloat16_is_no_worse_than_the_plain_path():
    x, weight, targets = problem(64, 32, 300, 0.1)
    exact = outputs_and_gradients(
        ops(targets, None)[1], [v.detach().double().requires_grad_() for v in (x, weight)]
    )
    low = [v.detach().bfloat16().requires_grad_() for v in (x, weight)]
    ours = outputs_and_gradients(lambda a, b: linear_cross_entropy(a, b, targets, chunks=4), low)
    plain = outputs_and_gradients(lambda a, b: plain_linear_cross_entropy(a, b, targets), low)
    for o, p, e in zip(ours, plain, exact, strict=True):
        assert error(o, e) <= 1.3 * error(p, e) + 1e-3


def test_autocast_makes_the_products_in_its_type():
    x, weight, targets = problem(20, 16, 40, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(x, weight, targets)
        plain = plain_linear_cross_entropy(x, weight, targets)
    full = linear_cross_entropy(x, weight, targets)
    assert ours.dtype is torch.float32
    assert ours.item() == pytest.approx(plain.item(), abs=1e-3)
    assert ours.item() != full.item()
    ours.backward()
    assert x.grad.dtype is torch.float32


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="targets"):
        linear_cross_entropy(torch.ones(3, 4), torch.ones(5, 4), torch.zeros(2, dtype=torch.long))


@pytest.mark.extras
@pytest.mark.parametrize(("T", "D", "V"), [(1, 3, 2), (5, 8, 131), (7, 16, 1000), (3, 4, 9001)])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.25}, {"chunks": 3}])
def test_the_program_is_the_twin(interpreter, T, D, V, options):
    x, weight, targets = problem(T, D, V, 0.3)
    targets[0] = V - 1
    op, twin = ops(targets, None, triton=True, **options)
    assert_like_twin(op, twin, [x, weight], 2e-5)
