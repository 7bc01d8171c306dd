"""Run by two processes (`test_parts.py`): what FSDP2 does to models, held against the same without it. Prints a line each."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from axolotl.config.adapter import AdapterSection
from axolotl.config.axes import Axes
from axolotl.config.distributed import FsdpConfig
from axolotl.config.model import ModelSection
from axolotl.config.optim import OptimSection
from axolotl.distributed.fsdp import give_back, norms_in_float32, shard_model
from axolotl.distributed.mesh import build_mesh
from axolotl.distributed.states import load_optimizer, load_weights, save_optimizer, save_weights, weights_of
from axolotl.model.adapter import add_adapter
from axolotl.model.empty import fill, put_on_meta, source_of, take_out
from axolotl.model.load import load_model
from axolotl.optim.build import build_optimizer
from axolotl.weights.whole import whole, write_whole
from train.miniature import CPU, tiny_model

WORK, TINY = Path(sys.argv[1]), Path(sys.argv[2])
CHECKS: list[Callable[[Any], None]] = []


def check(function: Callable[[Any], None]) -> Callable[[Any], None]:
    CHECKS.append(function)
    return function


def together(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(tensor) for name, tensor in weights_of(model, trained_only=False).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and a
    assert all(torch.equal(a[name], b[name]) for name in a)


def step(model: Any, optimizer: Any, seed: int) -> None:
    ids = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def sharded(mesh: Any, **options: Any) -> Any:
    model = tiny_model()
    shard_model(model, FsdpConfig(**options), mesh)
    return model


def loaded(mesh: Any, model: dict[str, Any], adapter: dict[str, Any], in_parts: bool) -> tuple[Any, Any]:
    """A model of a folder with its adapter, sharded or not."""
    section = ModelSection(base_model=str(TINY), **model)
    given, tokenizer = AdapterSection(**adapter), AutoTokenizer.from_pretrained(str(TINY))
    base: Any = load_model(section, given, tokenizer, CPU, training=True, seed=1, in_parts=in_parts)
    whole_model = add_adapter(base, given, seed=1) if given.adapter else base
    if in_parts:
        source = source_of(base)
        assert source is not None
        from_first = source.files is None and source.seed is None
        held = take_out(base) if from_first and dist.get_rank() == 0 else None
        put_on_meta(base)
        assert any(p.is_meta for p in base.parameters())
        shard_model(base, FsdpConfig(), mesh)
        fill(base, source, torch.device("cpu"), held)
        assert all(isinstance(p, DTensor) for p in base.parameters())
    return whole_model, base


@check
def weights_are_read_in_parts(mesh: Any) -> None:
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "down_proj"]}
    for model, adapter in (
        ({}, {}),
        ({"bf16": True}, lora),
        ({"resize_token_embeddings_to_32x": True, "shrink_embeddings": False}, lora),
        ({}, lora | {"peft_use_dora": True}),
        ({}, lora | {"lora_modules_to_save": ["embed_tokens"]}),
        ({"fix_untrained_tokens": [5, 6]}, {}),
    ):
        plain, _ = loaded(mesh, model, adapter, in_parts=False)
        parts, _ = loaded(mesh, model, adapter, in_parts=True)
        same(together(plain), together(parts))


@check
def rows_that_the_files_lack_start_alike(mesh: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(TINY))
    tokenizer.add_tokens([f"<new{i}>" for i in range(37)])
    section, adapter = ModelSection(base_model=str(TINY), mean_resizing_embeddings=True), AdapterSection()
    plain = load_model(section, adapter, tokenizer, CPU, training=True)
    parts = load_model(section, adapter, tokenizer, CPU, training=True, in_parts=True)
    source = source_of(parts)
    assert source is not None and source.files is not None
    put_on_meta(parts)
    shard_model(parts, FsdpConfig(), mesh)
    fill(parts, source, torch.device("cpu"), None)
    same(together(plain), together(parts))


@check
def a_random_start_is_that_of_any_number_of_processes(mesh: Any) -> None:
    one, _ = loaded(mesh, {"reinit_weights": True}, {}, in_parts=True)
    found = together(one)
    other, _ = loaded(build_mesh(Axes(2, 1), "cpu"), {"reinit_weights": True}, {}, in_parts=True)
    same(found, together(other))
    matrix = found["model.layers.0.mlp.down_proj.weight"]
    assert 0.015 < float(matrix.std()) < 0.025
    half = matrix.shape[0] // 2
    assert not torch.equal(matrix[:half], matrix[half : 2 * half])
    assert bool((found["model.norm.weight"] == 1).all())


@check
def whole_files_are_what_transformers_loads(mesh: Any) -> None:
    model = sharded(mesh)
    for name, limit in (("one", 10**9), ("many", 60_000)):
        folder = WORK / name
        folder.mkdir(exist_ok=True)
        dist.barrier()
        write_whole(model, folder, limit=limit)
        if dist.get_rank() == 0:
            model.config.save_pretrained(str(folder))
        dist.barrier()
        again, info = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        same({n: p.detach() for n, p in tiny_model().named_parameters()}, dict(again.named_parameters()))
    assert len(list((WORK / "many").glob("*.safetensors"))) > 2


@check
def optimizers_keep_their_state(mesh: Any) -> None:
    for name in ("adamw_torch_fused", "sgd", "adagrad", "rmsprop", "lion", "adopt_adamw", "muon"):
        optim, adapter = OptimSection(optimizer=name, learning_rate=0.01), AdapterSection()
        one, parts, later = tiny_model(), sharded(mesh), sharded(mesh)
        first, second, third = (build_optimizer(m, optim, adapter) for m in (one, parts, later))
        for seed in range(3):
            step(one, first, seed)
            step(parts, second, seed)
        found = together(parts)
        for key, value in one.named_parameters():
            # Muon's roots of matrices are of low precision by design.
            assert torch.allclose(found[key], value, atol=2e-3 if name == "muon" else 1e-6), (name, key)
        folder = WORK / name
        save_weights(parts, folder / "w", trained_only=False)
        save_optimizer(parts, second, folder / "o")
        load_weights(later, folder / "w", trained_only=False)
        load_optimizer(later, third, folder / "o")
        alone = tiny_model()
        fourth = build_optimizer(alone, optim, adapter)
        load_weights(alone, folder / "w", trained_only=False)
        load_optimizer(alone, fourth, folder / "o")
        for seed in (3, 4):
            step(parts, second, seed)
            step(later, third, seed)
            step(alone, fourth, seed)
        same(together(parts), together(later))
        found = together(parts)
        for key, value in alone.named_parameters():
            assert torch.allclose(found[key], value, atol=2e-3 if name == "muon" else 1e-6), (name, key)


@check
def options_of_units(mesh: Any) -> None:
    ids = torch.arange(16)[None]
    wanted = tiny_model()(input_ids=ids).logits
    for options in (
        {"auto_wrap_policy": "NO_WRAP"},
        {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 3000},
        {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "reshard_after_forward": False},
        {"offload_params": True},
        {"mixed_precision_policy": "bf16"},
    ):
        model = sharded(mesh, **options)
        found = model(input_ids=ids).logits
        tolerance = 0.02 if options.get("mixed_precision_policy") else 1e-6
        assert torch.allclose(found.float(), wanted, atol=tolerance), options
        give_back(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())


@check
def norms_may_stay_in_float32(mesh: Any) -> None:
    model: Any = tiny_model().to(torch.bfloat16)
    assert norms_in_float32(model) == ["LlamaRMSNorm"]
    shard_model(model, FsdpConfig(), mesh)
    optimizer = build_optimizer(model, OptimSection(learning_rate=0.01), AdapterSection())
    step(model, optimizer, 0)
    kinds = {name.rpartition(".")[0].rpartition(".")[2]: p.dtype for name, p in model.named_parameters()}
    assert kinds["input_layernorm"] is torch.float32
    assert kinds["q_proj"] is torch.bfloat16


@check
def tied_weights_stay_tied(mesh: Any) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    shard_model(model, FsdpConfig(), mesh)
    optimizer = build_optimizer(model, OptimSection(learning_rate=0.01), AdapterSection())
    for seed in range(2):
        ids = torch.randint(0, 101, (1, 8), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=ids).loss.backward()  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def main() -> None:
    dist.init_process_group("gloo")
    mesh = build_mesh(Axes(1, dist.get_world_size()), "cpu")
    for each in CHECKS:
        try:
            each(mesh)
            said = "passed"
        except Exception:
            said = f"failed\n{traceback.format_exc()}"
        found: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(found, said)
        if dist.get_rank() == 0:
            wrong = next((text for text in found if text != "passed"), "passed")
            print(f"{each.__name__}: {wrong}", flush=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
