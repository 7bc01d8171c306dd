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
    BLOCK: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    BYTES: tl.constexpr,
):
    """OUT [2*count] from PACKED [count] bytes."""
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
    tl.store(OUT + 2 * at, high.to(OUT.dtype.element_ty), mask=inside)
    tl.store(OUT + 2 * at + 1, low.to(OUT.dtype.element_ty), mask=inside)
