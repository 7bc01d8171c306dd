"""Kernels in whole models: the same loss and gradients, in the modules they fit, in no other model, and undone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from axolotl.config.kernels import KernelsSection
from axolotl.errors import ModelError
from axolotl.kernels.triton_language import installed
from axolotl.model import patch
from axolotl.model.patch import Bench, apply_kernels
from kernels.comparing import error
from model.families import CONFIGS, SIZES, batch, build

LOSS = {"cut_cross_entropy": True}
LORA = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True}
LIGER = {"liger_rms_norm": True, "liger_rope": True, "liger_glu_activation": True}


def base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def bench(model: Any, **keys: Any) -> Bench:
    given = {k: keys.pop(k) for k in ("plain_lora", "strict") if k in keys}
    return Bench(base_of(model), KernelsSection(**keys), torch.device("cpu"), torch.float32, 64, **given)


def run(model: Any, **more: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and the gradients of everything that is trained."""
    model.zero_grad()
    loss = model(**batch(), num_items_in_batch=torch.tensor(9.0), use_cache=False, **more).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(
    found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.allclose(found[1][name], gradient, atol=2e-5, rtol=1e-3), name


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("lora", [False, True])
def test_the_fused_loss_is_the_models_own(family, lora):
    plain, ours = build(family, lora=lora), build(family, lora=lora)
    made = apply_kernels(bench(ours, **LOSS))
    assert made.counts["fused loss"] == 1
    assert_same(run(ours), run(plain))
    # Without labels there are logits.
    ids = batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)
        assert ours(**batch()).logits is None


@pytest.mark.parametrize("family", [f for f in CONFIGS if f not in ("phi", "cohere")])
def test_lora_kernels_compute_what_peft_computes(family):
    plain, ours = build(family, lora=True), build(family, lora=True)
    made = apply_kernels(bench(ours, **LORA))
    assert made.counts["LoRA feed-forward layer"] == made.counts["LoRA output projection"] == 2
    assert made.counts["LoRA query, key and value"] == (0 if family == "phi3" else 2)
    assert made.counts["LoRA decoder layer"] == (0 if family in ("phi3", "gemma2") else 2)
    assert_same(run(ours), run(plain))


@pytest.mark.extras
@pytest.mark.parametrize("family", CONFIGS)
def test_all_kernels_together_in_the_interpreter(kernels_run, family):
    plain, ours = build(family, lora=True), build(family, lora=True)
    made = apply_kernels(bench(ours, strict=True, **LORA, **LIGER, **LOSS))
    norms = {"qwen3": 9, "gemma2": 9, "phi": 0, "cohere": 0}.get(family, 5)
    assert made.counts["RMS norm"] == norms
    assert made.counts["rotary embedding"] == (0 if family == "cohere" else 2)
    assert made.counts["fused loss"] == 1
    assert_same(run(ours), run(plain))


@pytest.mark.extras
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_gated_activation_and_trained_norms(kernels_run, family):
    plain, ours = build(family), build(family)
    made = apply_kernels(bench(ours, strict=True, **LIGER))
    assert made.counts["gated activation"] == 2
    assert_same(run(ours), run(plain))


def test_without_a_gpu_the_plain_path_is_taken_and_told(capsys):
    if installed():
        return
    plain, ours = build("llama"), build("llama")
    assert not apply_kernels(bench(ours, **LIGER)).counts
    assert_same(run(ours), run(plain))
    assert "no GPU" in capsys.readouterr().err


def test_another_model_in_the_process_is_not_touched():
    ours, other, plain = (build("llama", lora=True) for _ in range(3))
    apply_kernels(bench(ours, **LORA, **LOSS))
    for module in other.modules():
        assert "forward" not in module.__dict__
    assert_same(run(other), run(plain))
    assert run(other)[0] and other(**batch()).logits is not None


def test_undone_the_model_is_what_it_was():
    ours, plain = build("llama", lora=True), build("llama", lora=True)
    before = {n: t.clone() for n, t in ours.state_dict().items()}
    made = apply_kernels(bench(ours, **LORA, **LOSS))
    patched = ours.state_dict()
    assert list(patched) == list(before)
    assert all(torch.equal(patched[n], t) for n, t in before.items())
    made.undo()
    made.undo()
    assert not any("forward" in m.__dict__ for m in ours.modules())
    after = ours.state_dict()
    assert all(torch.equal(after[n], t) and after[n].is_contiguous() for n, t in before.items())
    assert_same(run(ours), run(plain))


def test_what_is_saved_is_the_same(tmp_path):
    ours, plain = build("llama", lora=True), build("llama", lora=True)
    made = apply_kernels(bench(ours, **LORA, **LOSS))
    for name, model in (("ours", ours), ("plain", plain)):
        model.save_pretrained(tmp_path / name)
    made.undo()
    for name, model in (("ours", ours), ("plain", plain)):
        base_of(model).save_pretrained(tmp_path / f"{name}-base")
    for folder in ("", "-base"):
        for file in (tmp_path / f"plain{folder}").glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / f"ours{folder}" / file.name).read_bytes()


def test_a_copy_of_a_patched_model_works_on_its_own_weights():
    ours = build("llama")
    apply_kernels(bench(ours, **LOSS))
    twin = copy.deepcopy(ours)
    expected = run(ours)
    for parameter in ours.parameters():
        parameter.data.zero_()
    assert_same(run(twin), expected)


