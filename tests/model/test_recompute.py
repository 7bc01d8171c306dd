"""Layers computed again, tiled or moved away: the same loss and gradients, what is kept, and what is done twice."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from axolotl.config.kernels import KernelsSection
from axolotl.config.train import TrainSection
from axolotl.errors import ModelError
from axolotl.model import frames
from axolotl.model.frames import Options, draws, known, recomputed
from axolotl.model.park import DiskPark, HostPark, PinnedPool
from axolotl.model.patch import apply_kernels
from axolotl.model.recompute import Recompute, apply_recompute, layers_of, recompute_of
from axolotl.model.replace import Replacements
from axolotl.model.sparing import spare_memory
from axolotl.model.tiles import tile_feed_forward
from model.families import CONFIGS, build
from model.test_patch import LORA, base_of, bench, run

CPU = torch.device("cpu")
FAST = ("llama", "qwen3", "gemma2", "phi")
FAMILIES = [pytest.param(f, marks=() if f in FAST else pytest.mark.slow) for f in CONFIGS]
MODES = {
    "all": Recompute(),
    "one of two": Recompute(layers=1),
    "attention kept": Recompute(keeps=("attention",)),
    "products kept": Recompute(keeps=("attention", "matmul")),
    "host": Recompute(place="host", everything=True),
    "plain host": Recompute(place="plain"),
    "disk": Recompute(place="disk"),
    "kept on host": Recompute(keeps=("attention",), place="host", kept_on_host=True),
    "pytorch": Recompute(options={"determinism_check": "default"}),
}


def same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


def near(found: Any, expected: Any) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-5
        )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_gives_the_same_bits(family: str, lora: bool) -> None:
    expected = run(build(family, lora=lora).train())
    for name, how in MODES.items():
        model = build(family, lora=lora).train()
        made = Replacements()
        done = apply_recompute(base_of(model), how, CPU, made)
        assert done.recomputed == (1 if how.layers else 2), name
        assert bool(done.kept) is bool(how.keeps), name
        with done.hooks() or torch.enable_grad():
            same(run(model), expected)
        made.undo()
        same(run(model), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_with_lora_kernels_and_tiles(family: str) -> None:
    plain = build(family, lora=True).train()
    apply_kernels(bench(plain, **LORA))
    expected = run(plain)
    for how in (None, Recompute(), Recompute(keeps=("attention",), place="host")):
        for tiles in (1, 3):
            model = build(family, lora=True).train()
            made = apply_kernels(bench(model, **LORA))
            assert tile_feed_forward(base_of(model), made, tiles, replaced_only=True) == 2
            apply_recompute(base_of(model), how, CPU, made)
            near(run(model), expected)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_compute_the_same(family: str, lora: bool) -> None:
    expected = run(build(family, lora=lora).train())
    for tiles, original in ((2, True), (22, True), (5, False)):
        model, made = build(family, lora=lora).train(), Replacements()
        count = tile_feed_forward(base_of(model), made, tiles, original=original)
        # The formula is that of a gated layer, which phi has not.
        assert count == (0 if family == "phi" and not original else 2)
        near(run(model), expected)
        made.undo()
        same(run(model), expected)


def test_gradients_of_half_precision_weights_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    layer = nn.Module()
    layer.mlp = nn.Linear(16, 16, bias=False).bfloat16()
    x = torch.randn(1, 4096, 16).bfloat16()
    weight = layer.mlp.weight
    exact = (torch.ones(4096, 16).double().T @ x[0].double()).float()
    layer.mlp(x).sum().backward()
    assert weight.grad is not None
    whole = (weight.grad.float() - exact).abs().max()
    weight.grad = None
    narrow = torch.zeros_like(weight)
    for part in x[0].split(16):
        narrow += torch.ones(16, 16).bfloat16().T @ part
    assert tile_feed_forward(layer, Replacements(), 256) == 1
    layer.mlp(x).sum().backward()
    ours = (weight.grad.float() - exact).abs().max()
    assert ours < 3 * whole
    assert ours < (narrow.float() - exact).abs().max() / 3


def test_tiles_and_layers_draw_the_same_random_numbers_again() -> None:
    found = []
    for how, tiles in ((None, 1), (Recompute(), 1), (None, 2), (Recompute(keeps=("attention",)), 2)):
        model = build("llama", lora=True, lora_dropout=0.3).train()
        assert draws(model)
        made = Replacements()
        if tiles > 1:
            tile_feed_forward(base_of(model), made, tiles)
        apply_recompute(base_of(model), how, CPU, made)
        torch.manual_seed(5)
        found.append(run(model))
        # Those after it are the same too, whatever the backward pass drew again.
        found[-1] = (*found[-1], torch.rand(3).tolist() if how is None else None)
    same(found[1][:2], found[0][:2])
    # Tiles draw in another order, but the two passes of a layer agree.
    same(found[3][:2], found[2][:2])
    assert not draws(build("llama", lora=True))


def counted(model: Any, how: Recompute | None, tiles: bool = False) -> dict[str, int]:
    """Calls of a layer's parts in a step."""
    calls = {"attention": 0, "mlp": 0, "norm": 0}
    base = base_of(model)
    plain = base.config._attn_implementation
    real = AttentionInterface().get(plain) or eager_attention_forward

    def attention(*args: Any, **kwargs: Any) -> Any:
        calls["attention"] += 1
        return real(*args, **kwargs)

    AttentionInterface.register("counted", attention)
    base.set_attn_implementation("counted")
    layer = base.model.layers[0]
    for what, module in (("mlp", layer.mlp.down_proj), ("norm", layer.input_layernorm)):
        module.register_forward_pre_hook(lambda *_, w=what: calls.update({w: calls[w] + 1}))
    made = Replacements()
    if tiles:
        tile_feed_forward(base, made, 2)
    apply_recompute(base, how, CPU, made)
    run(model)
    return calls


