"""`axolotl fetch` copies, keeps what the user changed, and says what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from axolotl.cli.fetch import FOLDERS, fetch, shipped
from axolotl.errors import EnvironmentProblem, UserError


@pytest.mark.parametrize("what", FOLDERS)
def test_everything_shipped_arrives(what: str, tmp_path: Path) -> None:
    target = fetch(what, tmp_path / "here")
    names = {f.relative_to(target) for f in target.rglob("*") if f.is_file()}
    source = shipped(what)
    expected = {
        f.relative_to(source) for f in source.rglob("*") if f.is_file() and "__pycache__" not in f.parts
    }
    assert names == expected
    assert names


def test_default_destination_bears_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fetch("deepspeed_configs") == Path("deepspeed_configs")
    assert (tmp_path / "deepspeed_configs" / "zero3_bf16.json").is_file()


def test_the_users_own_file_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch("deepspeed_configs", tmp_path)
    mine = tmp_path / "zero1.json"
    mine.write_text("{}")
    fetch("deepspeed_configs", tmp_path)
    assert mine.read_text() == "{}"
    assert "zero1.json differs" in capsys.readouterr().err.replace("\n", " ")
    fetch("deepspeed_configs", tmp_path, force=True)
    assert json.loads(mine.read_text())["zero_optimization"]["stage"] == 1


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean `deepspeed_configs`") as error:
        fetch("deepspeed-config")
    assert "`deepspeed-config`" in str(error.value)


def test_a_destination_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        fetch("deepspeed_configs", tmp_path / "file" / "below")


def test_deepspeed_configs_are_whole() -> None:
    for file in shipped("deepspeed_configs").glob("*.json"):
        config = json.loads(file.read_text())
        stage = config["zero_optimization"]["stage"]
        assert file.name.startswith(f"zero{stage}")
        assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == "auto"
        # Without this, stage 3 leaves no model to load at the end of a run.
        assert stage < 3 or config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
