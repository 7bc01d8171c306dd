"""Adapters: every key reaches PEFT, wrong targets are told, trained adapters come back exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from axolotl.config.adapter import AdapterSection
from axolotl.config.model import ModelSection
from axolotl.errors import ModelError
from axolotl.model.adapter import add_adapter, load_adapter
from axolotl.model.load import load_model
from axolotl.model.targets import linear_names
from axolotl.model.tokenizer import load_tokenizer, new_token_ids

FIXTURES = Path(__file__).parents[1] / "fixtures"
LLAMA, CHATML = str(FIXTURES / "tiny-llama3"), str(FIXTURES / "tiny-chatml")
CPU: Any = SimpleNamespace(device="cpu", bf16=False, tf32=False, cpus=1)
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
IDS = torch.arange(40, 72).view(2, 16)


def lora(**keys: Any) -> AdapterSection:
    base = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8}
    if not {"lora_target_modules", "lora_target_parameters"} & set(keys):
        base["lora_target_linear"] = True
    return AdapterSection.model_validate(base | keys)


def base(name: str = LLAMA, adapter: AdapterSection | None = None, **keys: Any) -> Any:
    section = ModelSection.model_validate({"base_model": name, **keys})
    return load_model(section, adapter or lora(), load_tokenizer(section), CPU, training=True)


def adapted(
    name: str = LLAMA, seed: int = 3, tokens: Any = (), model_keys: dict[str, Any] | None = None, **keys: Any
) -> PeftModel:
    return add_adapter(base(name, **(model_keys or {})), lora(**keys), new_tokens=tokens, seed=seed)


def disturb(model: PeftModel, seed: int = 0) -> PeftModel:
    """Moves every trainable weight away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model.eval()


def trained_names(model: PeftModel) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_linear_layers_without_the_head() -> None:
    model = base()
    assert linear_names(model) == LINEAR
    peft_model = add_adapter(model, lora())
    assert sorted(peft_model.peft_config["default"].target_modules) == LINEAR
    assert all("lora_" in n for n in trained_names(peft_model))
    assert len(trained_names(peft_model)) == 2 * 7 * 4


def test_the_seed_makes_the_start_repeatable() -> None:
    first, second, other = (adapted(seed=s).state_dict() for s in (3, 3, 4))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize(
    ("keys", "field", "value"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout", 0.1),
        ({"peft_use_dora": True}, "use_dora", True),
        ({"peft_use_rslora": True}, "use_rslora", True),
        ({"lora_rank_pattern": {"q_proj": 2}}, "rank_pattern", {"q_proj": 2}),
        ({"lora_alpha_pattern": {"q_proj": 2}}, "alpha_pattern", {"q_proj": 2}),
        ({"peft_layers_to_transform": [1, 2]}, "layers_to_transform", [1, 2]),
        ({"lora_modules_to_save": ["lm_head"]}, "modules_to_save", ["lm_head"]),
        ({"lora_exclude_modules": ["v_proj"]}, "exclude_modules", {"v_proj"}),
        ({"peft_init_lora_weights": "gaussian"}, "init_lora_weights", "gaussian"),
        ({"peft_init_lora_weights": False}, "init_lora_weights", False),
        ({"peft_trainable_token_indices": [5]}, "trainable_token_indices", [5]),
        (
            {"lora_target_modules": r".*\.layers\.[01]\.self_attn\.[qv]_proj"},
            "target_modules",
            r".*\.layers\.[01]\.self_attn\.[qv]_proj",
        ),
        ({"lora_target_modules": "all-linear"}, "target_modules", set(LINEAR)),
    ],
)
def test_keys_reach_peft(keys: dict[str, Any], field: str, value: Any) -> None:
    model = adapted(**keys)
    assert getattr(model.peft_config["default"], field) == value
    if field == "layers_to_transform":
        assert {n.split(".layers.")[1][0] for n in trained_names(model)} == {"1", "2"}
    if field == "target_modules" and isinstance(value, str):
        assert len(trained_names(model)) == 2 * 2 * 2


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_other_starts_keep_the_function(init: str) -> None:
    plain = base()(IDS).logits
    model = adapted(peft_init_lora_weights=init).eval()
    assert torch.allclose(model(IDS).logits, plain, atol=2e-4)


