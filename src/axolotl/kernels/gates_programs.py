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
