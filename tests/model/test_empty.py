"""Models without weights: whose random start can be drawn part by part."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from axolotl.model.empty import build_empty, starts_plainly
from model.families import CONFIGS


@pytest.mark.parametrize("family", CONFIGS)
def test_only_norms_that_begin_with_one_are_drawn(family):
    model = build_empty(AutoModelForCausalLM, CONFIGS[family], torch.float32, "eager")
    assert all(p.is_meta for p in model.parameters())
    begin = AutoModelForCausalLM.from_config(CONFIGS[family]).named_parameters()
    ones = all(bool((p == 1).all()) for name, p in begin if "norm" in name and name.endswith("weight"))
    assert starts_plainly(model) is ones
