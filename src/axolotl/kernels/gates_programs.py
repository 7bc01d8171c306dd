"""Triton programs of the gated activations: a stretch of one row per program."""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def _value(g, ACT: tl.constexpr):
    if ACT == 0:
        value = g * tl.sigmoid(g)
    elif ACT == 1:
        value = g * 0.5 * (1.0 + tl.math.erf(g * 0.7071067811865476))
    else:
        value = 0.5 * g * (1.0 + _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)))
    return value


@triton.jit
def _slope(g, ACT: tl.constexpr):
    if ACT == 0:
        s = tl.sigmoid(g)
        slope = s * (1.0 + g * (1.0 - s))
    elif ACT == 1:
        below = 0.5 * (1.0 + tl.math.erf(g * 0.7071067811865476))
        slope = below + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    else:
        t = _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))
        slope = 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * g * g)
    return slope


@triton.jit
def forward(GATE, UP, OUT, features, sg, su, so, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """OUT = act(GATE) * UP, [T,features] with row strides sg, su, so."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < features
    g = tl.load(GATE + row * sg + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(UP + row * su + at, mask=inside, other=0.0).to(tl.float32)
    # Rounded between, as the plain path rounds.
    value = _value(g, ACT).to(GATE.dtype.element_ty).to(tl.float32)
    tl.store(OUT + row * so + at, (value * u).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    DOUT,
    GATE,
    UP,
    DGATE,
    DUP,
    OUT,
    features,
    sd,
    sg,
    su,
    sdg,
    sdu,
    so,
    ACT: tl.constexpr,
    AGAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """DGATE and DUP, and with AGAIN the value once more into OUT, which may be DOUT."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < features
    d = tl.load(DOUT + row * sd + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(GATE + row * sg + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(UP + row * su + at, mask=inside, other=0.0).to(tl.float32)
    value = _value(g, ACT)
    tl.store(DGATE + row * sdg + at, (d * u * _slope(g, ACT)).to(DGATE.dtype.element_ty), mask=inside)
    tl.store(DUP + row * sdu + at, (d * value).to(DUP.dtype.element_ty), mask=inside)
    if AGAIN:
        rounded = value.to(GATE.dtype.element_ty).to(tl.float32)
        tl.store(OUT + row * so + at, (rounded * u).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def forward_rows(
    GATE, UP, OUT, VALUES, SCALE, sg, su, so, M: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr
):
    """As `forward`, a whole row per program, and OUT as VALUES [T,M] e4m3 with SCALE [T]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    highest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, M, BLOCK):
        at = start + column
        g = tl.load(GATE + row * sg + at, mask=at < M, other=0.0).to(tl.float32)
        u = tl.load(UP + row * su + at, mask=at < M, other=0.0).to(tl.float32)
        value = _value(g, ACT).to(GATE.dtype.element_ty).to(tl.float32)
        out = (value * u).to(OUT.dtype.element_ty)
        tl.store(OUT + row * so + at, out, mask=at < M)
        highest = tl.maximum(highest, tl.abs(out.to(tl.float32)))
    most = tl.maximum(tl.max(highest, 0), 448.0e-30)
    tl.store(SCALE + row, most / 448.0)
    # What is read now may have been written by other threads.
    tl.debug_barrier()
    for start in range(0, M, BLOCK):
        at = start + column
        out = tl.load(OUT + row * so + at, mask=at < M, other=0.0).to(tl.float32)
        tl.store(VALUES + row * M + at, (out * (448.0 / most)).to(VALUES.dtype.element_ty), mask=at < M)


@triton.jit
def backward_rows(
    DOUT,
    GATE,
    UP,
    DGATE,
    DUP,
    OUT,
    COLUMNS,
    VALUES,
    SCALE,
    sd,
    sg,
    su,
    sdg,
    sdu,
    so,
    M: tl.constexpr,
    SCALED: tl.constexpr,
    ACT: tl.constexpr,
    AGAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `backward`, a whole row per program; [DGATE, DUP] times COLUMNS [2M] as VALUES [T,2M] e4m3 with SCALE [T]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    highest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, M, BLOCK):
        at = start + column
        inside = at < M
        d = tl.load(DOUT + row * sd + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(GATE + row * sg + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(UP + row * su + at, mask=inside, other=0.0).to(tl.float32)
        value = _value(g, ACT)
        dg = (d * u * _slope(g, ACT)).to(DGATE.dtype.element_ty)
        du = (d * value).to(DUP.dtype.element_ty)
        tl.store(DGATE + row * sdg + at, dg, mask=inside)
        tl.store(DUP + row * sdu + at, du, mask=inside)
        if AGAIN:
            rounded = value.to(GATE.dtype.element_ty).to(tl.float32)
            tl.store(OUT + row * so + at, (rounded * u).to(OUT.dtype.element_ty), mask=inside)
        a, b = tl.abs(dg.to(tl.float32)), tl.abs(du.to(tl.float32))
        if SCALED:
            a = a * tl.load(COLUMNS + at, mask=inside, other=0.0)
            b = b * tl.load(COLUMNS + M + at, mask=inside, other=0.0)
        highest = tl.maximum(highest, tl.maximum(a, b))
    most = tl.maximum(tl.max(highest, 0), 448.0e-30)
    tl.store(SCALE + row, most / 448.0)
    # What is read now may have been written by other threads.
    tl.debug_barrier()
    for start in range(0, M, BLOCK):
        at = start + column
        inside = at < M
        a = tl.load(DGATE + row * sdg + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(DUP + row * sdu + at, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            a = a * tl.load(COLUMNS + at, mask=inside, other=0.0)
            b = b * tl.load(COLUMNS + M + at, mask=inside, other=0.0)
        tl.store(VALUES + row * (2 * M) + at, (a * (448.0 / most)).to(VALUES.dtype.element_ty), mask=inside)
        tl.store(
            VALUES + row * (2 * M) + M + at, (b * (448.0 / most)).to(VALUES.dtype.element_ty), mask=inside
        )
