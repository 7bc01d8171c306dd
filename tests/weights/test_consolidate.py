"""Sharded checkpoints become one model: what torch wrote in parts, by one process or by two, whole and small in memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl.config.model import ModelSection
from axolotl.distributed.states import save_weights
from axolotl.errors import CheckpointError, EnvironmentProblem, ModelError
from axolotl.weights.consolidate import SHARDED, consolidate, find_sharded
from axolotl.weights.folder import refuse_destination

FIXTURES = Path(__file__).parents[1] / "fixtures"
LLAMA, CHATML = FIXTURES / "tiny-llama3", FIXTURES / "tiny-chatml"


def section(base: Path) -> ModelSection:
    return ModelSection.model_validate({"base_model": str(base)})


def sharded(folder: Path, base: Path, change: Callable[[Any], Any] = lambda m: m, **options: Any) -> Path:
    """A sharded checkpoint as accelerate writes it: the state dict in a dictionary, under `model`."""
    model = change(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options))
    dcp.save(
        {"model": model.state_dict()}, storage_writer=dcp.FileSystemWriter(folder / SHARDED), no_dist=True
    )
    return folder / SHARDED


def moved(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


class Wrapped(torch.nn.Module):
    """What torch.compile does to the names of a layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._orig_mod = layer


@pytest.mark.parametrize("base", [LLAMA, CHATML], ids=["untied", "tied"])
@pytest.mark.parametrize("limit", [5 * 10**9, 2 * 10**6], ids=["one file", "several"])
def test_the_model_comes_out_as_it_was_trained(base: Path, limit: int, tmp_path: Path) -> None:
    folder = sharded(tmp_path, base, moved)
    tokenizer = AutoTokenizer.from_pretrained(base)
    report = consolidate(section(base), folder, tmp_path / "merged", tokenizer, max_shard_bytes=limit)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) == 1 if limit > 10**9 else len(files) > 2
    trained = moved(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert [k for k, v in trained.items() if not torch.equal(ours.state_dict()[k], v)] == []
    assert report.bytes == sum(t.nbytes for f in files for t in load_file(f).values())
    assert ours.config.tie_word_embeddings == (base == CHATML)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == tokenizer.eos_token
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "tags: [axolotl, consolidated]" in card
    assert str(tmp_path) not in card
    refuse_destination(tmp_path / "merged", folder)  # what can be made again may be replaced


@pytest.mark.slow
def test_two_processes_with_fully_sharded_parameters(tmp_path: Path) -> None:
    """FSDP2 by two gloo processes: every tensor is in two files."""
    script = tmp_path / "two.py"
    script.write_text(
        f"""
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=int(sys.argv[1]), world_size=2)
model = AutoModelForCausalLM.from_pretrained("{LLAMA}", dtype=torch.float32)
mesh = init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
dcp.save({{"model": model.state_dict()}}, storage_writer=dcp.FileSystemWriter("{tmp_path}/{SHARDED}"))
dist.destroy_process_group()
"""
    )
    runs = [subprocess.Popen([sys.executable, str(script), str(rank)]) for rank in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    assert len(list((tmp_path / SHARDED).glob("*.distcp"))) == 2
    consolidate(section(LLAMA), tmp_path / SHARDED, tmp_path / "merged", AutoTokenizer.from_pretrained(LLAMA))
    before, after = load_file(LLAMA / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[k].float(), after[k]) for k in before)


def test_number_type_grown_vocabulary_and_names_of_wrappers(tmp_path: Path) -> None:
    def change(model: Any) -> Any:
        model.resize_token_embeddings(4099, mean_resizing=False)
        model.model.layers[0] = Wrapped(model.model.layers[0])
        return model

    folder = sharded(tmp_path, LLAMA, change)
    consolidate(
        section(LLAMA),
        folder,
        tmp_path / "merged",
        AutoTokenizer.from_pretrained(LLAMA),
        dtype=torch.bfloat16,
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (ours.dtype, ours.config.vocab_size) == (torch.bfloat16, 4099)
    before = load_file(LLAMA / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(ours.state_dict()[name], before[name].to(torch.bfloat16))


def test_an_adapter_comes_out_as_peft_saves_it(tmp_path: Path) -> None:
    def change(model: Any) -> Any:
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
        moved(adapted.base_model.model.lm_head)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(generator=torch.Generator().manual_seed(1))
        adapted.save_pretrained(tmp_path)
        return adapted

    folder = sharded(tmp_path, LLAMA, change)
    report = consolidate(section(LLAMA), folder, tmp_path / "out", AutoTokenizer.from_pretrained(LLAMA))
    assert report.kind == "adapter"
    saved, ours = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "out"))
    assert set(saved) == set(ours)
    assert all(torch.equal(saved[k], ours[k]) for k in saved)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(LLAMA), tmp_path / "out")
    consolidate(section(LLAMA), folder, tmp_path / "out", AutoTokenizer.from_pretrained(LLAMA))
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()


