"""Which decoder layers have halves that can be one pass, found by what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, SeedOssConfig

from axolotl.model.decoder_layers import is_pre_norm
from axolotl.model.shapes import mlp_of
from model.families import SIZES


def layer_of(config: Any) -> Any:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.eval().model.layers[0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_in_the_models_own_code_keeps_a_layer_as_it_is(dropout):
    layer = layer_of(SeedOssConfig(**SIZES, head_dim=8, residual_dropout=dropout))
    before = torch.get_rng_state()
    # A model that was just loaded evaluates, and its dropout does not show.
    assert is_pre_norm(layer) is (dropout == 0)
    assert (mlp_of(layer.mlp) is None) is (dropout > 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(m.training for m in layer.modules())
    assert layer.self_attn.config._attn_implementation == "sdpa"


def doubled_input(forward: Callable[..., Any], hidden_states: torch.Tensor, **kwargs: Any) -> Any:
    return forward(hidden_states=hidden_states * 2, **kwargs)


def doubled_result(forward: Callable[..., Any], hidden_states: torch.Tensor, **kwargs: Any) -> Any:
    out, *others = forward(hidden_states=hidden_states, **kwargs)
    return out * 2, *others


def failing(forward: Callable[..., Any], hidden_states: torch.Tensor, **kwargs: Any) -> Any:
    raise ValueError("it wants something else")


@pytest.mark.parametrize("change", [None, doubled_input, doubled_result, failing])
def test_an_attention_that_does_more_keeps_the_layer_as_it_is(change):
    layer = layer_of(LlamaConfig(**SIZES))
    kind = type(layer.self_attn)

    class Attention(kind):  # type: ignore[misc,valid-type]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            plain = super().forward
            return (
                plain(hidden_states, **kwargs) if change is None else change(plain, hidden_states, **kwargs)
            )

    layer.self_attn.__class__ = Attention
    assert is_pre_norm(layer) is (change is None)
    assert all("forward" not in m.__dict__ for m in layer.modules())
