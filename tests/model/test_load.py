"""The base model is loaded in the right class, precision and size, and what cannot be loaded is told at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from axolotl.config.adapter import AdapterSection
from axolotl.config.model import ModelSection
from axolotl.errors import ModelError, Place
from axolotl.model.embeddings import mean_row
from axolotl.model.files import check_adapter_dir, check_base_model, read_header, read_weight_files
from axolotl.model.load import load_model, ready_to_serve, weight_dtype
from axolotl.model.tokenizer import load_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
LLAMA, CHATML = str(FIXTURES / "tiny-llama3"), str(FIXTURES / "tiny-chatml")
CPU: Any = SimpleNamespace(device="cpu", bf16=False, tf32=False, cpus=1)
BF16: Any = SimpleNamespace(device="cpu", bf16=True, tf32=False, cpus=1)
FULL = AdapterSection()
LORA = AdapterSection(adapter="lora", lora_r=4, lora_alpha=8, lora_target_linear=True)


def section(base: str = LLAMA, **keys: Any) -> ModelSection:
    return ModelSection.model_validate({"base_model": base, **keys})


def load(base: str = LLAMA, adapter: AdapterSection = FULL, training: bool = True, **keys: Any) -> Any:
    model = section(base, **keys)
    return load_model(model, adapter, load_tokenizer(model), CPU, training=training, seed=1)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(LLAMA, tmp_path / "base")
    return tmp_path / "base"


def test_weights_are_those_of_the_file() -> None:
    model = load(model_type="LlamaForCausalLM")
    weights = load_file(f"{LLAMA}/model.safetensors")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())
    assert model.config.use_cache is False
    ready_to_serve(model)
    assert model.config.use_cache is True


@pytest.mark.parametrize(
    ("keys", "hardware", "adapter", "training", "dtype"),
    [
        ({"bf16": True}, CPU, FULL, True, torch.bfloat16),
        ({"bf16": "auto"}, BF16, FULL, True, torch.bfloat16),
        ({"bf16": "auto"}, CPU, FULL, True, torch.float32),
        ({"bf16": False}, BF16, LORA, True, torch.float32),
        ({"bf16": "auto", "fp16": True}, BF16, LORA, True, torch.float16),
        ({"bf16": False, "fp16": True}, CPU, FULL, True, torch.float32),
        ({"bf16": False, "fp16": True}, CPU, FULL, False, torch.float16),
        ({"bf16": False, "bfloat16": True}, CPU, FULL, True, torch.bfloat16),
        ({"bf16": True, "float32": True}, BF16, LORA, True, torch.float32),
    ],
)
def test_precision(
    keys: dict[str, Any], hardware: Any, adapter: AdapterSection, training: bool, dtype: torch.dtype
) -> None:
    assert weight_dtype(section(**keys), adapter, hardware, training) == dtype


def test_bf16_weights_are_loaded_so() -> None:
    assert {p.dtype for p in load(bf16=True).parameters()} == {torch.bfloat16}


def test_new_tokens_grow_both_embeddings_from_the_mean() -> None:
    model = load(adapter=LORA, tokens=["<a>", "<b>"], special_tokens={"pad_token": "<p>"})
    weights = load_file(f"{LLAMA}/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = model.state_dict()[name]
        assert rows.shape == (4099, 128)
        assert torch.equal(rows[:4096], weights[name])
        assert torch.equal(rows[4096:], mean_row(weights[name]).expand(3, 128))
    assert model.config.vocab_size == 4099


def test_tied_embeddings_stay_tied_when_they_grow() -> None:
    model = load(CHATML, LORA, tokens=["<a>"])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.shape[0] == 4097


def test_rounding_up_to_32_and_shrinking(copy: Path) -> None:
    assert load(tokens=["<a>"], resize_token_embeddings_to_32x=True).config.vocab_size == 4128
    assert load(resize_token_embeddings_to_32x=True).config.vocab_size == 4096
    big = load(tokens=["<a>", "<b>"])
    big.save_pretrained(copy)
    assert load(str(copy)).config.vocab_size == 4098
    small = load(str(copy), shrink_embeddings=True)
    assert small.config.vocab_size == small.get_output_embeddings().weight.shape[0] == 4096


def test_special_tokens_agree_in_tokenizer_config_and_generation_config() -> None:
    model = section(special_tokens={"eos_token": "<|python_tag|>", "pad_token": "<|finetune_right_pad_id|>"})
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, LORA, tokenizer, CPU, training=True, stop_tokens=["<|eot_id|>", "two words"])
    assert loaded.config.eos_token_id == tokenizer.eos_token_id == 4086
    assert loaded.config.pad_token_id == loaded.generation_config.pad_token_id == 4085
    # stops at the new EOS, at the end of a turn, and where the base model stopped
    assert loaded.generation_config.eos_token_id == [4086, 4084, 4081]


def test_random_start_is_repeatable_and_needs_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    keys = {"reinit_weights": True, "overrides_of_model_config": {"num_hidden_layers": 2}}
    first, second = load(str(copy), **keys), load(str(copy), **keys)
    assert len(first.model.layers) == 2
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.lm_head.weight.std() > 0.01


def test_overrides_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    model = load(
        overrides_of_model_config={
            "rope_parameters": {"rope_theta": 1.0, "rope_type": "default"},
            "num_hiden_layers": 2,
        }
    )
    assert model.config.rope_parameters["rope_theta"] == 1.0
    assert "Did you mean `num_hidden_layers`?" in capsys.readouterr().err


def test_a_class_of_another_architecture_is_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert type(load(CHATML, model_type="LlamaForCausalLM")).__name__ == "Qwen2ForCausalLM"
    assert "made for `llama` models" in capsys.readouterr().err


def test_untrained_tokens_get_the_mean_of_the_others() -> None:
    model = load(fix_untrained_tokens=[5, 9])
    original = load_file(f"{LLAMA}/model.safetensors")["lm_head.weight"]
    others = torch.cat([original[:5], original[6:9], original[10:]])
    assert torch.allclose(model.lm_head.weight[5], others.mean(0), atol=1e-7)
    assert torch.equal(model.lm_head.weight[6], original[6])
    with pytest.raises(ModelError, match="names token 9999"):
        load(fix_untrained_tokens=9999)


def break_config(base: Path) -> None:
    (base / "config.json").write_text("{")


def break_weights(base: Path) -> None:
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:1000])


def break_header(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"\xff" * 64)


def only_pickle(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def unknown_architecture(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))


def another_depth(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))


def another_width(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 400}))


def lost_shard(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    save_file({"model.norm.weight": weights["model.norm.weight"]}, base / "a.safetensors")
    index = {"weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def wrong_index(base: Path) -> None:
    lost_shard(base)
    shutil.copy(base / "a.safetensors", base / "b.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: (b / "config.json").unlink(), "has no `config.json`"),
        (break_config, "cannot be read as JSON"),
        (lambda b: (b / "model.safetensors").unlink(), "has no weights"),
        (break_weights, "not a readable safetensors|promises"),
        (break_header, "impossible length"),
        (only_pickle, "only as pickle files"),
        (lost_shard, "b.safetensors` is missing"),
        (wrong_index, "is wrong: 1 tensors"),
        (unknown_architecture, "architecture \\(`lama`\\)"),
        (another_depth, "lacks 18 of the weights"),
        (another_width, "lacks 12 of the weights|cannot be read"),
    ],
)
def test_a_damaged_base_model_is_told_with_its_place(copy: Path, damage: Any, words: str) -> None:
    tokenizer = load_tokenizer(section(str(copy)))
    damage(copy)
    with pytest.raises(ModelError, match=words) as told:
        load_model(section(str(copy)), FULL, tokenizer, CPU, training=True, place=Place("c.yml", 1, 13))
    problem = told.value.problems[0]
    assert str(problem.places[0]) == "c.yml:1:13"
    assert problem.remedy


def test_an_adapter_given_as_base_model(copy: Path) -> None:
    for file in copy.iterdir():
        file.unlink()
    (copy / "adapter_config.json").write_text("{}")
    problems = check_base_model(section(str(copy)))
    assert "holds an adapter" in problems[0].message


@pytest.mark.parametrize(
    ("name", "count"),
    [("./no/where", 1), ("/no/where", 1), ("owner/on-the-hub", 0), (LLAMA, 0), ("a/b/c", 1)],
)
def test_the_cheap_check(name: str, count: int) -> None:
    assert len(check_base_model(section(name))) == count


def test_the_cheap_check_names_the_folders_nearby() -> None:
    problem = check_base_model(section(str(FIXTURES / "tiny-lama3")), Place("c.yml", 2))[0]
    assert problem.kind == "path"
    assert "tiny-llama3" in problem.remedy
    assert str(problem.places[0]) == "c.yml:2"


def test_checking_an_adapter_folder(tmp_path: Path) -> None:
    assert check_adapter_dir(AdapterSection()) == []
    for name, words in (
        (LLAMA, "holds a whole model"),
        (str(FIXTURES), "holds no adapter"),
        ("./x", "not a folder"),
    ):
        assert words in check_adapter_dir(AdapterSection(lora_model_dir=name))[0].message
    (tmp_path / "adapter_config.json").write_text("{}")
    assert (
        "has no `adapter_model" in check_adapter_dir(AdapterSection(lora_model_dir=str(tmp_path)))[0].message
    )


def test_the_cheap_check_loads_no_torch() -> None:
    code = (
        "import sys, axolotl.model.files; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_reading_headers_finds_every_tensor() -> None:
    files = read_weight_files(Path(LLAMA))
    weights = load_file(f"{LLAMA}/model.safetensors")
    entries, _ = read_header(Path(LLAMA) / "model.safetensors")
    assert {k: e.shape for k, e in entries.items()} == {k: tuple(v.shape) for k, v in weights.items()}
    assert files.total_bytes == sum(v.nbytes for v in weights.values())
    assert files.find("lm_head.weight")[0].name == "model.safetensors"
    assert files.find("nothing") is None


def test_an_unknown_model_class() -> None:
    with pytest.raises(ModelError, match="`model_type: LlamaForCasualLM`") as told:
        load(model_type="LlamaForCasualLM")
    assert "LlamaForCausalLM" in told.value.problems[0].remedy