def test_where_it_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no sharded checkpoint"):
        find_sharded(tmp_path)
    for step in (9, 10):
        sharded(tmp_path / f"checkpoint-{step}", LLAMA)
    assert find_sharded(tmp_path) == tmp_path / "checkpoint-10" / SHARDED
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / SHARDED / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-10.*was not saved to its end"):
        find_sharded(tmp_path)


def test_what_is_damaged_or_another_models_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    folder = sharded(tmp_path, LLAMA)

    def told(kind: type[Exception], words: str, base: Path = LLAMA) -> None:
        with pytest.raises(kind, match=words):
            consolidate(section(base), folder, tmp_path / "merged", tokenizer)
        assert sorted(p.name for p in tmp_path.iterdir()) == [SHARDED]

    told(
        ModelError,
        r"not a checkpoint of `base_model`'s architecture: .*not in it, such as `model.layers",
        CHATML,
    )
    part = next(folder.glob("*.distcp"))
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    told(CheckpointError, "is shorter than")
    part.write_bytes(b"\0" * len(whole))
    told(CheckpointError, "cannot be read")
    part.unlink()
    told(CheckpointError, "is missing, though `.metadata` names it")
    (folder / ".metadata").write_bytes(b"junk")
    told(CheckpointError, "cannot be read")
    shutil.rmtree(folder)
    sharded(tmp_path, LLAMA)
    monkeypatch.setattr(
        "axolotl.weights.folder.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1)
    )  # type: ignore[attr-defined]
    told(EnvironmentProblem, "The whole model needs")


@pytest.mark.parametrize("base", [LLAMA, CHATML], ids=["untied", "tied"])
def test_what_our_own_training_writes(base: str, tmp_path: Path) -> None:
    """Names as the trained model has them, each tensor once, without a wrapper around all."""
    model = moved(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    folder = tmp_path / "out" / "checkpoint-4" / SHARDED
    save_weights(model, folder, trained_only=False)
    consolidate(
        section(base),
        find_sharded(tmp_path / "out"),
        tmp_path / "merged",
        AutoTokenizer.from_pretrained(base),
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert [k for k, v in model.state_dict().items() if not torch.equal(ours[k], v)] == []


def test_an_adapter_that_our_own_training_writes(tmp_path: Path) -> None:
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(LLAMA), settings)
    model.save_pretrained(tmp_path / "expected")
    folder = tmp_path / "out" / "checkpoint-4" / SHARDED
    save_weights(model, folder, trained_only=True)
    shutil.copy2(tmp_path / "expected" / "adapter_config.json", folder.parent)
    report = consolidate(section(LLAMA), folder, tmp_path / "merged", AutoTokenizer.from_pretrained(LLAMA))
    assert report.kind == "adapter"
    expected, found = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("expected", "merged"))
    assert set(expected) == set(found)
    assert all(torch.equal(found[k], v) for k, v in expected.items())
