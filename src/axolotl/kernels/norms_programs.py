"""Triton programs of the root-mean-square norm: a row per program forward, some rows per program backward."""

import triton
import triton.language as tl


@triton.jit
def forward(
    X,
    W,
    Y,
    INVERSE,
    VALUES,
    SCALE,
    stride,
    stride_y,
    eps,
    offset,
    N: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Y from rows of X, 1/rms of each row, float32, and with QUANTIZE the rows of Y as VALUES [T,N] e4m3 with SCALE."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < N
    x = tl.load(X + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / N + eps)
    w = tl.load(W + at, mask=inside, other=0.0).to(tl.float32) + offset
    normed = x * inverse
    if ROUND_FIRST:
        normed = normed.to(X.dtype.element_ty).to(tl.float32)
    y = (normed * w).to(Y.dtype.element_ty)
    tl.store(Y + row * stride_y + at, y, mask=inside)
    tl.store(INVERSE + row, inverse)
    if QUANTIZE:
        rounded = y.to(tl.float32)
        most = tl.maximum(tl.max(tl.abs(rounded), 0), 448.0e-30)
        tl.store(SCALE + row, most / 448.0)
        tl.store(VALUES + row * N + at, (rounded * (448.0 / most)).to(VALUES.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    DY,
    X,
    W,
    INVERSE,
    RESIDUAL_DY,
    DX,
    PARTIAL,
    stride_dy,
    stride_x,
    stride_residual,
    T,
    offset,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """DX [T,N], with RESIDUAL plus the rows of RESIDUAL_DY, and with WEIGHT a row of PARTIAL per program that sums up to the gradient of the weight."""
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
        if RESIDUAL:
            dx += tl.load(RESIDUAL_DY + row * stride_residual + at, mask=here, other=0.0).to(tl.float32)
        tl.store(DX + row * N + at, dx.to(DX.dtype.element_ty), mask=here)
        dw += dy * normed
    if WEIGHT:
        tl.store(PARTIAL + program * N + at, dw, mask=inside)
