"""Triton program of the rotary embedding: all heads of one token per program."""

import triton
import triton.language as tl


@triton.jit
def turn(
    X,
    Y,
    COS,
    SIN,
    T,
    rows_per_batch,
    xb,
    xh,
    xt,
    yb,
    yh,
    yt,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    WIDE: tl.constexpr,
    REST: tl.constexpr,
    PARTIAL: tl.constexpr,
    BACK: tl.constexpr,
):
    """Y from X [B,H,T,D] by strides; COS and SIN [B or 1,T,2*HALF]; `rows_per_batch` is T, or 0 for one shared row."""
    token = tl.program_id(0).to(tl.int64)
    b = token // T
    t = token % T
    head = tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, WIDE)[None, :]
    inside = (head < H) & (d < HALF)
    angle = (b * rows_per_batch + t) * (2 * HALF)
    cos1 = tl.load(COS + angle + d, mask=d < HALF, other=0.0).to(tl.float32)
    sin1 = tl.load(SIN + angle + d, mask=d < HALF, other=0.0).to(tl.float32)
    cos2 = tl.load(COS + angle + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)
    sin2 = tl.load(SIN + angle + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)
    if BACK:
        # The transposed matrix, whether or not both halves hold the same angles.
        sin0 = sin1
        sin1 = -sin2
        sin2 = -sin0
    x = X + b * xb + head * xh + t * xt
    y = Y + b * yb + head * yh + t * yt
    first = tl.load(x + d, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + HALF + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + d, (first * cos1 - second * sin1).to(Y.dtype.element_ty), mask=inside)
    tl.store(y + HALF + d, (second * cos2 + first * sin2).to(Y.dtype.element_ty), mask=inside)
    if PARTIAL:
        r = 2 * HALF + tl.arange(0, REST)[None, :]
        left = (head < H) & (r < D)
        tl.store(y + r, tl.load(x + r, mask=left, other=0.0).to(Y.dtype.element_ty), mask=left)
