"""Checkpoints on disk: whole or not there, and recognised when they are damaged."""

from __future__ import annotations

import json
import os

import pytest

from axolotl.train.checkpoint import (
    MANIFEST,
    RUN,
    RunState,
    clear_staging,
    damage,
    differences,
    list_checkpoints,
    newest_intact,
    publish,
    read_json,
    read_state,
    resumable,
    rotate,
    staging,
    write_json,
    write_state,
)

STATE = RunState("run", 3, 10, 5, "plan", 42, 1, 99)


def checkpoint(output, step, run="run", **files):
    aside = staging(output, step) / f"checkpoint-{step}"
    aside.mkdir(parents=True)
    content = {"trainer_state.json": "{}", "optimizer.pt": "abc", "sub/model.bin": "weights"} | files
    for name, text in content.items():
        (aside / name).parent.mkdir(exist_ok=True)
        (aside / name).write_text(text)
    write_state(aside, RunState(run, step, 10, 5, "plan", 42, 1, 99))
    publish(aside, output / f"checkpoint-{step}")
    return output / f"checkpoint-{step}"


def test_a_published_checkpoint_is_intact_and_lists_its_files(tmp_path):
    folder = checkpoint(tmp_path, 3)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert set(files) == {"trainer_state.json", "optimizer.pt", "sub/model.bin", "axolotl_state.json"}
    assert files["optimizer.pt"]["size"] == 3
    assert damage(folder) is None
    assert resumable(folder) is None
    assert read_state(folder) == STATE


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "optimizer.pt", "sub/model.bin", "axolotl_state.json"]
)
@pytest.mark.parametrize("how", ["remove", "shorten", "change"])
def test_every_damage_is_seen(tmp_path, name, how):
    file = checkpoint(tmp_path, 3) / name
    content = file.read_bytes()
    if how == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if how == "shorten" else content[:-1] + bytes([content[-1] ^ 1]))
    assert name in (damage(tmp_path / "checkpoint-3") or "")


def test_a_manifest_that_is_missing_is_damage_only_to_our_own(tmp_path):
    folder = checkpoint(tmp_path, 3)
    (folder / "manifest.json").unlink()
    assert "manifest is missing" in (damage(folder) or "")
    (folder / "axolotl_state.json").unlink()
    assert damage(folder) is None


def test_weights_alone_cannot_be_resumed(tmp_path):
    folder = checkpoint(tmp_path, 3)
    (folder / "optimizer.pt").unlink()
    assert "weights only" in (resumable(folder) or "")


def test_publishing_again_replaces(tmp_path):
    checkpoint(tmp_path, 3)
    folder = checkpoint(tmp_path, 3, **{"optimizer.pt": "newer"})
    assert (folder / "optimizer.pt").read_text() == "newer"
    assert damage(folder) is None
    clear_staging(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_leftovers_are_cleared_and_an_interrupted_replacement_undone(tmp_path):
    folder = checkpoint(tmp_path, 3)
    os.replace(folder, tmp_path / ".old-checkpoint-3")
    (tmp_path / ".tmp-checkpoint-9" / "checkpoint-9").mkdir(parents=True)
    clear_staging(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    assert damage(folder) is None


def test_an_unfinished_save_never_counts(tmp_path):
    checkpoint(tmp_path, 3)
    (staging(tmp_path, 6) / "checkpoint-6").mkdir(parents=True)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-3"]


def test_the_newest_intact_one_of_the_run_is_found(tmp_path, capsys):
    for step in (2, 10, 9):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 30, run="earlier")
    write_json(tmp_path / RUN, {"run_id": "run"})
    assert newest_intact(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "optimizer.pt").write_text("cut")
    (tmp_path / "checkpoint-9" / "optimizer.pt").write_text("")
    assert newest_intact(tmp_path) == tmp_path / "checkpoint-2"
    said = capsys.readouterr().err
    assert "checkpoint-10 is skipped" in said
    assert "checkpoint-9 is skipped" in said
    assert "earlier run" in said


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 9, run="other")
    rotate(tmp_path, 2, str(tmp_path / "checkpoint-1"), tmp_path / "checkpoint-4")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-4", "checkpoint-1"]
    rotate(tmp_path, None, None, tmp_path / "checkpoint-4")
    assert len(list_checkpoints(tmp_path)) == 3
    rotate(tmp_path, 1, None, tmp_path / "checkpoint-4")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-4"]


def test_a_damaged_later_checkpoint_does_not_push_out_the_one_just_saved(tmp_path):
    for step in (6, 9, 12):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-12" / "optimizer.pt").write_text("cut")
    rotate(tmp_path, 1, None, tmp_path / "checkpoint-9")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-12", "checkpoint-9"]
    write_json(tmp_path / RUN, {"run_id": "run"})
    assert newest_intact(tmp_path) == tmp_path / "checkpoint-9"


def test_differences_are_told_one_by_one():
    assert differences(STATE, STATE) == []
    changed = RunState("run", 3, 20, 5, "other", 1, 2, 99)
    assert len(differences(STATE, changed)) == 4


def test_json_is_never_half_written(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "b.json").write_text('{"a": ')
    assert read_json(tmp_path / "b.json") == {} == read_json(tmp_path / "c.json")