def test_what_is_kept_or_asked_for_by_nobody_is_not_done_again() -> None:
    assert counted(build("llama").train(), None) == {"attention": 2, "mlp": 1, "norm": 1}
    assert counted(build("llama").train(), Recompute()) == {"attention": 4, "mlp": 2, "norm": 2}
    kept = counted(build("llama").train(), Recompute(keeps=("attention",)))
    assert kept == {"attention": 2, "mlp": 2, "norm": 2}
    # Two tiles, once forward and once backward: the layer's second run leaves them out.
    assert counted(build("llama").train(), Recompute(), tiles=True)["mlp"] == 4
    # Gemma 2 has a norm behind the feed-forward layer, which needs its output.
    assert counted(build("gemma2").train(), Recompute(), tiles=True)["mlp"] == 6


def test_the_first_layers_are_the_ones_computed_again() -> None:
    model = build("llama").train()
    made = Replacements()
    apply_recompute(model, Recompute(layers=1), CPU, made)
    first, second = layers_of(model)
    assert "forward" in first.__dict__ and "forward" not in second.__dict__


# Frames


def test_a_function_is_run_again_only_as_far_as_needed() -> None:
    seen: list[str] = []
    w = torch.randn(3, 3, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.append("first")
        y = torch.sin(x @ w)
        seen.append("second")
        z = torch.exp(y)
        seen.append("third")
        # The gradient of a sum needs nothing.
        return z.sum()

    x = torch.randn(2, 3, requires_grad=True)
    recomputed(run, Options(), x).backward()
    assert seen == ["first", "second", "third", "first", "second"]
    again = x.grad, w.grad
    x.grad = w.grad = None
    run(x).backward()
    assert torch.equal(again[0], x.grad) and torch.equal(again[1], w.grad)


def test_without_gradients_it_is_an_ordinary_call() -> None:
    with torch.no_grad():
        assert recomputed(lambda x: x + 1, Options(), torch.zeros(1)) == 1
    assert not frames.active()


def test_a_failure_inside_leaves_nothing_behind() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        recomputed(fails, Options(), torch.zeros(1, requires_grad=True))
    assert not frames.active()


def test_a_second_run_that_differs_is_told() -> None:
    sizes = iter((3, 4))

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x.expand(next(sizes))).sum()

    loss = recomputed(run, Options(), torch.zeros(1, requires_grad=True))
    with pytest.raises(ModelError, match="other shapes"):
        loss.backward()


def test_gradients_may_be_asked_for_twice() -> None:
    x = torch.randn(4, requires_grad=True)
    y = recomputed(lambda t: torch.exp(t).sin().sum(), Options(park=HostPark(CPU)), x)
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)