def test_an_adapter_that_is_off_or_merged_or_not_alone():
    plain, ours = build("llama", lora=True), build("llama", lora=True)
    apply_kernels(bench(ours, **LORA))
    ids = batch()["input_ids"]
    with torch.no_grad(), ours.disable_adapter(), plain.disable_adapter():
        assert torch.allclose(ours(ids).logits, plain(ids).logits, atol=1e-5)
    for model in (ours, plain):
        model.merge_adapter()
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, plain(ids).logits, atol=1e-5)
    for model in (ours, plain):
        model.unmerge_adapter()
        model.load_state_dict({n: t * 1.1 for n, t in model.state_dict().items()})
    assert_same(run(ours), run(plain))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"lora_bias": True}, "bias"),
        ({"target_modules": ["q_proj", "gate_proj"]}, "not every layer"),
    ],
)
def test_what_does_not_fit_keeps_pefts_code_and_is_told(options, why, capsys):
    plain, ours = build("llama", lora=True, **options), build("llama", lora=True, **options)
    made = apply_kernels(bench(ours, lora_mlp_kernel=True, lora_qkv_kernel=True))
    assert not made.counts
    assert why in capsys.readouterr().err
    for model in (ours, plain):
        model.eval()
    assert_same(run(ours), run(plain))


def test_rules_of_the_run_keep_pefts_code(capsys):
    ours = build("llama", lora=True)
    assert not apply_kernels(bench(ours, plain_lora="the weights are sharded", **LORA)).counts
    assert "sharded" in capsys.readouterr().err


def test_checkpointing_through_the_kernels():
    plain, ours = build("llama", lora=True), build("llama", lora=True)
    for model in (plain, ours):
        base_of(model).gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    apply_kernels(bench(ours, **LORA, **LOSS))
    assert_same(run(ours), run(plain))


def test_a_head_that_is_trained_beside_the_adapter():
    plain, ours = (build("llama", lora=True, modules_to_save=["lm_head"]) for _ in range(2))
    assert apply_kernels(bench(ours, **LOSS)).counts["fused loss"] == 1
    found, expected = run(ours), run(plain)
    assert any("lm_head" in n for n in found[1])
    assert_same(found, expected)


def test_a_head_of_another_kind_keeps_whole_logits(capsys):
    ours = build("llama", lora=True, target_modules=["q_proj", "lm_head"])
    assert not apply_kernels(bench(ours, **LOSS)).counts
    assert "whole logits" in capsys.readouterr().err


def test_a_model_with_a_loss_of_its_own_is_found_out(capsys):
    class Odd(type(build("llama"))):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            if out.loss is not None:
                out.loss = out.loss + 1
            return out

    for strict in (False, True):
        model = build("llama")
        model.__class__ = Odd
        expected = run(model)
        if strict:
            with pytest.raises(ModelError, match="cross-entropy"):
                apply_kernels(bench(model, strict=True, **LOSS))
        else:
            assert not apply_kernels(bench(model, **LOSS)).counts
            assert "whole logits" in capsys.readouterr().err
        assert_same(run(model), expected)


@pytest.mark.extras
@pytest.mark.parametrize("fault", ["wrong", "broken"])
def test_a_kernel_that_cannot_be_trusted_is_left_out(kernels_run, monkeypatch, capsys, fault):
    def bad(x, weight, eps, **options):
        if fault == "broken":
            raise RuntimeError("no such instruction")
        return patch.plain_rms_norm(x, weight, eps, **options) * 1.01

    monkeypatch.setattr(patch, "rms_norm", bad)
    model = build("llama")
    assert not apply_kernels(bench(model, liger_rms_norm=True)).counts
    assert "left out" in capsys.readouterr().err
    with pytest.raises(ModelError, match="RMS norm"):
        apply_kernels(bench(build("llama"), liger_rms_norm=True, strict=True))


def test_eight_bit_weights_are_near_and_give_their_numbers_back():
    plain, ours = build("llama", lora=True), build("llama", lora=True)
    before = base_of(ours).model.layers[0].self_attn.q_proj.base_layer.weight.detach().clone()
    made = apply_kernels(bench(ours, lora_fp8_base=True, **LORA))
    assert made.counts["8-bit weights"] == 14
    held = base_of(ours).model.layers[0].self_attn.q_proj.base_layer.weight
    assert held.dtype is torch.float8_e4m3fn
    found, expected = run(ours), run(plain)
    assert found[0] == pytest.approx(expected[0], rel=0.05) and found[0] != expected[0]
    assert found[1].keys() == expected[1].keys()
    a, b = (torch.cat([g.flatten() for g in r[1].values()]) for r in (found, expected))
    assert torch.cosine_similarity(a, b, dim=0) > 0.95
    made.undo()
    assert torch.allclose(held, before, rtol=0.07, atol=1e-3) and held.dtype is torch.float32


def test_eight_bit_weights_without_the_other_kernels():
    ours = build("qwen2", lora=True)
    apply_kernels(bench(ours, lora_fp8_base=True))
    both = run(ours)
    again = build("qwen2", lora=True)
    made = apply_kernels(bench(again, lora_fp8_base=True, **LORA))
    assert made.counts["LoRA decoder layer"] == 2
    loss, gradients = run(again)
    assert loss == pytest.approx(both[0], rel=1e-5)
    # Layers that share an input also share the scales of their gradients' rows.
    assert all(error(gradients[name], gradient) < 0.06 for name, gradient in both[1].items())


@pytest.mark.extras
@pytest.mark.parametrize("nested", [False, True])
def test_lora_kernels_on_4_bit_weights(kernels_run, nested, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

    # bitsandbytes' CPU code reads the wrong scales where a row is shorter than a block of 64.
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    models = []
    for _ in range(2):
        held = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=held, device_map="cpu")
        torch.manual_seed(0)
        model = peft.get_peft_model(
            base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
        models.append(model.train())
    plain, ours = models
    made = apply_kernels(bench(ours, **LORA))
    assert made.counts["LoRA feed-forward layer"] == made.counts["LoRA query, key and value"] == 2
    assert_same(run(ours), run(plain))
