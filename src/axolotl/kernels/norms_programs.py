"""Triton programs of the root-mean-square norm: a row per program forward, some rows per program backward."""

import triton
import triton.language as tl


@triton.jit
def forward(
    X, W, Y, INVERSE, stride, eps, offset, N: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK: tl.constexpr
):
    """Y [T,N] from rows of X, and 1/rms of each row, float32."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < N
    x = tl.load(X + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / N + eps)
    w = tl.load(W + at, mask=inside, other=0.0).to(tl.float32) + offset
    normed = x * inverse
    if ROUND_FIRST:
        normed = normed.to(X.dtype.element_ty).to(tl.float32)
    tl.store(Y + row * N + at, (normed * w).to(Y.dtype.element_ty), mask=inside)
    tl.store(INVERSE + row, inverse)


@triton.jit
def backward(
    DY,
    X,
    W,
    INVERSE,
    DX,
    PARTIAL,
    stride_dy,
    stride_x,
    T,
    offset,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """DX [T,N], and with WEIGHT a row of PARTIAL per program that sums up to the gradient of the weight."""
    program = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < N
    w = tl.load(W + at, mask=inside, other=0.0).to(tl.float32) + offset
    dw = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        here = at < tl.where(row < T, N, 0)
        dy = tl.load(DY + row * stride_dy + at, mask=here, other=0.0).to(tl.float32)
        x = tl.load(X + row * stride_x + at, mask=here, other=0.0).to(tl.float32)
        inverse = tl.load(INVERSE + tl.minimum(row, T - 1))
        normed = x * inverse
        scaled = dy * w
        dx = (scaled - normed * (tl.sum(normed * scaled, 0) / N)) * inverse
        tl.store(DX + row * N + at, dx.to(DX.dtype.element_ty), mask=here)
        dw += dy * normed
    if WEIGHT:
        tl.store(PARTIAL + program * N + at, dw, mask=inside)