def test_a_part_that_keeps_too_much_is_run_again() -> None:
    calls = []

    def wide(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch.exp(x[:, None].expand(-1, 50)).sin().sum(1)

    x = torch.randn(6, requires_grad=True)
    recomputed(lambda t: torch.exp(known(wide, t * 2, keeps=True)).sum(), Options(), x).backward()
    assert len(calls) == 2


def test_autocast_is_as_it_was() -> None:
    layer = nn.Linear(4, 4)
    kinds = []

    def run(x: torch.Tensor) -> torch.Tensor:
        y = layer(x)
        kinds.append(y.dtype)
        return torch.exp(y).sum()

    x = torch.randn(2, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = recomputed(run, Options(), x)
    loss.backward()
    assert kinds == [torch.bfloat16, torch.bfloat16]


# Places


@pytest.mark.parametrize("kind", [HostPark, DiskPark])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_parked_comes_back(kind: Any, dtype: torch.dtype) -> None:
    park = kind(CPU)
    tensors = [torch.randn(3, 5, i + 1).to(dtype).transpose(0, 1) for i in range(6)]
    tickets = [park.put(t) for t in tensors]
    for ticket, tensor in reversed(list(zip(tickets, tensors, strict=True))):
        assert torch.equal(ticket.get(), tensor)
    assert torch.equal(tickets[2].get(), tensors[2])


def test_the_one_before_is_fetched_ahead() -> None:
    park = HostPark(CPU)
    tickets = [park.put(torch.full((2,), float(i))) for i in range(4)]
    tickets[3].get()
    assert tickets[2].fetched and not tickets[1].fetched
    del tickets[2]
    tickets[1].get()
    assert tickets[0].fetched
    del tickets
    assert park.put(torch.zeros(1)).get() == 0


def test_pieces_are_used_again() -> None:
    pool = PinnedPool(pin=False)
    first = pool.take(3 * 2**26 + 5)
    assert [p.numel() for p in first] == [2**26, 2**26, 2**26, 5]
    taken = pool.bytes
    pool.give(first)
    pool.take(3 * 2**26 + 5)
    assert pool.bytes == taken
    # Whole tensors would be rounded up to the next power of two.
    assert taken < 3.01 * 2**26


def test_files_go_with_their_tensors(tmp_path: Any) -> None:
    park = DiskPark(CPU, tmp_path)
    ticket = park.put(torch.ones(8))
    assert ticket.get().sum() == 8
    assert list(park.folder.iterdir())
    del ticket
    gc.collect()
    assert not list(park.folder.iterdir())


# Keys


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"gradient_checkpointing": "auto"}, None),
        ({"gradient_checkpointing": True}, Recompute()),
        ({"gradient_checkpointing": 5}, Recompute(layers=5)),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            Recompute(options={"use_reentrant": True}),
        ),
        (
            {"gradient_checkpointing": True, "selective_checkpointing": True},
            Recompute(keeps=("attention",), keeps_windows=False),
        ),
        (
            {
                "gradient_checkpointing": True,
                "selective_checkpointing": {"save": ["o_proj"], "offload": True, "save_sliding_window": True},
            },
            Recompute(keeps=("o_proj",), kept_on_host=True),
        ),
        (
            {"gradient_checkpointing": True, "activation_offloading": True},
            Recompute(place="host", everything=True),
        ),
        ({"gradient_checkpointing": 3, "activation_offloading": "disk"}, Recompute(layers=3, place="disk")),
        ({"gradient_checkpointing": True, "activation_offloading": "hidden_states"}, Recompute(place="host")),
        ({"gradient_checkpointing": True, "activation_offloading": "legacy"}, Recompute(place="plain")),
    ],
)
def test_what_the_keys_mean(keys: dict[str, Any], expected: Recompute | None) -> None:
    found = recompute_of(TrainSection(**keys))
    if expected is not None and not expected.keeps:
        expected = dataclasses.replace(expected, keeps_windows=False)
    assert found == expected


def test_layer_types_and_windows_can_be_left_out() -> None:
    model = build("gemma2").train()
    types = model.config.layer_types
    assert types == ["sliding_attention", "full_attention"]
    for how, kept in (
        (Recompute(keeps=("attention",)), 2),
        (Recompute(keeps=("attention",), keeps_windows=False), 1),
        (Recompute(keeps=("attention",), whole=("full_attention",)), 1),
    ):
        made = Replacements()
        assert apply_recompute(model, how, CPU, made).kept == kept
        made.undo()


def test_disk_cleans_up_after_a_run_that_was_killed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / ".activations" / "rank-1" / "old"
    left.mkdir(parents=True)
    train = TrainSection(gradient_checkpointing=True, activation_offloading="disk")
    models = []
    for rank in range(2):
        # Two processes of one run write beside each other.
        monkeypatch.setenv("RANK", str(rank))
        model, made = build("llama").train(), Replacements()
        spare_memory(model, train, KernelsSection(), CPU, made, output_dir=tmp_path)
        models.append((model, made))
    assert not left.exists()
    for model, _ in models:
        run(model)
    for _, made in models:
        made.undo()
    assert not (tmp_path / ".activations").exists()


def test_a_model_without_layers_is_told() -> None:
    class Odd(nn.Module):
        def gradient_checkpointing_enable(self, options: Any) -> None:
            raise ValueError("no")

    with pytest.raises(ModelError, match="no layers that can be computed again"):
        apply_recompute(Odd(), Recompute(), CPU, Replacements())  # type: ignore[arg-type]
