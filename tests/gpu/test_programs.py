"""Every Triton program compiled for the GPU, in the sizes of real models and in odd ones, beside its twin in float64."""

from __future__ import annotations

import functools

import pytest
import torch

from axolotl.kernels.cross_entropy import linear_cross_entropy, plain_linear_cross_entropy
from axolotl.kernels.decoder import norm_linears, output_and_mlp
from axolotl.kernels.fp8 import EightBit, EightBitStack, dequantize_rows, plain_quantize_rows, quantize_rows
from axolotl.kernels.frozen import Dense
from axolotl.kernels.gates import ACTIVATIONS, gated, gated_backward, gated_into, plain_gated
from axolotl.kernels.lora import LoraGroup, lora_linears, lora_mlp, padded, plain_lora, plain_lora_mlp
from axolotl.kernels.nf4 import dequantize, plain_dequantize
from axolotl.kernels.norms import Norm, norm_into, plain_rms_norm, rms_norm
from axolotl.kernels.rotary import plain_rotary, rotary
from kernels.comparing import assert_like_twin, error
from kernels.test_quantized import four_bit

pytestmark = pytest.mark.gpu
TYPES = [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)]
SHAPES = [(1, 3), (2, 3, 7), (515, 130), (300, 4096), (33, 14336)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = True) -> torch.Tensor:
    draw = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=draw, device="cuda").to(dtype).requires_grad_(grad)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize(("offset", "round_first"), [(0.0, True), (1.0, False)])
