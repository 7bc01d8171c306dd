"""Comparing an op with its twin in higher precision, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Op = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def outputs_and_gradients(op: Op, inputs: Sequence[torch.Tensor], seed: int = 0) -> list[torch.Tensor]:
    """What the op gives, and the gradients of all inputs under a random incoming gradient."""
    out = op(*inputs)
    outs = out if isinstance(out, tuple) else (out,)
    draw = torch.Generator().manual_seed(seed)
    incoming = [torch.randn(o.shape, generator=draw, dtype=torch.float64).to(o.device, o.dtype) for o in outs]
    wanted = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(outs, wanted, incoming, allow_unused=True)
    return [*(o.detach() for o in outs), *(g for g in grads if g is not None)]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """The greatest difference beside the size of the reference."""
    if not b.numel():
        return 0.0
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-12))


def assert_like_twin(op: Op, twin: Op, inputs: Sequence[torch.Tensor], tolerance: float) -> None:
    """The op in its own precision beside the twin in float64."""
    high = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    found, expected = outputs_and_gradients(op, inputs), outputs_and_gradients(twin, high)
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        assert torch.isfinite(a).all()
        assert error(a, b) <= tolerance, f"{i}: {error(a, b)}"
