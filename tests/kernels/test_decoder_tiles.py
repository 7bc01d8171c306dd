"""The half behind the attention in tiles beside the same in one pass, and what a recomputed layer does twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from axolotl.config.kernels import KernelsSection
from axolotl.config.train import TrainSection
from axolotl.kernels import decoder_tiles
from axolotl.kernels.decoder import output_and_mlp
from axolotl.kernels.decoder_tiles import Half, output_and_mlp_in_tiles
from axolotl.kernels.norms import Norm
from axolotl.model.patch import apply_kernels
from axolotl.model.sparing import spare_memory
from kernels.test_lora import group_of, layers
from model.families import build
from model.test_patch import LORA, base_of, bench, run
from model.test_recompute import near


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 4, 7, 30])
def test_as_in_one_pass(length: int, dtype: torch.dtype, folded: bool) -> None:
    torch.manual_seed(0)
    H, A, M = 12, 8, 20
    (out,) = layers(A, [H], [3], seed=4)
    gate, up = layers(H, [M, M], [3, 2])
    (down,) = layers(M, [H], [4], seed=1)
    output, gate_up, below = group_of([out], False), group_of([gate, up], folded), group_of([down], folded)
    half = Half(output, torch.rand(H) + 0.5, Norm(1e-5, 0.0, True), gate_up, below, "silu")
    attended = torch.randn(2, 7, A).to(dtype).requires_grad_()
    h = torch.randn(2, 7, H).to(dtype).requires_grad_()
    inputs = [attended, h, *half.parameters]

    def both(op: Any) -> list[torch.Tensor]:
        y = op()
        slope = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, inputs, slope)]

    plain = both(lambda: output_and_mlp(attended, h, output, half.weight, half.norm, gate_up, below, "silu"))
    ours = both(lambda: output_and_mlp_in_tiles(attended, h, half, length))
    limit = 1e-6 if dtype is torch.float64 else 0.02
    for a, b in zip(ours, plain, strict=True):
        assert float((a - b).norm()) <= limit * float(b.norm())


def test_in_a_recomputed_layer_it_is_gone_through_twice(monkeypatch: Any) -> None:
    plain = build("llama", lora=True).train()
    apply_kernels(bench(plain, **LORA))
    expected = run(plain)
    calls: list[str] = []
    for name in ("mlp_forward", "mlp_backward"):
        real = getattr(decoder_tiles, name)
        monkeypatch.setattr(
            decoder_tiles, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1]
        )
    for keys in (
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "selective_checkpointing": True},
        {"gradient_checkpointing": True, "activation_offloading": True},
    ):
        calls.clear()
        model = build("llama", lora=True).train()
        made = apply_kernels(bench(model, **LORA))
        assert made.counts["LoRA decoder layer"] == 2
        kernels = KernelsSection(tiled_mlp=True, tiled_mlp_num_shards=3)
        spare_memory(base_of(model), TrainSection(**keys), kernels, torch.device("cpu"), made)
        near(run(model), expected)
        # Three tiles in each of two layers, once in each direction.
        assert calls.count("mlp_forward") == calls.count("mlp_backward") == 6
        made.undo()
        near(run(model), run(build("llama", lora=True).train()))