def test_rms_norm(shape, dtype, tolerance, offset, round_first):
    options = {"eps": 1e-5, "offset": offset, "round_first": round_first}
    assert_like_twin(
        lambda x, w: rms_norm(x, w, **options),
        lambda x, w: plain_rms_norm(x, w, **options),
        [random(*shape, dtype=dtype), random(shape[-1], seed=1, dtype=dtype)],
        tolerance,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gated(shape, dtype, tolerance, act):
    assert_like_twin(
        functools.partial(gated, act=act),
        functools.partial(plain_gated, act=act),
        [random(*shape, dtype=dtype), random(*shape, seed=1, dtype=dtype)],
        tolerance,
    )


@pytest.mark.parametrize(
    ("B", "H", "G", "T", "D", "R"), [(2, 32, 8, 1025, 128, 128), (1, 3, 1, 7, 12, 8), (1, 9, 9, 40, 80, 32)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
def test_rotary(B, H, G, T, D, R, dtype, tolerance):
    cos, sin = (random(B, T, R, seed=s, dtype=dtype, grad=False) for s in (2, 3))
    q, k = (
        random(B, T, n, D, seed=n, dtype=dtype, grad=False).transpose(1, 2).requires_grad_() for n in (H, G)
    )
    assert_like_twin(
        lambda q, k: rotary(q, k, cos, sin),
        lambda q, k: plain_rotary(q, k, cos.to(q), sin.to(q)),
        [q, k],
        tolerance,
    )


@pytest.mark.parametrize(("T", "D", "V"), [(1, 64, 1000), (300, 256, 128256), (4100, 128, 32003), (5, 7, 11)])
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("frozen", [True, False])
def test_linear_cross_entropy(T, D, V, dtype, tolerance, softcap, frozen):
    y = torch.randint(0, V, (T,), device="cuda")
    y[1::3] = -100
    x, w = random(T, D, dtype=dtype), random(V, D, seed=1, dtype=dtype, grad=False).mul_(D**-0.5)
    assert_like_twin(
        lambda x, w: linear_cross_entropy(x, w, y, 7.0, softcap=softcap, scale=0.5, triton=True),
        lambda x, w: linear_cross_entropy(x, w, y, 7.0, softcap=softcap, scale=0.5, triton=False),
        [x, w.requires_grad_(not frozen)],
        tolerance,
    )


def test_the_loss_of_real_logits_is_that_of_torch():
    T, D, V = 257, 128, 50001
    y = torch.randint(0, V, (T,), device="cuda")
    x, w = random(T, D), random(V, D, seed=1)
    assert_like_twin(
        lambda x, w: linear_cross_entropy(x, w, y),
        lambda x, w: plain_linear_cross_entropy(x, w, y).double(),
        [x, w],
        1e-4,
    )


@pytest.mark.parametrize(("N", "K"), [(7, 66), (70, 300), (1024, 4096)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_bit_weights(N, K, nested, dtype):
    matrix = four_bit(N, K, nested)
    tensors = {k: v.cuda() for k, v in vars(matrix).items() if isinstance(v, torch.Tensor)}
    here = type(matrix)(**{**vars(matrix), **tensors})
    found = dequantize(here, dtype)
    # The GPU multiplies and adds in one.
    assert error(found, plain_dequantize(here, torch.float32)) < (1e-6 if dtype is torch.float32 else 2**-8)
    wide = torch.full((N, K + 16), 5.0, dtype=dtype, device="cuda")
    dequantize(here, dtype, wide[:, :K])
    assert torch.equal(wide[:, :K], found)
    assert bool((wide[:, K:] == 5).all())


@pytest.mark.parametrize(("T", "K"), [(1, 1), (3, 130), (700, 4096), (64, 28672)])
@pytest.mark.parametrize("scaled", [False, True])
def test_8_bit_rows(T, K, scaled):
    x = random(T, K * 2, dtype=torch.bfloat16, grad=False)[:, :K]
    columns = random(K, seed=1, grad=False).abs() if scaled else None
    assert same_rows(quantize_rows(x, columns), plain_quantize_rows(x, columns))


def same_rows(found, expected) -> bool:
    a, b = (dequantize_rows(*each, torch.float32) for each in (found, expected))
    # A number in the middle between two may go to either.
    return torch.allclose(found[1], expected[1], rtol=1e-5) and bool(
        ((a - b).abs() <= b.abs() / 7 + expected[1] / 256).all() and float((a != b).float().mean()) < 0.01
    )


@pytest.mark.parametrize("M", [130, 4096, 14336])
def test_8_bit_copies_on_the_way(M):
    x, up, dout = (random(70, M, seed=s, dtype=torch.bfloat16, grad=False) for s in range(3))
    weight, columns = (
        random(M, seed=4, dtype=torch.bfloat16, grad=False),
        random(2 * M, seed=5, grad=False).abs(),
    )
    out = torch.empty(70, M + 32, dtype=torch.bfloat16, device="cuda")[:, :M]
    if M <= 4096:
        _, q = norm_into(x, weight, Norm(1e-5, 0.0, True), out, quantize=True)
        assert same_rows(q, plain_quantize_rows(out))
    q = gated_into(x, up, "silu", out, quantize=True)
    assert same_rows(q, plain_quantize_rows(out))
    both, plain = (torch.empty(70, 2 * M, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    gated_backward(dout, x, up, "silu", plain[:, :M], plain[:, M:], None)
    again = dout.clone()
    q = gated_backward(again, x, up, "silu", both[:, :M], both[:, M:], again, quantize=True, scale=columns)
    assert torch.equal(both, plain)
    assert torch.equal(again, out)
    assert same_rows(q, plain_quantize_rows(plain, columns))


def lora(K: int, sizes: list[int], r: int, dtype: torch.dtype, seed: int):
    parts = []
    for i, n in enumerate(sizes):
        w = random(n, K, seed=seed + i, grad=False) / K**0.5
        a = random(r, K, seed=seed + i + 10, grad=False) / K**0.5
        b = random(n, r, seed=seed + i + 20, grad=False) / r**0.5
        parts.append((w.to(dtype), torch.nn.Parameter(a), torch.nn.Parameter(b), 0.5 + i, None))
    return parts


def group(parts, kind: str) -> LoraGroup:
    weights = [p[0].clone() for p in parts]
    if kind == "fp8":
        base = EightBitStack([EightBit(w) for w in weights])
    else:
        base = Dense(weights, padded(sum(p[1].shape[0] for p in parts)) if kind == "folded" else 0)
    return LoraGroup(
        base, [p[1] for p in parts], [p[2] for p in parts], [p[3] for p in parts], [None] * len(parts)
    )


@pytest.mark.parametrize(
    ("T", "H", "A", "M", "r"), [(1, 64, 64, 96, 4), (515, 512, 256, 1376, 8), (2048, 4096, 4096, 14336, 32)]
)
@pytest.mark.parametrize(("kind", "tolerance"), [("plain", 3e-2), ("folded", 3e-2), ("fp8", 0.4)])
def test_halves_of_a_decoder_layer(T, H, A, M, r, kind, tolerance):
    dtype, norm = torch.bfloat16, Norm(1e-5, 0.0, True)
    qkv, (out,), both, (last,) = (
        lora(H, [A, A // 4, A // 4], r, dtype, 1), lora(A, [H], r, dtype, 2), lora(H, [M, M], r, dtype, 3), lora(M, [H], r, dtype, 4)
    )  # fmt: skip
    weight = (random(H, seed=9, grad=False) * 0.1 + 1).to(dtype)
    first, output, gate_up, down = (
        group(qkv, kind),
        group([out], kind),
        group(both, kind),
        group([last], kind),
    )

    def normed(h):
        return plain_rms_norm(h, weight.to(h), norm.eps)

    def twin_first(h, *low):
        made = [plain_lora(normed(h), p[0].to(h), low[i], low[3 + i], p[3]) for i, p in enumerate(qkv)]
        return (*made, h * 1)

    h = random(T, H, dtype=dtype)
    assert_like_twin(
        lambda h, *_: norm_linears(h, weight, norm, first), twin_first, [h, *first.parameters], tolerance
    )

    def twin_second(attended, h, oa, ob, a0, a1, b0, b1, a2, b2):
        middle = h + plain_lora(attended, out[0].to(h), oa, ob, out[3])
        layers = [
            (p[0].to(h), a, b, p[3]) for p, a, b in ((both[0], a0, b0), (both[1], a1, b1), (last, a2, b2))
        ]
        return middle + plain_lora_mlp(normed(middle), layers, "silu")

    parameters = [*output.parameters, *gate_up.parameters, *down.parameters]
    assert_like_twin(
        lambda x, h, *_: output_and_mlp(x, h, output, weight, norm, gate_up, down, "silu"),
        twin_second,
        [random(T, A, seed=7, dtype=dtype), h, *parameters],
        tolerance,
    )


@pytest.mark.parametrize("kind", ["plain", "folded"])
def test_lora_layers_alone(kind):
    T, H, M, r = 300, 512, 1376, 8
    both, (last,) = lora(H, [M, M], r, torch.bfloat16, 3), lora(M, [H], r, torch.bfloat16, 4)
    gate_up, down = group(both, kind), group([last], kind)
    x = random(T, H, dtype=torch.bfloat16)
    assert_like_twin(
        lambda x, *_: lora_linears(x, gate_up),
        lambda x, a0, a1, b0, b1: tuple(
            plain_lora(x, p[0].to(x), a, b, p[3]) for p, a, b in ((both[0], a0, b0), (both[1], a1, b1))
        ),
        [x, *gate_up.parameters],
        3e-2,
    )

    def twin(x, a0, a1, b0, b1, a2, b2):
        layers = [
            (p[0].to(x), a, b, p[3]) for p, a, b in ((both[0], a0, b0), (both[1], a1, b1), (last, a2, b2))
        ]
        return plain_lora_mlp(x, layers, "silu")

    assert_like_twin(
        lambda x, *_: lora_mlp(x, gate_up, down, "silu"),
        twin,
        [x, *gate_up.parameters, *down.parameters],
        3e-2,
    )


def test_the_scaled_product_of_the_gpu_is_that_of_the_numbers():
    x, w = random(200, 256, dtype=torch.bfloat16, grad=False), random(512, 256, seed=1, grad=False)
    stack = EightBitStack([EightBit(w[:128]), EightBit(w[128:])])
    exact = (
        dequantize_rows(*quantize_rows(x), torch.float32)
        @ dequantize_rows(stack.values, stack.scale, torch.float32).t()
    )
    assert error(stack.product(x), exact) < 2e-2
    dy = random(200, 512, seed=2, grad=False)
    assert (
        error(stack.gradient(dy.bfloat16()), dy @ dequantize_rows(stack.values, stack.scale, torch.float32))
        < 0.1
    )
