"""Run by several processes (`test_tensor.py`): models whose products are shared, held against whole ones. Prints a line each."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor

from axolotl.config.axes import Axes
from axolotl.config.distributed import FsdpConfig
from axolotl.distributed.fsdp import give_back, shard_model
from axolotl.distributed.mesh import build_mesh
from axolotl.errors import ModelError
from axolotl.kernels.cross_entropy import plain_linear_cross_entropy
from axolotl.kernels.cross_entropy_parts import divided_linear_cross_entropy
from axolotl.weights.whole import whole

SIZES: dict[str, Any] = {
    "vocab_size": 98,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "odd": ("Llama", {"tie_word_embeddings": True, "vocab_size": 97}),
    "qwen2": ("Qwen2", {}),
    # Their query and key norms see each process's own heads.
    "qwen3": ("Qwen3", {}),
    "gemma3": ("Gemma3Text", {"tie_word_embeddings": True, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", {}),
}

LAYERS, ENDS = {"phi3": 4}, {"odd": 0, "tied": 1, "gemma3": 1}
"""Matrices that are divided: in each layer, and before and after the layers."""


def model_of(kind: str, lora: bool) -> Any:
    family, more = MODELS[kind]
    config = getattr(transformers, f"{family}Config")(**(SIZES | more))
    name = "Gemma3ForCausalLM" if family == "Gemma3Text" else f"{family}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    if not lora:
        return model
    targets = "all-linear" if kind != "phi3" else ["qkv_proj", "o_proj", "down_proj"]
    return get_peft_model(
        model, LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    )


def passes(model: Any) -> float:
    """Two micro batches, as of one step."""
    total = 0.0
    for seed in range(2):
        ids = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(seed))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        total += loss.item()
    return total


def agrees(kind: str, lora: bool, axes: Axes) -> None:
    alone, divided = model_of(kind, lora).train(), model_of(kind, lora).train()
    base = divided.get_base_model() if lora else divided
    sharding = shard_model(base, FsdpConfig(), build_mesh(axes, "cpu"))
    assert sharding.products is not None
    assert sharding.products.divided == LAYERS.get(kind, 7) * 2 + ENDS.get(kind, 2)
    assert bool(sharding.products.whole) == (kind == "odd")
    wanted, found = passes(alone), passes(divided)
    assert abs(wanted - found) < 1e-5 * abs(wanted), (wanted, found)
    give_back(divided)
    theirs = dict(divided.named_parameters())
    parts = 0
    for name, parameter in alone.named_parameters():
        other = theirs[name]
        assert torch.allclose(whole(other.detach()), parameter.detach()), name
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            assert torch.allclose(whole(other.grad), parameter.grad, atol=2e-6, rtol=1e-4), name
        parts += isinstance(other, DTensor) and other.to_local().numel() < other.numel()
    assert parts >= sharding.products.divided


def loss_of_divided_words() -> None:
    group = build_mesh(Axes(1, 1, 1, 2), "cpu").tensor.get_group()
    draw = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*shape, generator=draw) for shape in ((21, 8), (34, 8), (34,)))
    y = torch.randint(0, 34, (21,), generator=draw)
    y[::4] = -100
    for options in ({}, {"softcap": 2.0, "scale": 0.5}, {"chunks": 4}):
        more = {k: v for k, v in options.items() if k != "chunks"}
        whole_inputs = [each.clone().requires_grad_() for each in (x, w, b)]
        mine = [x, *(each.chunk(2)[group.rank()] for each in (w, b))]
        parts = [each.clone().requires_grad_() for each in mine]
        wanted = plain_linear_cross_entropy(*whole_inputs[:2], y, 7.0, bias=whole_inputs[2], **more)
        found = divided_linear_cross_entropy(*parts[:2], y, 7.0, bias=parts[2], group=group, **options)
        assert torch.allclose(wanted, found, rtol=1e-6)
        (3 * wanted).backward()
        (3 * found).backward()
        grads = [each.grad for each in whole_inputs]
        grads = [grads[0], *(each.chunk(2)[group.rank()] for each in grads[1:])]
        for a, other in zip(grads, parts, strict=True):
            assert torch.allclose(a, other.grad, atol=1e-6), options


def refusals() -> None:
    mesh = build_mesh(Axes(1, 1, 1, dist.get_world_size()), "cpu")
    for family, more, said in (
        ("Llama", {"num_attention_heads": 1, "num_key_value_heads": 1}, "1 attention heads"),
        ("Llama", {"num_key_value_heads": 1}, "1 key/value heads"),
        ("Llama", {"intermediate_size": 49}, "49 rows in its feed-forward layers"),
        ("Mixtral", {"num_local_experts": 2}, "experts"),
        ("GPT2", {}, "no plan"),
    ):
        names = {} if family == "GPT2" else SIZES | more
        config = getattr(transformers, f"{family}Config")(**names)
        with torch.device("meta"):
            model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(
                config
            )
        with pytest.raises(ModelError, match=said):
            shard_model(model, FsdpConfig(), mesh)


def main() -> None:
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    layouts = [Axes(1, 1, 1, 2)] if size == 2 else [Axes(1, 2, 1, 2), Axes(2, 1, 1, 2)]
    kinds = list(MODELS) if size == 2 else ["tied", "qwen3"]
    checks: list[Any] = [
        (f"{kind} {'lora' if lora else 'full'} {axes.sizes}", functools.partial(agrees, kind, lora, axes))
        for kind in kinds
        for lora in (False, True)
        for axes in layouts
    ]
    checks += [("refusals", refusals), ("loss", loss_of_divided_words)] if size == 2 else []
    for name, each in checks:
        try:
            each()
            said = "passed"
        except Exception:
            said = f"failed\n{traceback.format_exc()}"
        found: list[str] = [""] * size
        dist.all_gather_object(found, said)
        if dist.get_rank() == 0:
            wrong = next((text for text in found if text != "passed"), "passed")
            print(f"{name}: {wrong}", flush=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
