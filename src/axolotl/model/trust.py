"""Trusting a kernel only after it was tried: each is compared with its twin on the run's own shapes, before the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Greatest relative difference of outputs and gradients from the twin in float32, by number type."""

Op = Callable[..., Any]


def deviation(op: Op, twin: Op, inputs: Sequence[torch.Tensor]) -> str:
    """What is wrong with an op on these inputs, forward and backward, beside its twin in float32; empty if nothing is.

    Inputs that require gradients get them. The twin sees the same numbers in float32. An op that fails to compile or to
    run is told with its error.
    """
    limit = max(LIMITS.get(x.dtype, 1e-4) for x in inputs)
    try:
        found = _run(op, inputs)
        wide = [
            x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs
        ]
        expected = _run(twin, wide)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's errors have no common base
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return difference(found, expected, limit)


def difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], limit: float) -> str:
    """Which result is not finite, or further from what was expected than `limit`, relative; empty if none is."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not bool(torch.isfinite(a).all()):
            return f"result {i} is not finite"
        size = b.float().norm().clamp(min=1e-20)
        off = float((a.float() - b.float()).norm() / size)
        if not off <= limit:
            return f"result {i} differs by {off:.1%} from plain torch"
    return ""


def _run(op: Op, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with torch.enable_grad():
        out = op(*inputs)
        outs = out if isinstance(out, tuple) else (out,)
        draw = torch.Generator().manual_seed(0)
        incoming = [torch.randn(o.shape, generator=draw).to(o.device, o.dtype) for o in outs]
        wanted = [x for x in inputs if x.requires_grad]
        grads = torch.autograd.grad(outs, wanted, incoming) if wanted else ()
    return [*(o.detach() for o in outs), *grads]
