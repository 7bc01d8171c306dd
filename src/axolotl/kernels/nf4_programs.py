"""Triton program that makes 16-bit weights of 4-bit ones: a stretch of bytes per program."""

import triton
import triton.language as tl


@triton.jit
def dequantize(
    PACKED,
    SCALES,
    TABLE,
    SCALE_SCALES,
    SCALE_TABLE,
    OFFSET,
    OUT,
    count,
    stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    BYTES: tl.constexpr,
):
    """OUT [N,K], `stride` numbers from row to row, from PACKED [count] bytes."""
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = at < count
    byte = tl.load(PACKED + at, mask=inside, other=0).to(tl.int32)
    # Both numbers of a byte are in the same block: blocks are even.
    block = (2 * at) // BLOCK
    scale = tl.load(SCALES + block, mask=inside, other=0)
    if NESTED:
        table = tl.load(SCALE_TABLE + scale.to(tl.int32), mask=inside, other=0.0).to(tl.float32)
        scale = table * tl.load(SCALE_SCALES + block // SCALE_BLOCK, mask=inside, other=0.0) + tl.load(OFFSET)
    high = tl.load(TABLE + (byte >> 4)).to(tl.float32) * scale
    low = tl.load(TABLE + (byte & 15)).to(tl.float32) * scale
    # Neighbours side by side, so that a warp writes without gaps.
    number = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    both = tl.interleave(high, low).to(OUT.dtype.element_ty)
    tl.store(OUT + (number // K) * stride + number % K, both, mask=number < 2 * count)
