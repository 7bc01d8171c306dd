"""What users hand to `merge-lora` by mistake, through the command itself: told in words, nothing written, no traceback."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl.cli.main import cli
from axolotl.weights import folder as folders
from trained import CHATML, LLAMA, lora, train


class Case:
    """A base model in several files, an adapter that fits, and a config that names both."""

    def __init__(self, tmp: Path, made: Path) -> None:
        shutil.copytree(made, tmp, dirs_exist_ok=True)
        self.base, self.adapter, self.out, self.yml = (
            tmp / n for n in ("base", "adapter", "out", "config.yml")
        )
        self.name_base(self.base)
        self.write()

    def name_base(self, base: Path) -> None:
        file = self.adapter / "adapter_config.json"
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}),
            encoding="utf-8",
        )

    def write(self, more: str = "") -> None:
        self.yml.write_text(
            f"base_model: {self.base}\nadapter: lora\nlora_r: 4\nlora_alpha: 8\nlora_target_linear: true\n"
            f"output_dir: {self.out}\n{more}",
            encoding="utf-8",
        )

    @property
    def shards(self) -> list[Path]:
        return sorted(self.base.glob("model-*.safetensors"))

    def merge(self, *args: str) -> tuple[int, str]:
        """(exit code, what was said, on one line)."""
        result = CliRunner().invoke(
            cli, ["merge-lora", str(self.yml), "--lora-model-dir", str(self.adapter), *args]
        )
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base model and adapter, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    AutoModelForCausalLM.from_pretrained(LLAMA).save_pretrained(folder / "base", max_shard_size="2MB")
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(folder / "base")
    train(folder / "adapter", LLAMA, lora())
    return folder


@pytest.fixture
def case(tmp_path: Path, made: Path) -> Case:
    return Case(tmp_path, made)


def missing_shard(case: Case) -> None:
    case.shards[1].unlink()


def wrong_index(case: Case) -> None:
    file = case.base / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name = next(n for n, f in index["weight_map"].items() if f == case.shards[0].name)
    index["weight_map"][name] = case.shards[1].name
    file.write_text(json.dumps(index))


def index_that_is_no_json(case: Case) -> None:
    (case.base / "model.safetensors.index.json").write_text('{"weight_map": {')


def header_of_the_base(case: Case) -> None:
    with case.shards[0].open("r+b") as file:
        file.write(struct.pack("<Q", 2**60))


def names_in_the_header(case: Case) -> None:
    with case.shards[0].open("r+b") as file:
        file.seek(12)
        file.write(b"\xff\xfe")


def base_cut_off(case: Case) -> None:
    os.truncate(case.shards[-1], case.shards[-1].stat().st_size - 1000)


def header_of_the_adapter(case: Case) -> None:
    with (case.adapter / "adapter_model.safetensors").open("r+b") as file:
        file.write(b"\0" * 16)


def adapter_cut_off(case: Case) -> None:
    file = case.adapter / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 10)


def adapter_lacks_a_weight(case: Case) -> None:
    file = case.adapter / "adapter_model.safetensors"
    stored = load_file(file)
    del stored[sorted(stored)[5]]
    save_file(stored, file)


def pickled_adapter(case: Case) -> None:
    stored = load_file(case.adapter / "adapter_model.safetensors")
    (case.adapter / "adapter_model.safetensors").unlink()
    torch.save(stored, case.adapter / "adapter_model.bin")


def pickled_base(case: Case) -> None:
    for file in case.base.glob("model*"):
        file.unlink()
    torch.save({}, case.base / "pytorch_model.bin")


def other_shapes(case: Case) -> None:
    shutil.rmtree(case.base)
    model = AutoModelForCausalLM.from_pretrained(LLAMA)
    model.config.intermediate_size *= 2
    type(model)(model.config).save_pretrained(case.base)
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(case.base)


def other_vocabulary(case: Case) -> None:
    shutil.rmtree(case.adapter)
    train(case.adapter, LLAMA, lora(lora_modules_to_save=["embed_tokens", "lm_head"]))
    shutil.rmtree(case.base)
    model = AutoModelForCausalLM.from_pretrained(LLAMA)
    model.resize_token_embeddings(5000)
    model.save_pretrained(case.base)
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(case.base)
    case.name_base(case.base)


def other_architecture(case: Case) -> None:
    case.name_base(Path(CHATML))


def fewer_layers(case: Case) -> None:
    shutil.rmtree(case.base)
    config = AutoModelForCausalLM.from_pretrained(LLAMA).config
    config.num_hidden_layers = 2
    AutoModelForCausalLM.from_config(config).save_pretrained(case.base)
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(case.base)


def kind_of_a_newer_peft(case: Case) -> None:
    file = case.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "NEWLORA"}))


def another_model_there(case: Case) -> None:
    shutil.copytree(LLAMA, case.out / "merged")


def other_files_there(case: Case) -> None:
    (case.out / "merged").mkdir(parents=True)
    (case.out / "merged" / "thesis.txt").write_text("x")


def not_finite(case: Case) -> None:
    file = case.adapter / "adapter_model.safetensors"
    stored = load_file(file)
    stored[sorted(stored)[3]][0, 0] = float("inf")
    save_file(stored, file)


BAD: list[tuple[Callable[[Case], None], list[str]]] = [
    (missing_shard, ["config.yml:1:1", "model-00002-of-0000", "is missing, though the index names it"]),
    (wrong_index, ["config.yml:1:1", "is wrong: 1 tensors are not in the file it names", "Copy or download"]),
    (index_that_is_no_json, ["config.yml:1:1", "cannot be read as JSON"]),
    (header_of_the_base, ["config.yml:1:1", "is not a readable safetensors file", "impossible length"]),
    (names_in_the_header, ["config.yml:1:1", "is not a readable safetensors file"]),
    (base_cut_off, ["config.yml:1:1", "where its header promises"]),
    (header_of_the_adapter, ["adapter_model.safetensors` is not a readable safetensors file"]),
    (adapter_cut_off, ["adapter_model.safetensors` holds", "where its header promises"]),
    (adapter_lacks_a_weight, ["lacks 1 of the adapter's weights", "use an earlier checkpoint"]),
    (pickled_adapter, ["adapter_model.bin", "can run any code", "trust_remote_code: true"]),
    (pickled_base, ["config.yml:1:1", "pytorch_model*.bin", "can run any code"]),
    (other_shapes, ["trained on another base model", "outputs here", "in the adapter"]),
    (other_vocabulary, ["its vocabulary has 4,096 rows, this model's 5,000"]),
    (other_architecture, ["one is a `qwen2` model, the other a `llama` model"]),
    (fewer_layers, ["layers that this one lacks, such as `model.layers.2."]),
    (kind_of_a_newer_peft, ["`NEWLORA`, which this PEFT does not have", "Install a newer peft"]),
    (another_model_there, ["holds a model that was not merged, consolidated or quantised here"]),
    (other_files_there, ["holds other files and no model; it is not overwritten"]),
    (not_finite, ["holds numbers that are not finite, in `base_model.model.model.layers."]),
]


@pytest.mark.parametrize(("spoil", "words"), BAD, ids=[f.__name__ for f, _ in BAD])
def test_bad_input_is_told(spoil: Callable[[Case], None], words: list[str], case: Case) -> None:
    spoil(case)
    before = sorted(case.out.rglob("*"))
    code, said = case.merge()
    assert code == 2, said
    assert [w for w in words if w not in said] == [], said
    assert "Traceback" not in said
    assert sorted(case.out.rglob("*")) == before


def test_a_pickle_is_read_as_weights_only_where_it_is_allowed(case: Case, tmp_path: Path) -> None:
    assert case.merge()[0] == 0
    expected = load_file(case.out / "merged" / "model-00001-of-00004.safetensors")
    pickled_adapter(case)
    case.write("trust_remote_code: true\n")
    code, said = case.merge()
    assert code == 0, said
    found = load_file(case.out / "merged" / "model-00001-of-00004.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "was_run"),)

    with (case.adapter / "adapter_model.bin").open("wb") as file:
        pickle.dump({"weights": Evil()}, file)
    code, said = case.merge()
    assert code == 2
    assert "adapter_model.bin` cannot be read as weights and nothing else" in said
    case.write("trust_remote_code: true\nmerge_method: legacy\n")
    assert case.merge()[0] == 2
    assert not (tmp_path / "was_run").exists()


def test_a_model_that_was_trained_whole_needs_no_merge(case: Case) -> None:
    shutil.copytree(LLAMA, case.out)
    case.yml.write_text(f"base_model: {case.base}\noutput_dir: {case.out}\n")
    result = CliRunner().invoke(cli, ["merge-lora", str(case.yml)])
    assert result.exit_code == 2
    assert "holds a whole model, trained without an adapter: there is nothing to merge" in " ".join(
        result.output.split()
    )


def test_keys_of_a_newer_peft_are_named_and_left_out(case: Case) -> None:
    file = case.adapter / "adapter_config.json"
    newer = json.loads(file.read_text()) | {"use_quantum": True, "nothing_new": None, "peft_version": "9.0"}
    file.write_text(json.dumps(newer))
    code, said = case.merge()
    assert code == 0, said
    assert "comes from a newer PEFT" in said
    assert "`use_quantum`" in said


def test_a_disk_that_is_too_small(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage(10**9, 0, 10**6))
    code, said = case.merge()
    assert code == 2
    assert "The merged model needs 0.04 GB" in said or "The merged model needs 4" in said
    assert "the disk has 1.00 MB free" in said
    assert not case.out.exists()
