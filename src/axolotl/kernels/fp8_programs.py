"""Triton program that makes 8-bit floats of rows, with a scale for each: a row per program, read twice."""

import triton
import triton.language as tl


@triton.jit
def rows(X, COLUMNS, VALUES, SCALE, stride, K: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """VALUES [T,K] e4m3 and SCALE [T] of rows of X, with SCALED times COLUMNS [K]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    highest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, K, BLOCK):
        at = start + column
        x = tl.load(X + row * stride + at, mask=at < K, other=0.0).to(tl.float32)
        if SCALED:
            x = x * tl.load(COLUMNS + at, mask=at < K, other=0.0)
        highest = tl.maximum(highest, tl.abs(x))
    most = tl.maximum(tl.max(highest, 0), 448.0e-30)
    tl.store(SCALE + row, most / 448.0)
    for start in range(0, K, BLOCK):
        at = start + column
        x = tl.load(X + row * stride + at, mask=at < K, other=0.0).to(tl.float32)
        if SCALED:
            x = x * tl.load(COLUMNS + at, mask=at < K, other=0.0)
        tl.store(VALUES + row * K + at, (x * (448.0 / most)).to(VALUES.dtype.element_ty), mask=at < K)
