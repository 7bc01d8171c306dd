"""Finished weights reach the Hub: the real client up to the request, and a Hub in memory behind it."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, Response

from axolotl.cli.main import cli
from axolotl.config.output import OutputSection
from axolotl.errors import EnvironmentProblem, ModelError
from axolotl.model.hub import check_upload
from axolotl.run.train import train
from axolotl.weights import publish as publishing
from axolotl.weights.publish import Uploads, files_to_publish, publish, publish_or_tell


class Hub:
    """Repositories by name and branch; it refuses or is away as often as a test says."""

    def __init__(self) -> None:
        self.branches: dict[tuple[str, str], dict[str, bytes]] = defaultdict(dict)
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.cards: list[str] = []
        self.failures: list[Exception] = []

    def fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    def create_repo(self, api: Any, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.fail()
        assert exist_ok
        self.private.setdefault(repo_id, private)

    def create_branch(self, api: Any, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        assert exist_ok
        self.branches[repo_id, branch] |= self.branches[repo_id, "main"]

    def list_repo_files(self, api: Any, repo_id: str, *, revision: str | None = None, **_: Any) -> list[str]:
        return list(self.branches[repo_id, revision or "main"])

    def _validate_yaml(self, api: Any, *, content: str, **_: Any) -> None:
        self.cards.append(content)

    def create_commit(
        self, api: Any, repo_id: str, operations: Any, *, commit_message: str, revision: str | None, **_: Any
    ) -> SimpleNamespace:
        self.fail()
        assert repo_id in self.private
        files = self.branches[repo_id, revision or "main"]
        for each in operations:
            if isinstance(each, CommitOperationDelete):
                del files[each.path_in_repo]
            elif isinstance(each, CommitOperationAdd):
                with each.as_file() as file:
                    files[each.path_in_repo] = file.read()
        self.messages.append(commit_message)
        return SimpleNamespace(oid="0")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    for name in ("create_repo", "create_branch", "list_repo_files", "_validate_yaml", "create_commit"):
        method = getattr(made, name)
        monkeypatch.setattr(HfApi, name, lambda api, *a, _m=method, **k: _m(api, *a, **k))
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [])
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    monkeypatch.setattr(publishing.time, "sleep", lambda _: None)
    return made


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """What a run leaves behind, with all that must stay here."""
    folder = tmp_path / "out[1]"
    for name in (
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "generation_config.json", "README.md", "axolotl_config.yml", "run.json", "run.jsonl",
        "run.html", ".env", "training_args.bin", "checkpoint-3/adapter_model.safetensors",
        "merged/model.safetensors", "mine.py", "rows.jsonl",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def output(**keys: Any) -> OutputSection:
    return OutputSection(hub_model_id="me/mine", **keys)


PUBLIC = {
    "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "generation_config.json", "README.md", "axolotl_config.yml",
}  # fmt: skip


def test_only_what_belongs_to_the_model_is_uploaded(hub: Hub, adapter: Path) -> None:
    assert publish(adapter, output()) == "https://huggingface.co/me/mine"
    assert set(hub.branches["me/mine", "main"]) == PUBLIC
    assert hub.private == {"me/mine": True}


def test_a_branch_is_made_and_main_left_alone(hub: Hub, adapter: Path) -> None:
    assert publish(adapter, output(hub_revision="second")).endswith("me/mine/tree/second")
    assert set(hub.branches["me/mine", "second"]) == PUBLIC
    assert not hub.branches["me/mine", "main"]


def test_shards_that_would_be_loaded_with_the_new_ones_go(hub: Hub, adapter: Path) -> None:
    old = {"adapter_model-00001-of-00002.safetensors": b"", "model.safetensors": b"", ".gitattributes": b""}
    hub.branches["me/mine", "main"] |= old
    publish(adapter, output())
    assert set(hub.branches["me/mine", "main"]) == PUBLIC | {"model.safetensors", ".gitattributes"}


def test_code_of_the_model_goes_along(adapter: Path) -> None:
    (adapter / "config.json").write_text(
        json.dumps({"auto_map": {"AutoConfig": "shape.Shape", "AutoModel": "a/b--away.M"}})
    )
    (adapter / "shape.py").write_text("from .parts import x\n")
    (adapter / "parts.py").write_text("x = 1\n")
    (adapter / "away.py").write_text("")
    assert {n for n in files_to_publish(adapter) if n.endswith(".py")} == {"shape.py", "parts.py"}


def test_a_folder_without_weights(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no finished weights"):
        publish(tmp_path, output())
    assert not hub.private


def refused(status: int) -> HfHubHTTPError:
    http = sys.modules[Response.__module__.partition(".")[0]]
    request = http.Request("POST", "https://huggingface.co")  # type: ignore[attr-defined]
    return HfHubHTTPError(f"{status} Client Error", response=Response(status, request=request))


def test_a_hub_that_is_away_for_a_while(hub: Hub, adapter: Path) -> None:
    hub.failures = [ConnectionError("Name or service not known"), refused(503)]
    publish(adapter, output())
    assert not hub.failures
    assert set(hub.branches["me/mine", "main"]) == PUBLIC


def test_what_the_hub_refuses_is_not_asked_again(hub: Hub, adapter: Path) -> None:
    hub.failures = [refused(403), refused(403)]
    with pytest.raises(EnvironmentProblem, match=r"`hub_model_id: me/mine` cannot be written to: 403"):
        publish(adapter, output())
    assert len(hub.failures) == 1


def test_a_hub_that_stays_away_is_told_with_the_command(hub: Hub, adapter: Path, capsys: Any) -> None:
    hub.failures = [ConnectionError("no route")] * 9
    assert not publish_or_tell(adapter, output(), "axolotl publish c.yml")
    said = " ".join(capsys.readouterr().err.split())
    assert "axolotl publish c.yml" in said
    assert "no route" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint/adapter_model.safetensors", "last-checkpoint/optimizer.pt"}),
        ("all_checkpoints", {"checkpoint-3/adapter_model.safetensors", "checkpoint-3/optimizer.pt"}),
        ("end", None),
    ],
)
def test_checkpoints_by_strategy(hub: Hub, adapter: Path, strategy: Any, more: set[str] | None) -> None:
    hub.private["me/mine"] = True
    (adapter / "checkpoint-3" / "optimizer.pt").write_text("")
    uploads = Uploads(output(hub_strategy=strategy))
    uploads.saved(adapter / "checkpoint-3")
    uploads.close()
    expected = set() if more is None else {"adapter_model.safetensors"} | more
    assert set(hub.branches["me/mine", "main"]) == expected
    assert not list(adapter.glob(".tmp-*"))


def test_a_checkpoint_that_fails_to_upload_is_told(hub: Hub, adapter: Path) -> None:
    hub.failures, told = [refused(500)], []
    uploads = Uploads(output(), told.append)
    uploads.saved(adapter / "checkpoint-3")
    uploads.close()
    assert told == ["checkpoint-3 could not be uploaded: 500 Client Error. Training goes on."]


@pytest.fixture
def config(tmp_path: Path, tiny_llama3: Path, write_jsonl: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """config(key=...) → the path of a run of two steps, saved after each."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("rows.jsonl", [{"instruction": f"say {i}", "output": "a"} for i in range(4)])
    file = tmp_path / "c.yml"

    def write(**keys: Any) -> Path:
        values = {
            "base_model": str(tiny_llama3), "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
            "output_dir": "out", "micro_batch_size": 2, "learning_rate": 1e-3, "sequence_len": 64, "max_steps": 2,
            "save_steps": 1, "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True,
            "hub_model_id": "me/mine",
        } | keys  # fmt: skip
        file.write_text(yaml.safe_dump(values))
        return file

    return write


