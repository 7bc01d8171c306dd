"""Recomputation asked for by its keys, through the real trainer: the same losses and weights, packed or not."""

from __future__ import annotations

from typing import Any

import pytest

from train.miniature import losses, rows, same_weights, tiny_model, weights

WAYS: dict[str, dict[str, Any]] = {
    "all": {"gradient_checkpointing": True},
    "one": {"gradient_checkpointing": 1},
    "selective": {"gradient_checkpointing": "selective"},
    "offload": {"gradient_checkpointing": "offload"},
    "hidden states": {"gradient_checkpointing": True, "activation_offloading": "hidden_states"},
    "legacy": {"gradient_checkpointing": True, "activation_offloading": "legacy"},
    "disk": {"gradient_checkpointing": True, "activation_offloading": "disk"},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_way_trains_the_same_bits(trainer: Any, lora: bool, packed: bool) -> None:
    compare(trainer, lora, packed, list(WAYS))


def test_some_ways_train_the_same_bits(trainer: Any) -> None:
    compare(trainer, True, True, ["selective", "offload"])


def compare(trainer: Any, lora: bool, packed: bool, ways: list[str]) -> None:
    shared = {"sample_packing": packed, "gradient_accumulation_steps": 2, "max_steps": 2, "bf16": True}

    def course(**keys: Any) -> tuple[list[float], Any]:
        model = tiny_model(lora=lora, dropout=0.1 if lora else 0.0)
        run = trainer(model, rows(24), **shared, **keys)
        words = run.parts.run["recompute"]
        assert bool(words) is bool(keys)
        run.train()
        return losses(run), weights(model)

    expected = course()
    for name in ways:
        keys = WAYS[name]
        if name == "reentrant" and lora:
            # PyTorch's reentrant checkpoints restore the generator, but draw for inputs in another order.
            continue
        found = course(**keys)
        assert found[0] == expected[0], name
        assert same_weights(found[1], expected[1]), name


def test_tiles_through_the_trainer(trainer: Any) -> None:
    found = []
    for keys in ({}, {"tiled_mlp": True, "tiled_mlp_num_shards": 3}):
        run = trainer(tiny_model(), rows(12), max_steps=3, micro_batch_size=4, **keys)
        assert run.parts.replaced.counts["tiled feed-forward layer"] == (2 if keys else 0)
        run.train()
        found.append(losses(run))
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_evaluating_and_saving_know_nothing_of_it(trainer: Any, tmp_path: Any) -> None:
    model = tiny_model(lora=True)
    run = trainer(model, rows(12), rows(5, seed=3), max_steps=2, gradient_checkpointing="offload")
    plain = trainer(tiny_model(lora=True), rows(12), rows(5, seed=3), max_steps=2)
    assert run.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    run.train()
    run.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_compiled_layers_train_packed_rows(trainer: Any) -> None:
    """With kernels and recomputation, evaluated too."""
    found = []
    for keys in (
        {},
        {
            "torch_compile": True,
            "torch_compile_backend": "aot_eager",
            "gradient_checkpointing": True,
            "liger_rms_norm": True,
        },
    ):
        run = trainer(
            tiny_model(),
            rows(24),
            rows(8, seed=2),
            sample_packing=True,
            cut_cross_entropy=True,
            max_steps=4,
            **keys,
        )
        assert run.parts.replaced.counts["compiled layer"] == (2 if keys else 0)
        run.train()
        found.append([*losses(run), run.evaluate()["eval_loss"]])
    assert found[1] == pytest.approx(found[0], abs=1e-4)
