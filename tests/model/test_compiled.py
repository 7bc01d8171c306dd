"""Layers that are compiled: one compilation for all, with every way of recomputing; what cannot be compiled runs as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from axolotl.config.kernels import KernelsSection
from axolotl.config.train import TrainSection
from axolotl.errors import ModelError
from axolotl.model.replace import Replacements
from axolotl.model.sparing import spare_memory
from model.families import build
from model.test_patch import base_of, run
from model.test_recompute import near

KEYS: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
WAYS: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "selective_checkpointing": True},
    {"gradient_checkpointing": True, "activation_offloading": "hidden_states"},
]


def compiled(model: Any, **keys: Any) -> Replacements:
    made = Replacements()
    train = TrainSection(**KEYS | keys)
    spare_memory(base_of(model), train, KernelsSection(), torch.device("cpu"), made)
    return made


@pytest.fixture(autouse=True)
def _clean():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_the_layers_are_compiled_once_and_compute_the_same(lora: bool) -> None:
    expected = run(build("llama", lora=lora).train())
    for keys in WAYS:
        model = build("llama", lora=lora).train()
        counters.clear()
        made = compiled(model, **keys)
        near(run(model), expected)
        graphs = counters["stats"]["unique_graphs"]
        # With LoRA the first layer's input has no gradient. Kept attention is left out of the compilation.
        assert graphs in ((2, 3, 4) if lora or "selective_checkpointing" in keys else (1,)), keys
        near(run(model), expected)
        assert counters["stats"]["unique_graphs"] == graphs
        made.undo()
        assert run(model)[0] == expected[0]


def test_what_fails_to_compile_runs_as_it_is(capsys: Any) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    torch._dynamo.register_backend(broken, "broken")
    expected = run(build("llama").train())
    for keys in ({}, {"gradient_checkpointing": True}):
        model = build("llama").train()
        train = TrainSection(torch_compile=True, **keys).model_copy(
            update={"torch_compile_backend": "broken"}
        )
        made = Replacements()
        spare_memory(model, train, KernelsSection(), torch.device("cpu"), made)
        assert run(model)[0] == expected[0]
        said = capsys.readouterr()
        assert (said.out + said.err).count("torch.compile failed") == 1
        made.undo()
    model = build("llama").train()
    spare_memory(model, train, KernelsSection(), torch.device("cpu"), Replacements(), strict=True)
    with pytest.raises(ModelError, match=r"torch\.compile failed"):
        run(model)
