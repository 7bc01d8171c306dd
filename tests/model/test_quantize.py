"""The bitsandbytes configuration that the keys describe, and models that come quantised."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from axolotl.config.adapter import AdapterSection
from axolotl.config.model import ModelSection
from axolotl.errors import EnvironmentProblem, ModelError
from axolotl.model import quantize
from axolotl.model.quantize import check_prequantized, quantization_config, scheme_of, wants_quantized_load

LORA, QLORA, FULL = AdapterSection(adapter="lora"), AdapterSection(adapter="qlora"), AdapterSection()


def section(**keys: Any) -> ModelSection:
    return ModelSection.model_validate({"base_model": "x", **keys})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "require_extra", lambda *_: SimpleNamespace())


@pytest.mark.parametrize(
    ("keys", "adapter", "bits"),
    [
        ({}, LORA, 0),
        ({}, QLORA, 4),
        ({"load_in_4bit": True}, LORA, 4),
        ({"load_in_8bit": True}, LORA, 8),
        ({}, FULL, 0),
    ],
)
def test_bits(keys: dict[str, Any], adapter: AdapterSection, bits: int) -> None:
    assert wants_quantized_load(section(**keys), adapter) == bits


def test_four_bits_are_nf4_with_double_quantisation(installed: None) -> None:
    config = quantization_config(section(load_in_4bit=True), QLORA, torch.bfloat16)
    assert config is not None
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (
        True,
        "nf4",
        True,
    )
    assert config.bnb_4bit_compute_dtype == config.bnb_4bit_quant_storage == torch.bfloat16


def test_own_arguments_win_and_unknown_ones_are_told(installed: None) -> None:
    keys = {
        "load_in_4bit": True,
        "bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4", "llm_int8_threshold": 3.0},
    }
    config = quantization_config(section(**keys), QLORA, torch.bfloat16)
    assert config is not None
    assert (config.bnb_4bit_quant_type, config.llm_int8_threshold) == ("fp4", 3.0)
    with pytest.raises(ModelError, match=r"`bnb_config_kwargs.bnb_4bit_quant_typ`"):
        quantization_config(
            section(load_in_4bit=True, bnb_config_kwargs={"bnb_4bit_quant_typ": "fp4"}), QLORA, torch.bfloat16
        )
    with pytest.raises(ModelError, match="is refused"):
        quantization_config(
            section(load_in_8bit=True, bnb_config_kwargs={"llm_int8_threshold": "x"}), LORA, torch.bfloat16
        )


def test_eight_bits_and_none(installed: None) -> None:
    config = quantization_config(section(load_in_8bit=True), LORA, torch.float16)
    assert config is not None
    assert config.load_in_8bit
    assert quantization_config(section(), LORA, torch.float16) is None


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentProblem, match="needs the package `bitsandbytes`") as told:
        quantization_config(section(load_in_4bit=True), QLORA, torch.bfloat16)
    assert "axolotl[bitsandbytes]" in told.value.problems[0].remedy


def test_models_that_come_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, gptq = LlamaConfig(), LlamaConfig()
    gptq.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert (scheme_of(plain), scheme_of(gptq)) == (None, "gptq")
    check_prequantized(plain, "x", FULL, "cpu", training=True)
    with pytest.raises(ModelError, match="cannot be trained themselves"):
        check_prequantized(gptq, "x", FULL, "cuda", training=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentProblem, match="needs the package `gptqmodel`"):
        check_prequantized(gptq, "x", LORA, "cuda", training=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    with pytest.raises(EnvironmentProblem, match="need a GPU"):
        check_prequantized(gptq, "x", LORA, "cpu", training=True)
    check_prequantized(gptq, "x", LORA, "cuda", training=True)
