"""Merging: bit for bit what PEFT does, whatever the adapter; verified; whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from axolotl.config.host import Ram
from axolotl.errors import EnvironmentProblem, ModelError
from axolotl.model.adapter import load_adapter
from axolotl.model.embeddings import resize_embeddings
from axolotl.weights import merge as merging
from axolotl.weights import verify
from axolotl.weights.card import model_card
from axolotl.weights.merge import bytes_to_write, merge
from trained import CHATML, LLAMA, lora, section, train

IDS = torch.arange(40, 72).view(2, 16)
MORE = {"tokens": ["<a>", "<b>"]}


def adapter_model(base: str, adapter_dir: Path, rows: int = 4096) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    resize_embeddings(model, rows)
    return load_adapter(model, adapter_dir)


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"peft_use_dora": True},
    "rslora": {"peft_use_rslora": True},
    "patterns": {"lora_rank_pattern": {"q_proj": 2}, "lora_alpha_pattern": {"k_proj": 3}},
    "some layers": {"peft_layers_to_transform": [1, 3], "lora_target_modules": ["q_proj", "down_proj"]},
    "head and embeddings": {"lora_modules_to_save": ["lm_head", "embed_tokens"]},
    "head alone": {"lora_modules_to_save": ["lm_head"]},
    "norms": {"lora_modules_to_save": ["input_layernorm", "norm"]},
    "rows": {"peft_trainable_token_indices": [5, 4000]},
    "embeddings by lora": {"lora_target_modules": ["embed_tokens", "q_proj"]},
    "pissa": {"peft_init_lora_weights": "pissa"},
    "loha": {"adapter": "loha", "lora_target_modules": ["q_proj", "up_proj"]},
    "lokr": {"adapter": "lokr", "lora_target_modules": ["q_proj", "up_proj"]},
    "vera": {"adapter": "vera", "lora_target_modules": ["q_proj", "o_proj"]},
    "oft": {"adapter": "oft", "lora_target_modules": ["q_proj", "o_proj"]},
    "hra": {"adapter": "hra", "lora_target_modules": ["q_proj", "o_proj"]},
    "ia3": {"adapter": "ia3", "lora_target_modules": ["q_proj", "o_proj"]},
}
# With one tensor for input and output, PEFT writes a change of the one into the other; ours does what the adapter does.
UNTIED_BY_ADAPTER = ("head alone", "embeddings by lora", "head and embeddings")


CASES = [(kind, LLAMA) for kind in KINDS] + [
    (kind, CHATML) for kind in ("lora", "dora", "rows", *UNTIED_BY_ADAPTER)
]


@pytest.mark.parametrize(("kind", "base"), CASES, ids=[f"{k}-{Path(b).name}" for k, b in CASES])
def test_merging_is_bit_equal_to_peft(kind: str, base: str, tmp_path: Path) -> None:
    adapter = lora(**KINDS[kind])
    folder = train(tmp_path / "adapter", base, adapter)
    report = merge(
        section(base), adapter, folder, tmp_path / "merged", verify="by layers", sample_rows=IDS.tolist()
    )
    assert isinstance(report.checks[0], verify.Verification)
    assert report.checks[0].tokens == IDS.numel()
    assert report.method == ("in memory" if kind == "pissa" else "layer by layer")
    assert report.checks[0].passed
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    model = adapter_model(base, folder)
    assert torch.allclose(model(IDS).logits, ours(IDS).logits, atol=1e-4)
    if base == LLAMA or kind not in UNTIED_BY_ADAPTER:
        expected = model.merge_and_unload().state_dict()
        found = ours.state_dict()
        assert set(expected) == set(found)
        assert [k for k, v in expected.items() if not torch.equal(found[k], v)] == []
        assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(
            load_file(f"{base}/model.safetensors")
        )
    else:
        assert ours.config.tie_word_embeddings is False


@pytest.mark.parametrize("base", [LLAMA, CHATML], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("keys", "adapter", "rows"),
    [
        (MORE, {}, 4098),
        (MORE | {"resize_token_embeddings_to_32x": True}, {}, 4128),
        (MORE, {"lora_modules_to_save": ["lm_head", "embed_tokens"]}, 4098),
        ({"special_tokens": {"pad_token": "<p>"}}, {}, 4097),
    ],
    ids=["rows", "32x", "whole", "pad only"],
)
def test_added_tokens(
    base: str, keys: dict[str, Any], adapter: dict[str, Any], rows: int, tmp_path: Path
) -> None:
    chosen = lora(**adapter)
    folder = train(tmp_path / "adapter", base, chosen, **keys)
    merge(section(base, **keys), chosen, folder, tmp_path / "merged")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert ours.config.vocab_size == ours.get_input_embeddings().weight.shape[0] == rows
    ids = torch.tensor([[7, 4096, 8, rows - 1]])
    expected = adapter_model(base, folder, rows)
    assert torch.allclose(expected(ids).logits, ours(ids).logits, atol=1e-5)
    merged = expected.merge_and_unload().state_dict()
    assert [k for k, v in merged.items() if not torch.equal(ours.state_dict()[k], v)] == []


def test_trained_tokenizer_template_and_configs_are_saved(tmp_path: Path) -> None:
    keys = {"special_tokens": {"eos_token": "<|eot_id|>"}}
    folder = train(tmp_path / "adapter", LLAMA, lora(), template="{{ 'mine' }}", **keys)
    merge(section(LLAMA, **keys), lora(), folder, tmp_path / "merged", stop_tokens=["<|python_tag|>"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (tokenizer.chat_template, tokenizer.eos_token) == ("{{ 'mine' }}", "<|eot_id|>")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.generation_config.eos_token_id == [4084, 4086, 4081]
    assert model.config.eos_token_id == 4084
    assert model.config.use_cache
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "rank: 4" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(("base", "public"), [("models/mine", False), ("nobody/hub-model", True)])
def test_the_card_names_repositories_and_no_folders(
    base: str, public: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = model_card(base, tmp_path / "adapter", LoraConfig(r=4), "float32", ())
    assert (f"base_model: {base}\n" in text) is public
    assert (f"`{base}`" in text) is public


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The base model in four files and bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="1200KB")
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_files_and_number_type_are_kept(sharded: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "adapter", str(sharded), lora())
    report = merge(section(str(sharded)), lora(), folder, tmp_path / "merged", verify="logits")
    before = json.loads((sharded / "model.safetensors.index.json").read_text())
    after = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(set(before["weight_map"].values())) >= 3
    assert before["weight_map"] == after["weight_map"]
    assert before["metadata"]["total_size"] == after["metadata"]["total_size"] == report.bytes
    assert report.dtype == "bfloat16"
    assert report.checks[0].passed
    base = AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float32)
    exact = load_adapter(base, folder).merge_and_unload().state_dict()
    for file in sorted(set(after["weight_map"].values())):
        for name, tensor in load_file(tmp_path / "merged" / file).items():
            assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name


def test_a_checkpoint_saved_without_the_head_prefix(tmp_path: Path) -> None:
    """Files whose names lack the model's prefix, as some published ones do."""
    base = tmp_path / "base"
    shutil.copytree(LLAMA, base)
    weights = load_file(base / "model.safetensors")
    save_file(
        {k.removeprefix("model."): v for k, v in weights.items()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    folder = train(tmp_path / "adapter", LLAMA, lora())
    merge(section(str(base)), lora(), folder, tmp_path / "merged", verify="off")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    expected = adapter_model(LLAMA, folder).merge_and_unload().state_dict()
    assert all(torch.equal(v, expected[k if k in expected else f"model.{k}"]) for k, v in written.items())


def test_legacy_way_gives_the_same(tmp_path: Path) -> None:
    folder = train(tmp_path / "adapter", CHATML, lora())
    report = merge(section(CHATML), lora(merge_method="legacy"), folder, tmp_path / "slow")
    merge(section(CHATML), lora(), folder, tmp_path / "fast")
    assert report.method == "in memory"
    slow, fast = (
        load_file(tmp_path / "slow/model.safetensors"),
        load_file(tmp_path / "fast/model.safetensors"),
    )
    assert set(slow) == set(fast)
    assert all(torch.equal(slow[k], fast[k]) for k in slow)


def test_rows_go_through_layer_by_layer_where_the_model_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"tokens": ["<a>", "<b>"]}
    folder = train(tmp_path / "adapter", CHATML, lora(peft_use_dora=True), **keys)
    monkeypatch.setattr(verify, "_PATIENCE_BYTES", 10**5)
    rows = [[5, 6, 4097, 8, 9], [10, 11, 12]]
    report = merge(
        section(CHATML, **keys), lora(peft_use_dora=True), folder, tmp_path / "merged", sample_rows=rows
    )
    assert "on rows, layer by layer" in capsys.readouterr().err
    (check,) = report.checks
    assert isinstance(check, verify.Verification)
    assert check.passed
    assert check.tokens == 8
    models = verify.Models(
        Path(CHATML), AutoConfig.from_pretrained(CHATML), folder, tmp_path / "merged", 4098
    )
    for by_layers, whole in (
        (models.adapted_by_layers(rows, None), verify.logits_of(lambda: models.adapted(None), rows)),
        (models.merged_by_layers(rows), verify.logits_of(models.merged_model, rows)),
    ):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(by_layers, whole, strict=True))