@pytest.mark.parametrize("kind", ["vera", "loha", "lokr", "oft", "hra"])
def test_other_kinds_through_the_generic_path(kind: str) -> None:
    section = AdapterSection.model_validate(
        {"adapter": kind, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "o_proj"]}
    )
    model = add_adapter(base(), section, seed=1)
    assert trained_names(model)
    model(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("given", [[5, 999_999], {"embed_tokens": [999_999]}])
def test_tokens_that_the_embedding_has_no_row_for_are_told(given: Any) -> None:
    with pytest.raises(ModelError, match="999999"):
        add_adapter(base(), lora(peft_trainable_token_indices=given))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lora_target_modules": ["q_prj", "v_proj"]}, "`lora_target_modules: q_prj` matches no layer"),
        ({"lora_target_modules": "layers.9.*"}, "`lora_target_modules: layers.9.*` matches no layer"),
        ({"lora_target_modules": "q_(proj"}, "is not a regular expression"),
        ({"lora_target_linear": False}, "has no layers to work on"),
        ({"lora_modules_to_save": ["head"]}, "`lora_modules_to_save: head` matches no layer"),
        ({"lora_target_parameters": ["nope"]}, "`lora_target_parameters: nope` matches no weight"),
        ({"lora_exclude_modules": ["q_prj"]}, "`lora_exclude_modules: q_prj` matches no layer"),
        ({"lora_exclude_modules": "q_proj"}, "`lora_exclude_modules: q_proj` matches no layer"),
        ({"lora_rank_pattern": {"q_prj": 8}}, "`lora_rank_pattern: q_prj` matches no layer"),
        ({"lora_alpha_pattern": {"^model.q$": 8}}, "`lora_alpha_pattern: ^model.q$` matches no layer"),
        ({"lora_r": None}, "needs `lora_r`"),
        ({"adapter": "lorra"}, "is no adapter of PEFT"),
        ({"adapter": "vera", "peft_use_dora": True}, "`peft_use_dora` means nothing to `adapter: vera`"),
    ],
)
def test_what_cannot_work_is_told(keys: dict[str, Any], words: str) -> None:
    section = lora(**{k: v for k, v in keys.items() if v is not None})
    if keys.get("lora_r", 0) is None:
        section = section.model_copy(update={"lora_r": None})
    if keys.get("lora_target_linear") is False:
        section = section.model_copy(update={"lora_target_linear": False})
    with pytest.raises(ModelError) as told:
        add_adapter(base(), section)
    assert words in str(told.value)
    if "matches no layer" in words and "target" in words:
        assert "q_proj" in told.value.problems[0].remedy


