"""Triton program of the cross-entropy: one token's logits are read, and overwritten by their gradients."""

import triton
import triton.language as tl


@triton.jit
def cross_entropy(
    LOGITS,
    TARGETS,
    LOSSES,
    INVERSE,
    stride,
    softcap,
    scale,
    V: tl.constexpr,
    IGNORE: tl.constexpr,
    CAPPED: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss of one token, float32; LOGITS [T,V] become gradients of the mean loss where SLOPES."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row)
    base = LOGITS + row * stride
    column = tl.arange(0, BLOCK)
    if target == IGNORE:
        tl.store(LOSSES + row, 0.0)
        if SLOPES:
            for start in range(0, V, BLOCK):
                at = start + column
                tl.store(base + at, tl.zeros([BLOCK], dtype=LOGITS.dtype.element_ty), mask=at < V)
    else:
        highest = -float("inf")
        total = 0.0
        aimed = tl.load(base + target).to(tl.float32) * scale
        if CAPPED:
            aimed = softcap * (2.0 / (1.0 + tl.exp(-2.0 * aimed / softcap)) - 1.0)
        for start in range(0, V, BLOCK):
            at = start + column
            z = tl.load(base + at, mask=at < V, other=0.0).to(tl.float32) * scale
            if CAPPED:
                z = softcap * (2.0 / (1.0 + tl.exp(-2.0 * z / softcap)) - 1.0)
            z = tl.where(at < V, z, -float("inf"))
            now = tl.maximum(highest, tl.max(z, 0))
            total = total * tl.exp(highest - now) + tl.sum(tl.exp(z - now), 0)
            highest = now
        tl.store(LOSSES + row, highest + tl.log(total) - aimed)
        if SLOPES:
            inverse = tl.load(INVERSE)
            # Other threads may still be reading what is written now.
            tl.debug_barrier()
            for start in range(0, V, BLOCK):
                at = start + column
                z = tl.load(base + at, mask=at < V, other=0.0).to(tl.float32) * scale
                slope = inverse * scale
                if CAPPED:
                    bent = 2.0 / (1.0 + tl.exp(-2.0 * z / softcap)) - 1.0
                    z = softcap * bent
                    p = tl.exp(z - highest) / total
                    p = tl.where(at == target, p - 1.0, p) * slope * (1.0 - bent * bent)
                else:
                    p = tl.exp(z - highest) / total
                    p = tl.where(at == target, p - 1.0, p) * slope
                tl.store(base + at, p.to(LOGITS.dtype.element_ty), mask=at < V)