def test_weights_that_a_layer_takes_from_elsewhere_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaModel

    right = LlamaModel.forward

    def peeking(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = right(self, *args, **kwargs)
        found.last_hidden_state = found.last_hidden_state + self.layers[0].mlp.up_proj.weight.mean()
        return found

    folder = train(tmp_path / "adapter", LLAMA, lora())
    monkeypatch.setattr(LlamaModel, "forward", peeking)
    report = merge(section(LLAMA), lora(), folder, tmp_path / "merged", verify="by layers")
    assert isinstance(report.checks[0], verify.LayerCheck)
    assert "The rows were not compared: its layers" in capsys.readouterr().err


def test_a_model_whose_own_code_fails_on_the_rows_is_compared_by_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaModel

    def picky(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("an even number of tokens, please")

    folder = train(tmp_path / "adapter", LLAMA, lora())
    monkeypatch.setattr(LlamaModel, "forward", picky)
    report = merge(section(LLAMA), lora(), folder, tmp_path / "merged", verify="by layers")
    assert isinstance(report.checks[0], verify.LayerCheck)
    assert "an even number of tokens, please" in capsys.readouterr().err
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_checking_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(tmp_path / "adapter", LLAMA, lora(peft_use_dora=True))
    monkeypatch.setattr(verify, "ram", lambda: Ram(10**6, 10**6, "machine", 0))
    report = merge(section(LLAMA), lora(), folder, tmp_path / "merged")
    assert "Each layer is compared on its own, not on rows" in capsys.readouterr().err
    assert isinstance(report.checks[0], verify.LayerCheck)
    assert report.checks[0].passed
    assert 0 <= report.checks[0].difference < 1e-5


@pytest.mark.parametrize("way", ["logits", "by layers", "layers"])
def test_a_wrong_merge_is_found_and_kept_aside(
    way: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(tmp_path / "adapter", LLAMA, lora())
    from peft.tuners.lora import Linear

    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 1.01 * right(self, name))
    with pytest.raises(ModelError, match="differs from base and adapter beyond tolerance"):
        merge(section(LLAMA), lora(), folder, tmp_path / "merged", verify=way)
    assert not (tmp_path / "merged").exists()
    assert (tmp_path / "merged-unverified" / "model.safetensors").is_file()


def test_tolerances() -> None:
    logits = [torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]])]
    near, far = [logits[0] + 5e-5], [logits[0].roll(1, dims=1)]
    assert verify.compare("", logits, near, "float32").passed
    assert not verify.compare("", logits, [logits[0] + 2e-4], "float32").passed
    # a shift of all logits changes nothing that is sampled
    assert verify.compare("", logits, [logits[0] + 2e-4], "bfloat16").passed
    other = verify.compare("", logits, far, "bfloat16")
    assert not other.passed
    assert (other.argmax, other.tokens) == (0.0, 2)
    assert other.kl > 0.1