@pytest.mark.parametrize("name", [LLAMA, CHATML])
def test_new_tokens_train_only_their_rows_and_save_small(name: str, tmp_path: Path) -> None:
    section = ModelSection.model_validate({"base_model": name, "tokens": ["<a>", "<b>"]})
    tokenizer = load_tokenizer(section)
    model = add_adapter(
        load_model(section, lora(), tokenizer, CPU, training=True),
        lora(),
        new_tokens=new_token_ids(tokenizer),
        seed=1,
    )
    rows = [n for n in trained_names(model) if "trainable_tokens" in n]
    assert len(rows) == (2 if name == LLAMA else 1)
    disturb(model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert max(v.shape[0] for v in saved.values()) < 1000
    # plain transformers and PEFT give the same answers
    plain = AutoModelForCausalLM.from_pretrained(name)
    plain.resize_token_embeddings(len(tokenizer))
    reloaded = PeftModel.from_pretrained(plain, tmp_path).eval()
    ids = torch.tensor([[1, 4096, 7, 4097]])
    assert torch.allclose(reloaded(ids).logits, model(ids).logits, atol=1e-5)
    # and so does our own loading, which finds the vocabulary by itself
    ours = load_adapter(AutoModelForCausalLM.from_pretrained(name), tmp_path)
    assert torch.equal(ours(ids).logits, model(ids).logits)


def test_a_new_pad_token_costs_no_file(tmp_path: Path) -> None:
    model = adapted(model_keys={"special_tokens": {"pad_token": "<p>"}})
    assert model.peft_config["default"].trainable_token_indices is None
    disturb(model).save_pretrained(tmp_path)
    assert not any("embed" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_new_tokens_leave_embeddings_alone_that_are_trained_anyway() -> None:
    model = adapted(
        model_keys={"tokens": ["<a>"]}, tokens=[4096], lora_modules_to_save=["embed_tokens", "lm_head"]
    )
    assert model.peft_config["default"].trainable_token_indices is None
    assert sum("modules_to_save" in n for n in trained_names(model)) == 2


def test_bf16_adapters_are_trained_in_float32() -> None:
    model = adapted(model_keys={"bf16": True}, lora_modules_to_save=["embed_tokens", "lm_head"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    logits = model(IDS).logits
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    kept = adapted(model_keys={"bf16": True}, peft_autocast_adapter_dtype=False)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}


@pytest.fixture
def trained(tmp_path: Path) -> tuple[PeftModel, Path]:
    model = disturb(adapted())
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_a_saved_adapter_comes_back_exactly(trained: tuple[PeftModel, Path]) -> None:
    model, folder = trained
    again = load_adapter(base(), folder)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert trained_names(again) == set()
    continued = add_adapter(base(), lora(lora_r=16), resume_from=folder)
    assert torch.equal(continued.eval()(IDS).logits, model(IDS).logits)
    assert len(trained_names(continued)) == 2 * 7 * 4


def edit(folder: Path, **keys: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_a_config_from_a_newer_peft(
    trained: tuple[PeftModel, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = trained
    edit(folder, lora_of_tomorrow=True, nothing_new=None)
    assert torch.equal(load_adapter(base(), folder)(IDS).logits, model(IDS).logits)
    assert "`lora_of_tomorrow`" in capsys.readouterr().err
    edit(folder, peft_type="SUPERLORA")
    with pytest.raises(ModelError, match="kind `SUPERLORA`"):
        load_adapter(base(), folder)


def test_an_adapter_of_another_base(trained: tuple[PeftModel, Path]) -> None:
    _, folder = trained
    wide = base(reinit_weights=True, overrides_of_model_config={"intermediate_size": 256})
    with pytest.raises(
        ModelError, match=r"another base model: `model.layers.0.mlp.down_proj` has 256 inputs here, 384"
    ):
        load_adapter(wide, folder)
    flat = base(reinit_weights=True, overrides_of_model_config={"num_hidden_layers": 2})
    with pytest.raises(
        ModelError, match=r"weights for 14 layers that this one lacks, such as `model.layers.2"
    ):
        load_adapter(flat, folder)


def test_an_adapter_with_another_vocabulary(tmp_path: Path) -> None:
    model = adapted(lora_modules_to_save=["lm_head", "embed_tokens"])
    model.save_pretrained(tmp_path)
    bigger = base(reinit_weights=True, overrides_of_model_config={"vocab_size": 5000})
    with pytest.raises(ModelError, match="its vocabulary has 4,096 rows, this model's 5,000"):
        load_adapter(bigger, tmp_path)


def test_missing_and_damaged_weights(trained: tuple[PeftModel, Path]) -> None:
    _, folder = trained
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if "layers.1.mlp" not in k}, file)
    with pytest.raises(ModelError, match=r"lacks 6 of its weights, such as `.*layers.1.mlp"):
        load_adapter(base(), folder)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_adapter(base(), folder)
    file.unlink()
    with pytest.raises(ModelError, match=r"has no `adapter_model.safetensors`"):
        load_adapter(base(), folder)
    with pytest.raises(ModelError, match="holds a whole model"):
        load_adapter(base(), LLAMA)


def test_pickles_are_refused_unless_allowed(trained: tuple[PeftModel, Path]) -> None:
    model, folder = trained
    weights = load_file(folder / "adapter_model.safetensors")
    torch.save(weights, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="only as a pickle file"):
        load_adapter(base(), folder)
    assert torch.equal(load_adapter(base(), folder, allow_pickle=True)(IDS).logits, model(IDS).logits)
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match="holds no adapter"):
        load_adapter(base(), folder)