@pytest.mark.parametrize(
    ("keys", "messages"),
    [
        ({"hub_strategy": "end"}, []),
        ({"save_strategy": "no", "save_steps": None}, []),
        ({}, ["Training in progress: checkpoint-2"]),
    ],
)
def test_a_run_delivers_its_finished_weights(
    hub: Hub, config: Any, tmp_path: Path, keys: Any, messages: Any
) -> None:
    from axolotl.plan.check import load_config

    assert train(load_config([config(**keys)], [], verb="train")).complete
    files = hub.branches["me/mine", "main"]
    assert files["adapter_model.safetensors"] == (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert {"README.md", "axolotl_config.yml", "tokenizer.json", "generation_config.json"} <= set(files)
    assert not [n for n in files if "/" in n or n.startswith("run.")]
    assert hub.messages[-1] == "Finished weights"
    # Once, with the finished weights, and without a base that the Hub would refuse.
    (card,) = hub.cards
    assert "base_model:" not in card
    assert set(messages) <= set(hub.messages)


def test_a_hub_that_goes_away_during_training_costs_no_run(
    hub: Hub, config: Any, tmp_path: Path, capsys: Any
) -> None:
    from axolotl.plan.check import load_config

    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    HfApi.create_commit = away  # type: ignore[method-assign]  # the fixture puts it back
    assert train(load_config([config()], [], verb="train")).complete
    assert json.loads((tmp_path / "out" / "run.json").read_text())["complete"] is True
    assert "axolotl publish" in capsys.readouterr().err


def test_what_is_wrong_is_told_before_anything_is_loaded(hub: Hub, config: Any, monkeypatch: Any) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("axolotl.run.train.load_model", loaded)
    hub.failures = [refused(403)]
    result = CliRunner().invoke(cli, ["train", str(config())])
    assert result.exit_code == 2
    assert "cannot be written to: 403" in " ".join(result.output.split())
    monkeypatch.delenv("HF_TOKEN")
    result = CliRunner().invoke(cli, ["train", str(config())])
    assert result.exit_code == 2
    assert "there is no token for the Hub" in " ".join(result.output.split())


def test_what_can_be_seen_without_asking(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_upload(None) == check_upload("me/mine") == []
    assert "form of a repository's name" in check_upload("a/b/c")[0].message

    def away(*_: Any) -> None:
        raise OSError("Name or service not known")

    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr("socket.getaddrinfo", away)
    (problem,) = check_upload("me/mine")
    assert problem.fatal
    assert "cannot be reached" in problem.message
    assert not check_upload("me/mine", resuming=True)[0].fatal


def test_the_command(hub: Hub, config: Any, adapter: Path) -> None:
    result = CliRunner().invoke(cli, ["publish", str(config()), "--folder", str(adapter)])
    assert result.exit_code == 0, result.output
    assert set(hub.branches["me/mine", "main"]) == PUBLIC
    result = CliRunner().invoke(cli, ["publish", str(config(hub_model_id=None)), "--folder", str(adapter)])
    assert result.exit_code == 2
    assert "`hub_model_id`" in result.output
