"""Quantised bases for real: bitsandbytes on the CPU, and models that come in fp8 or mxfp4."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig, GptOssForCausalLM

from axolotl.config.adapter import AdapterSection
from axolotl.config.model import ModelSection
from axolotl.errors import ModelError
from axolotl.model.adapter import add_adapter, load_adapter
from axolotl.model.load import load_model
from axolotl.model.tokenizer import load_tokenizer
from axolotl.weights.merge import merge

FIXTURES = Path(__file__).parents[1] / "fixtures"
LLAMA = FIXTURES / "tiny-llama3"
CPU: Any = SimpleNamespace(device="cpu", bf16=False, tf32=False, cpus=1)
IDS = torch.arange(40, 104).view(4, 16)


def keys(**more: Any) -> AdapterSection:
    base = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8}
    if "lora_target_modules" not in more:
        base["lora_target_linear"] = True
    return AdapterSection.model_validate(base | more)


def section(base: Path, **more: Any) -> ModelSection:
    return ModelSection.model_validate({"base_model": str(base), **more})


def trained(model: ModelSection, adapter: AdapterSection, steps: int = 5) -> tuple[Any, list[float]]:
    """The model after a few steps, with an evaluation after the first, as a run does; and its losses."""
    tokenizer = load_tokenizer(model)
    base = load_model(model, adapter, tokenizer, CPU, training=True)
    peft_model = add_adapter(base, adapter, seed=1)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        loss = peft_model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        if step == 0:
            with torch.no_grad():
                peft_model.eval()(input_ids=IDS)
    return peft_model, losses


@pytest.mark.extras
@pytest.mark.parametrize(
    ("load", "adapter"),
    [
        ({"load_in_4bit": True}, {"adapter": "qlora"}),
        ({"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}}, {}),
        ({"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}}, {}),
        ({"load_in_4bit": True, "bf16": True}, {"adapter": "qlora"}),
        ({"load_in_4bit": True}, {"peft_use_dora": True}),
        ({"load_in_8bit": True}, {}),
    ],
    ids=["nf4 double", "nf4", "fp4", "nf4 bf16", "dora", "int8"],
)
def test_lora_learns_on_quantised_weights_and_merges(
    load: dict[str, Any], adapter: dict[str, Any], tmp_path: Path
) -> None:
    model, chosen = section(LLAMA, **load), keys(**adapter)
    peft_model, losses = trained(model, chosen)
    kinds = {type(m).__name__ for m in peft_model.modules()}
    assert kinds & ({"Linear8bitLt"} if "load_in_8bit" in load else {"Linear4bit"})
    assert losses[-1] < losses[0] - 0.3
    peft_model.save_pretrained(tmp_path / "adapter")
    report = merge(model, chosen, tmp_path / "adapter", tmp_path / "merged", verify="logits")
    pairs = {c.pair.split(" ")[0]: c for c in report.checks}  # type: ignore[union-attr]
    assert pairs["full"].passed and pairs["full"].binding
    if "load_in_4bit" in load:
        assert not pairs["quantised"].binding
        assert pairs["quantised"].max_difference > 1e-3
    # what is served is the base in full precision with this adapter
    plain = load_adapter(
        AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32), tmp_path / "adapter"
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(plain(IDS).logits, ours(IDS).logits, atol=1e-4)


@pytest.mark.extras
@pytest.mark.parametrize("load", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4 bits", "8 bits"])
def test_random_weights_are_packed_as_loaded_ones(load: dict[str, Any], tmp_path: Path) -> None:
    chosen, tokenizer = keys(), load_tokenizer(section(LLAMA))
    whole = load_model(section(LLAMA, reinit_weights=True), chosen, tokenizer, CPU, training=True, seed=3)
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(section(tmp_path, **load), chosen, tokenizer, CPU, training=True, seed=3)
    made = load_model(
        section(LLAMA, reinit_weights=True, **load), chosen, tokenizer, CPU, training=True, seed=3
    )
    assert [type(m) for m in made.modules()] == [type(m) for m in loaded.modules()]
    for (name, ours), theirs in zip(made.named_parameters(), loaded.parameters(), strict=True):
        assert ours.dtype == theirs.dtype, name
        # As bytes: packed numbers that are held as floats may be no number.
        assert torch.equal(ours.detach().view(torch.uint8), theirs.detach().view(torch.uint8)), name
    assert torch.equal(made(IDS).logits, loaded(IDS).logits)
    assert made.config.quantization_config.to_dict() == loaded.config.quantization_config.to_dict()
    assert made.is_quantized and add_adapter(made, chosen, seed=1)


@pytest.mark.extras
def test_merging_into_what_the_quantised_weights_stood_for(tmp_path: Path) -> None:
    model, chosen = section(LLAMA, load_in_4bit=True, bf16=False), keys(adapter="qlora")
    peft_model, _ = trained(model, chosen)
    peft_model.save_pretrained(tmp_path / "adapter")
    report = merge(
        model, chosen, tmp_path / "adapter", tmp_path / "merged", base="quantized", verify="logits"
    )
    pairs = {c.pair.split(" ")[0]: c for c in report.checks}  # type: ignore[union-attr]
    assert pairs["quantised"].binding and pairs["quantised"].passed
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(peft_model.eval()(IDS).logits, ours(IDS).logits, atol=1e-3)


@pytest.mark.extras
def test_an_evaluation_does_not_change_the_gradient() -> None:
    """bitsandbytes packs 4-bit weights for inference on some CPUs, after which nothing below gets a gradient."""
    model, chosen = section(LLAMA, load_in_4bit=True), keys(adapter="qlora")
    peft_model = add_adapter(
        load_model(model, chosen, load_tokenizer(model), CPU, training=True), chosen, seed=1
    )
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))

    def gradients() -> list[torch.Tensor]:
        peft_model.zero_grad()
        peft_model.train()(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in peft_model.parameters() if p.requires_grad]

    before = gradients()
    with torch.no_grad():
        peft_model.eval()(input_ids=IDS)
    after = gradients()
    assert all(float(g.abs().max()) > 0 for g in before)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, after, strict=True))


def fp8_copy(folder: Path, block: int = 32) -> Path:
    """The tiny Llama with its layers in 8-bit floats and a scale for each block, as published fp8 models are."""
    shutil.copytree(LLAMA, folder)
    weights: dict[str, torch.Tensor] = {}
    for name, value in load_file(LLAMA / "model.safetensors").items():
        if "_proj" not in name:
            weights[name] = value
            continue
        rows, columns = value.shape
        blocks = value.reshape(rows // block, block, columns // block, block)
        scale = blocks.abs().amax((1, 3)) / 448
        weights[name] = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    say_scheme(folder, quant_method="fp8", weight_block_size=[block, block], activation_scheme="dynamic")
    return folder


def say_scheme(folder: Path, **scheme: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))


def mxfp4_model(folder: Path) -> Path:
    """A tiny gpt-oss whose experts are packed in 4-bit floats."""
    config = GptOssConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        sliding_window=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(0)
    GptOssForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(folder)
    weights: dict[str, torch.Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if "experts" in name and value.dim() == 3:
            experts, inner, outer = value.shape
            weights[f"{name}_blocks"] = torch.randint(0, 256, (experts, outer, inner // 32, 16)).to(
                torch.uint8
            )
            weights[f"{name}_scales"] = torch.full((experts, outer, inner // 32), 120, dtype=torch.uint8)
        else:
            weights[name] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    say_scheme(folder, quant_method="mxfp4", modules_to_not_convert=["model.embed_tokens", "lm_head"])
    return folder


@pytest.mark.parametrize("scheme", ["fp8", "mxfp4"])
def test_models_that_come_in_small_floats_are_trained_unpacked_and_merged(
    scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = (fp8_copy if scheme == "fp8" else mxfp4_model)(tmp_path / "base")
    said = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}[scheme]
    model = section(base, model_quantization_config=said)
    chosen = keys() if scheme == "fp8" else keys(lora_target_modules=["q_proj", "o_proj"])
    peft_model, losses = trained(model, chosen)
    assert losses[-1] < losses[0]
    assert "unpacked" in capsys.readouterr().err
    peft_model.save_pretrained(tmp_path / "adapter")
    report = merge(model, chosen, tmp_path / "adapter", tmp_path / "merged", verify="logits")
    assert report.checks[0].passed
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert float((peft_model.eval()(IDS).logits - ours(IDS).logits).abs().max()) < 2e-2


def test_what_the_keys_say_and_the_files_hold(tmp_path: Path) -> None:
    base = fp8_copy(tmp_path / "base")
    tokenizer = load_tokenizer(section(base))
    for model, adapter, words in (
        (section(LLAMA, gptq=True), keys(), "`gptq` says .* holds gptq weights, but it holds plain ones"),
        (
            section(base, model_quantization_config="Mxfp4Config"),
            keys(),
            "holds mxfp4 weights, but it holds fp8",
        ),
        (section(base, load_in_4bit=True), keys(adapter="qlora"), "cannot be quantised again"),
        (section(base), AdapterSection(), "cannot be trained themselves"),
        (
            section(
                base,
                model_quantization_config="FineGrainedFP8Config",
                model_quantization_config_kwargs={"blocks": 3},
            ),
            keys(),
            "`model_quantization_config_kwargs.blocks` is not known",
        ),
    ):
        with pytest.raises(ModelError, match=words):
            load_model(model, adapter, tokenizer, CPU, training=True)
