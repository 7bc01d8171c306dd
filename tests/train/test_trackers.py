"""Trackers for real: each writes, and what it wrote is read back; a server that hangs or is down stops nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import yaml

from axolotl.train.session import train
from train.miniature import losses, rows, tiny_model

pytestmark = pytest.mark.extras


@pytest.fixture(autouse=True)
def own_environment(tmp_path, monkeypatch) -> Iterator[None]:
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    os.environ |= {
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }
    yield
    os.environ.clear()
    os.environ |= before


def check_facts(recorded, run):
    """Config, data, git state and environment are among what was recorded."""
    assert str(recorded["axolotl/config/micro_batch_size"]) == "2"
    assert recorded["axolotl/run_id"] == run.parts.run_id
    assert recorded["axolotl/data/plan"] == run.parts.plan
    assert str(recorded["axolotl/environment/torch"]).startswith("2.")
    assert "axolotl/environment/python" in recorded
    assert recorded["axolotl/environment/git"] == run.parts.run["environment"]["git"]


@pytest.fixture
def repository(tmp_path):
    """The working folder is one, so that there is a git state."""
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=tmp_path, check=True
        )


def test_tensorboard(trainer, repository):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer(tiny_model(), rows(8), use_tensorboard=True)
    train(run, run.cfg)
    events = EventAccumulator(str(run.parts.output_dir / "runs"))
    events.Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses(run))
    text = events.Tensors("axolotl/text_summary")[0].tensor_proto.string_val[0].decode()
    recorded = dict(
        cell.strip("| ").split(" | ", 1) for cell in text.splitlines()[2:] if not cell.endswith("|  |")
    )
    check_facts(recorded, run)


def records(content: bytes) -> Iterator[bytes]:
    """The records of wandb's file: blocks of 32 KiB after 7 bytes of header, pieces with checksum, length and kind."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole one, or the last piece
            yield whole
            whole = b""


def test_wandb_offline(trainer, repository, tmp_path):
    from wandb.proto import wandb_internal_pb2

    run = trainer(
        tiny_model(),
        rows(8),
        wandb_project="p",
        wandb_mode="offline",
        wandb_name="n",
        comet_api_key="very-secret",
    )
    train(run, run.cfg)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history, config, names = [], {}, []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            history.append(items)
        for update in (record.config, record.run.config) if record.HasField("run") else (record.config,):
            config |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in update.update}
        if record.HasField("run"):
            names.append((record.run.project, record.run.display_name))
    assert [h["train/loss"] for h in history if "train/loss" in h] == pytest.approx(losses(run))
    assert names[0] == ("p", "n")
    assert b"very-secret" not in file.read_bytes()
    check_facts(config, run)


def test_mlflow_local_store(trainer, repository, tmp_path):
    import mlflow

    uri = f"file:{tmp_path}/mlruns"
    run = trainer(
        tiny_model(),
        rows(8),
        use_mlflow=True,
        mlflow_tracking_uri=uri,
        mlflow_experiment_name="e",
        mlflow_run_name="n",
    )
    train(run, run.cfg)
    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert found.info.run_name == "n" and found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [m.value for m in sorted(history, key=lambda m: m.step)] == pytest.approx(losses(run))
    check_facts(found.data.params, run)


def test_trackio(trainer, repository):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    run = trainer(tiny_model(), rows(8), trackio_project_name="p", trackio_run_name="n")
    train(run, run.cfg)
    (found,) = [r for r in trackio.Api().runs("p") if r.name == "n"]
    logs = SQLiteStorage.get_logs("p", "n")
    history = [line["train/loss"] for line in logs if "train/loss" in line]
    assert history == pytest.approx(losses(run))
    check_facts(found.config, run)


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """Takes connections and never answers."""
    server, kept = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        while True:
            try:
                kept.append(server.accept())
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()


@pytest.fixture
def server_that_is_down() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


TRACKED = {
    "mlflow": lambda uri: {"use_mlflow": True, "mlflow_tracking_uri": uri, "mlflow_experiment_name": "e"},
    "wandb": lambda uri: {"use_wandb": True, "wandb_project": "p", "wandb_mode": "online"},
}


@pytest.mark.parametrize("kind", ["hanging_server", "server_that_is_down"])
@pytest.mark.parametrize("tracker", sorted(TRACKED))
def test_the_command_ends_in_time_whatever_the_server_does(request, tmp_path, tiny_llama3, tracker, kind):
    uri = request.getfixturevalue(kind)
    lines = [json.dumps({"instruction": f"say {i}", "input": "", "output": f"number {i}"}) for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    values = {
        "base_model": str(tiny_llama3),
        "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
        "output_dir": "out",
        "sequence_len": 128,
        "learning_rate": 1e-3,
        "bf16": False,
        "tracker_timeout": 3,
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(values | TRACKED[tracker](uri)))
    environment = os.environ | {
        "WANDB_BASE_URL": uri,
        "WANDB_API_KEY": "0" * 40,
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "axolotl", "train", "config.yml"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    seconds = time.monotonic() - began
    print(f"{seconds:.1f} s", done.stderr[-1500:])
    # The packages' own patience is a minute and a half, and more at the end of the process.
    assert seconds < 75
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    assert json.loads((out / "run.json").read_text())["complete"] is True
    logged = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if line["kind"] == "train"] == list(range(1, 9))
    if kind == "hanging_server":
        told = [line["message"] for line in logged if line["kind"] == "event"]
        assert any(f"The tracker {tracker}" in message for message in told) and len(told) == 1


def test_comet_names_its_extra(config):
    from axolotl.errors import EnvironmentProblem
    from axolotl.train.tracking import trackers

    with pytest.raises(EnvironmentProblem) as error:
        trackers(config(comet_project_name="p").tracking)
    assert "axolotl[comet]" in error.value.problems[0].remedy