def test_nothing_half_is_left_by_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(tmp_path / "adapter", LLAMA, lora())
    merge(section(LLAMA), lora(), folder, tmp_path / "out" / "merged")
    before = (tmp_path / "out" / "merged" / "model.safetensors").read_bytes()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "_save_beside", stop)
    with pytest.raises(KeyboardInterrupt):
        merge(section(LLAMA), lora(), folder, tmp_path / "out" / "merged")
    assert os.listdir(tmp_path / "out") == ["merged"]
    assert (tmp_path / "out" / "merged" / "model.safetensors").read_bytes() == before


def test_an_existing_model_is_replaced_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(tmp_path / "adapter", LLAMA, lora())
    target = tmp_path / "merged"
    merge(section(LLAMA), lora(), folder, target)
    (target / "stale.txt").write_text("x")
    merge(section(LLAMA), lora(), folder, target)
    assert not (target / "stale.txt").exists()
    assert "existed and is replaced" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "merged"]


def test_destinations_that_are_refused(tmp_path: Path) -> None:
    folder = train(tmp_path / "adapter", LLAMA, lora())
    shutil.copytree(LLAMA, tmp_path / "base")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    shutil.copytree(LLAMA, tmp_path / "trained")
    (tmp_path / "trained" / "README.md").write_text("---\ntags:\n- axolotl\n---\nTrained with axolotl.\n")
    for target, words in (
        (folder, "is read from"),
        (tmp_path / "base", "is read from"),
        (tmp_path, "is read from"),
        (tmp_path / "notes", "holds other files"),
        (tmp_path / "trained", "was not merged, consolidated or quantised here"),
        (folder / "adapter_config.json", "is a file"),
    ):
        with pytest.raises(ModelError, match=words):
            merge(section(str(tmp_path / "base")), lora(), folder, target)
    assert (tmp_path / "notes" / "todo.txt").exists()


