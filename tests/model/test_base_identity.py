"""An adapter knows its base by contents: from another folder, under another name, divided into other files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from axolotl.errors import ModelError
from axolotl.model.adapter_files import same_base, tell_other_base
from axolotl.model.base_identity import identify, record_base, recorded_identity

LLAMA = Path(__file__).parents[1] / "fixtures" / "tiny-llama3"


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter whose run named its base by a path that only that run's folder has."""
    run = tmp_path / "run"
    shutil.copytree(LLAMA, run / "base")
    monkeypatch.chdir(run)
    (run / "out").mkdir()
    named = {"base_model_name_or_path": "base", "peft_type": "LORA"}
    (run / "out" / "adapter_config.json").write_text(json.dumps(named))
    record_base(run / "out", "./base", SimpleNamespace(base_model_name_or_path="base"))
    monkeypatch.chdir(tmp_path)
    return run / "out"


def test_the_same_base_from_another_folder(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoModelForCausalLM.from_pretrained(LLAMA).save_pretrained(tmp_path / "parts", max_shard_size="2MB")
    shutil.copy2(LLAMA / "config.json", tmp_path / "parts" / "config.json")
    for base in (LLAMA, tmp_path / "run" / "base", tmp_path / "parts"):
        assert same_base("base", str(base), trained)
        tell_other_base(trained, str(base))
    assert "trained" not in capsys.readouterr().err
    checkpoint = trained / "checkpoint-4"
    checkpoint.mkdir()
    shutil.copy2(trained / "adapter_config.json", checkpoint)
    assert same_base("base", str(LLAMA), checkpoint)


def test_another_base_under_the_same_name(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "base"
    shutil.copytree(LLAMA, other)
    weights = load_file(other / "model.safetensors")
    save_file({n: t + 1 for n, t in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert not same_base("base", "base", trained)
    tell_other_base(trained, "base")
    assert "the two have different weights" in " ".join(capsys.readouterr().err.split())
    config = json.loads((LLAMA / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    with pytest.raises(ModelError, match="one is a `llama` model, the other a `mistral` model"):
        tell_other_base(trained, "base")


def test_a_config_that_was_changed_since(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run" / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 7.0}))
    tell_other_base(trained, str(file.parent))
    assert "has changed since the adapter" in " ".join(capsys.readouterr().err.split())


def test_what_does_not_count(trained: Path, tmp_path: Path) -> None:
    assert identify("owner/name") is None
    assert recorded_identity(trained, "another") is None
    (trained / "trained_on.json").write_text("{}")
    assert recorded_identity(trained, "base") is None
    before = identify(str(tmp_path / "run" / "base"))
    config = json.loads((LLAMA / "config.json").read_text())
    changed = config | {"transformers_version": "9", "dtype": "float16", "eos_token_id": 3}
    (tmp_path / "run" / "base" / "config.json").write_text(json.dumps(changed))
    assert identify(str(tmp_path / "run" / "base")) == before


def test_a_changed_tensor_changes_the_digest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.zeros(3), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    first = identify(str(tmp_path))
    save_file({"a": torch.zeros(3), "b": torch.full((3,), 2.0)}, tmp_path / "model.safetensors")
    second = identify(str(tmp_path))
    assert first is not None and second is not None
    assert (first.architecture, first.weights) != (second.architecture, second.weights)
    assert first.architecture == second.architecture
