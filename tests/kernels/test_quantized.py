"""4-bit weights beside bitsandbytes, 8-bit floats beside what rounding allows."""

from __future__ import annotations

import pytest
import torch

from axolotl.kernels.fp8 import (
    EightBit,
    EightBitStack,
    Quantized,
    dequantize_rows,
    plain_quantize_rows,
    quantize_rows,
    scaled_product,
)
from axolotl.kernels.gates import gated_backward, gated_into, plain_gated
from axolotl.kernels.nf4 import FourBit, FourBitStack, dequantize, from_bitsandbytes, plain_dequantize
from axolotl.kernels.norms import Norm, norm_into
from kernels.comparing import error


def four_bit(N: int, K: int, nested: bool, seed: int = 0) -> FourBit:
    draw = torch.Generator().manual_seed(seed)
    blocks = -(-N * K // 64)
    packed = torch.randint(0, 256, (N * K // 2,), generator=draw, dtype=torch.uint8)
    table = torch.linspace(-1, 1, 16)
    if not nested:
        return FourBit(packed, torch.rand(blocks, generator=draw), table, (N, K), 64)
    return FourBit(
        packed, torch.randint(0, 256, (blocks,), generator=draw, dtype=torch.uint8), table, (N, K), 64,
        torch.rand(-(-blocks // 256), generator=draw), torch.rand(256, generator=draw), 256, torch.tensor(0.3),
    )  # fmt: skip


@pytest.mark.extras
@pytest.mark.parametrize(("N", "K"), [(1, 2), (3, 128), (7, 66), (70, 300)])
@pytest.mark.parametrize("nested", [False, True])
def test_the_4_bit_program_is_the_twin(interpreter, N, K, nested):
    matrix = four_bit(N, K, nested)
    expected = plain_dequantize(matrix, torch.float32)
    assert torch.equal(dequantize(matrix, torch.float32), expected)
    # The interpreter cuts where bfloat16 has to be rounded.
    assert error(dequantize(matrix, torch.bfloat16), expected) < 2**-7


@pytest.mark.extras
@pytest.mark.parametrize(("N", "K"), [(5, 128), (8, 70), (130, 256)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_4_bit_weights_are_those_of_bitsandbytes(N, K, nested, storage):
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        K, N, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested,
        quant_storage=getattr(torch, storage),
    )  # fmt: skip
    layer.load_state_dict({"weight": torch.randn(N, K, generator=torch.Generator().manual_seed(1))})
    layer = layer.to("cpu")
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    matrix = from_bitsandbytes(layer.weight)
    assert torch.allclose(plain_dequantize(matrix, torch.float32), expected.float(), atol=1e-6)
    x = torch.randn(3, K)
    assert torch.allclose(FourBitStack([matrix]).product(x), layer(x), atol=1e-4)


def test_what_is_no_4_bit_weight_is_refused():
    with pytest.raises(ValueError, match="4-bit"):
        from_bitsandbytes(torch.ones(3, 4))


@pytest.mark.parametrize("nested", [False, True])
def test_a_stack_multiplies_by_what_it_stands_for(nested):
    first, second = four_bit(6, 64, nested), four_bit(3, 64, nested, seed=1)
    whole = torch.cat([plain_dequantize(m, torch.float32) for m in (first, second)])
    stack, x, dy = FourBitStack([first, second]), torch.randn(5, 64), torch.randn(5, 9)
    assert torch.allclose(stack.product(x), x @ whole.t(), atol=1e-5)
    assert torch.allclose(stack.gradient(dy), dy @ whole, atol=1e-5)


def test_rows_keep_their_size_and_three_bits():
    x = torch.randn(50, 33) * torch.logspace(-6, 6, 50)[:, None]
    values, scale = quantize_rows(x)
    assert values.dtype is torch.float8_e4m3fn and scale.shape == (50, 1)
    back = dequantize_rows(values, scale, torch.float32)
    # Three bits behind the first: half a step is 1/16 of a number, or of the smallest normal number.
    assert ((back - x).abs() <= torch.maximum(x.abs() / 16, scale * 2**-10 + 1e-30)).all()
    zeros, scale = quantize_rows(torch.zeros(2, 4))
    assert not dequantize_rows(zeros, scale, torch.float32).any()


def test_the_emulated_product_is_that_of_the_rounded_numbers():
    x, w = torch.randn(7, 20), torch.randn(11, 20)
    (x8, sx), (w8, sw) = quantize_rows(x), quantize_rows(w)
    exact = dequantize_rows(x8, sx, torch.float64) @ dequantize_rows(w8, sw, torch.float64).t()
    assert error(scaled_product(x8, sx, w8, sw, torch.float32), exact) < 1e-5


def test_8_bit_products_are_as_near_as_the_rounding_allows():
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, 256, generator=draw) / 16 for n in (64, 32)]
    stack, whole = EightBitStack([EightBit(w) for w in weights]), torch.cat(weights)
    x, dy = torch.randn(40, 256, generator=draw), torch.randn(40, 96, generator=draw)
    for found, exact in ((stack.product(x), x @ whole.t()), (stack.gradient(dy), dy @ whole)):
        relative = float((found - exact).norm() / exact.norm())
        assert 0.005 < relative < 0.05  # rounded for real, and not more


def close_rows(found: Quantized, expected: Quantized) -> bool:
    """The same scales, and numbers that differ by one step of e4m3 at most."""
    values, wanted = (dequantize_rows(*each, torch.float32) for each in (found, expected))
    # The interpreter forgets the carry where a number is rounded up to a power of two.
    carried = torch.frexp(expected[0].float())[0].abs() == 0.5
    near = (values - wanted).abs() <= wanted.abs() / 8 + expected[1] / 256
    return torch.allclose(found[1], expected[1], rtol=1e-5) and bool((near | carried).all())


@pytest.mark.extras
@pytest.mark.parametrize(("T", "K"), [(1, 1), (3, 130), (5, 4099)])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_8_bit_program_is_the_twin(interpreter, T, K, scaled):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(T, K * 2, generator=draw)[:, :K]
    columns = torch.rand(K, generator=draw) if scaled else None
    assert close_rows(quantize_rows(x, columns), plain_quantize_rows(x, columns))
    assert bool((dequantize_rows(*quantize_rows(x * 0), torch.float32) == 0).all())


@pytest.mark.extras
def test_norms_and_gates_make_8_bit_copies_on_the_way(interpreter):
    T, N = 3, 133
    draw = torch.Generator().manual_seed(0)
    x, up, dout = (torch.randn(T, N, generator=draw) for _ in range(3))
    weight, columns = torch.rand(N, generator=draw), torch.rand(2 * N, generator=draw)
    out = torch.empty(T, N + 5)[:, :N]
    for norm in (Norm(1e-5, 0.0, True), Norm(1e-6, 1.0, False)):
        _, q = norm_into(x, weight, norm, out, quantize=True)
        assert q is not None and close_rows(q, plain_quantize_rows(out))
    q = gated_into(x, up, "silu", out, quantize=True)
    assert torch.allclose(out, plain_gated(x, up, "silu"), atol=1e-6)
    assert q is not None and close_rows(q, plain_quantize_rows(out))
    both, plain = torch.empty(T, 2 * N), torch.empty(T, 2 * N)
    gated_backward(dout, x, up, "silu", plain[:, :N], plain[:, N:], None)
    again = dout.clone()
    q = gated_backward(again, x, up, "silu", both[:, :N], both[:, N:], again, quantize=True, scale=columns)
    assert torch.allclose(both, plain, atol=1e-6) and torch.allclose(again, out, atol=1e-6)
    assert q is not None and close_rows(q, plain_quantize_rows(plain, columns))