def test_a_base_that_misses_a_shard_is_told_as_that(sharded: Path, tmp_path: Path) -> None:
    from axolotl.config import load_config
    from axolotl.model.base_identity import record_base
    from axolotl.run.merge import merge as verb

    folder = train(tmp_path / "out", LLAMA, lora())
    record_base(folder, LLAMA, PeftConfig.from_pretrained(str(folder)))
    gone = sorted(sharded.glob("*.safetensors"))[-1]
    gone.unlink()
    values = {
        "base_model": str(sharded),
        "output_dir": str(folder),
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
    }
    data = {
        "datasets": [{"path": "a.jsonl", "type": "alpaca"}],
        "learning_rate": 1e-4,
        "lora_target_linear": True,
    }
    file = tmp_path / "config.yml"
    file.write_text(json.dumps({**values, **data, "micro_batch_size": 1, "num_epochs": 1}))
    with pytest.raises(ModelError, match=f"{gone.name}` is missing"):
        verb(load_config(file))


def test_a_disk_that_is_too_small_is_told_before_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(tmp_path / "adapter", LLAMA, lora())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(
        EnvironmentProblem, match=r"needs 41\.\d\d MB.*1\.00 MB free|needs 0\.04 GB.*1\.00 MB free"
    ):
        merge(section(LLAMA), lora(), folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_size_told_is_that_of_unpacked_weights(tmp_path: Path) -> None:
    tensors = {
        "w": torch.zeros(64, 32).to(torch.float8_e4m3fn),
        "experts_blocks": torch.zeros(8, 16, dtype=torch.uint8),
        "experts_scales": torch.zeros(8, dtype=torch.uint8),
        "norm": torch.zeros(32, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert bytes_to_write(tmp_path, unpacked=True) == 2 * 64 * 32 + 4 * 8 * 16 + 8 + 2 * 32
    assert bytes_to_write(tmp_path, unpacked=False) == (tmp_path / "model.safetensors").stat().st_size


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    folder = train(tmp_path / "adapter", LLAMA, lora())
    base = tmp_path / "base"
    shutil.copytree(LLAMA, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ModelError, match="weights for 14 layers that this one lacks"):
        merge(section(str(base)), lora(), folder, tmp_path / "merged")
    (base / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ModelError, match="holds gptq weights, into which nothing can be merged"):
        merge(section(str(base)), lora(), folder, tmp_path / "merged")
    with pytest.raises(ModelError, match="holds a whole model"):
        merge(section(LLAMA), lora(), Path(LLAMA), tmp_path / "merged")


def edit_weights(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({k: change(k, v) for k, v in load_file(file).items()}, file)


def test_an_adapter_with_numbers_that_are_not_finite(tmp_path: Path) -> None:
    folder = train(tmp_path / "adapter", LLAMA, lora())
    edit_weights(folder, lambda k, v: v * float("nan") if "layers.2.mlp.up_proj.lora_B" in k else v)
    with pytest.raises(ModelError, match=r"not finite, in `.*layers.2.mlp.up_proj.lora_B"):
        merge(section(LLAMA), lora(), folder, tmp_path / "merged")


def test_an_untrained_adapter_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(tmp_path / "adapter", LLAMA, lora())
    edit_weights(folder, lambda k, v: v * 0 if "lora_B" in k else v)
    merge(section(LLAMA), lora(), folder, tmp_path / "merged")
    assert "was never trained" in capsys.readouterr().err


def test_an_adapter_that_changes_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(tmp_path / "adapter", LLAMA, lora())
    monkeypatch.setattr("axolotl.weights.skeleton.Skeleton.changes", lambda _: iter(()))
    with pytest.raises(ModelError, match="changes no tensor"):
        merge(section(LLAMA), lora(), folder, tmp_path / "merged")


def test_experts_by_target_parameters(tmp_path: Path) -> None:
    """A mixture of experts with an adapter on stacked expert weights."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        bos_token_id=None,
        eos_token_id=4091,
    )
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(CHATML).save_pretrained(tmp_path / "base")
    adapter = lora(
        lora_target_modules=["q_proj"], lora_target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    folder = train(tmp_path / "adapter", str(tmp_path / "base"), adapter)
    merge(section(str(tmp_path / "base")), adapter, folder, tmp_path / "merged", verify="logits")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    expected = adapter_model(str(tmp_path / "base"), folder).merge_and_unload().state_dict()
    assert [k for k, v in expected.items() if not torch.equal(ours[k], v)] == []
