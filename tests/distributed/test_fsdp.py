"""FSDP2 on the CPU, with the real command: the losses and weights of one process, checkpoints, other numbers of processes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from axolotl.train.checkpoint import damage
from distributed.runs import Runs, eventually, furthest

pytestmark = pytest.mark.slow

LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    "learning_rate": 0.01,
}


def runs_in(folder: Path, model: Path, options: dict[str, Any] | None = None, **keys: Any) -> Runs:
    """Runs with a second file that says how they are sharded."""
    runs = Runs(folder, model, max_grad_norm=1.0, **keys)
    (folder / "fsdp.yml").write_text(yaml.safe_dump({"fsdp_version": 2, "fsdp_config": options or {}}))
    return runs


def sharded(runs: Runs, name: str, ranks: int, *more: str, steps: int = 4, **options: Any) -> str:
    """A run of the config with FSDP, on the global batch of four."""
    said = runs.run(
        name,
        "fsdp.yml",
        *("--num-processes", str(ranks), "--gradient-accumulation-steps", str(steps // ranks)),
        *more,
        **options,
    )
    assert "FSDP2: each weight in" in said
    return said


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, tiny_llama3: Path) -> Runs:
    runs = runs_in(tmp_path_factory.mktemp("full"), tiny_llama3)
    runs.run("one")
    return runs


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, tiny_llama3: Path) -> Runs:
    runs = runs_in(tmp_path_factory.mktemp("lora"), tiny_llama3, **LORA)
    runs.run("one")
    return runs


@pytest.mark.parametrize(
    ("name", "ranks", "more"),
    [
        ("two", 2, ()),
        ("four", 4, ()),
        ("copies", 4, ("--dp-replicate-size", "2", "--dp-shard-size", "2")),
        ("recomputed", 2, ("--gradient-checkpointing", "true")),
    ],
)
def test_all_weights_train_as_in_one_process(
    full: Runs, name: str, ranks: int, more: tuple[str, ...]
) -> None:
    said = sharded(full, name, ranks, *more)
    assert said.count("step 6/6") == 1
    parts = "in 2 parts, 2 copies" if "--dp-replicate-size" in more else f"in {ranks} parts"
    assert f"FSDP2: each weight {parts}" in said
    assert furthest(full.losses("one"), full.losses(name)) < 1e-5
    assert furthest(full.weights("one"), full.weights(name)) < 1e-4


@pytest.mark.parametrize("ranks", [2, 4])
def test_an_adapter_trains_as_in_one_process(lora: Runs, ranks: int) -> None:
    sharded(lora, f"ranks{ranks}", ranks)
    assert furthest(lora.losses("one"), lora.losses(f"ranks{ranks}")) < 1e-5
    assert furthest(lora.weights("one"), lora.weights(f"ranks{ranks}")) < 1e-4


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("ranks", [2, 4, 1])
def test_a_run_of_two_processes_goes_on_with_any_number(
    kind: str, ranks: int, request: pytest.FixtureRequest
) -> None:
    runs: Runs = request.getfixturevalue(kind)
    name = "two" if kind == "full" else "ranks2"
    checkpoint = runs.folder / name / "checkpoint-3"
    if not checkpoint.exists():
        sharded(runs, name, 2)
    shards = () if ranks == 1 else ("fsdp.yml",)
    found_in = f"from{ranks}"
    runs.run(
        found_in,
        *shards,
        *("--num-processes", str(ranks), "--gradient-accumulation-steps", "2"),
        *("--resume-from-checkpoint", str(checkpoint)),
    )
    whole = {k: v for k, v in runs.losses(name).items() if k[-1] in "456"}
    found = {k: v for k, v in runs.losses(found_in).items() if k in whole}
    if ranks == 2:
        assert furthest(whole, found) == 0
        assert furthest(runs.weights(name), runs.weights(found_in)) == 0
    else:
        assert furthest(whole, found) < 1e-5
        assert furthest(runs.weights(name), runs.weights(found_in)) < 1e-4


def test_a_rank_that_dies_while_saving_leaves_the_last_checkpoint(full: Runs) -> None:
    arguments = ("fsdp.yml", "--num-processes", "2", "--gradient-accumulation-steps", "2")
    said = full.run("died", *arguments, "--plugins", "[midsave]", code=1, MIDSAVE="kill:1:6")
    assert "rank 1 with SIGKILL" in said
    (kept,) = (full.folder / "died").glob("checkpoint-*")
    assert kept.name == "checkpoint-3"
    assert damage(kept) is None
    full.run("died", *arguments, "--plugins", "[midsave]", "--auto-resume-from-checkpoints", "true")
    full.run("whole", *arguments, "--plugins", "[midsave]")
    assert furthest(full.weights("whole"), full.weights("died")) == 0


def test_a_full_disk_of_one_rank_costs_a_checkpoint_and_no_run(full: Runs) -> None:
    said = full.run(
        "full",
        *("fsdp.yml", "--num-processes", "2", "--gradient-accumulation-steps", "2"),
        *("--plugins", "[midsave]"),
        MIDSAVE="full:1:3",
    )
    assert "The checkpoint of step 3 could not be saved: No space left on device" in said
    assert [c.name for c in (full.folder / "full").glob("checkpoint-*")] == ["checkpoint-6"]
    assert furthest(full.losses("one"), full.losses("full")) < 1e-5


def test_where_a_checkpoint_cannot_be_saved_nothing_is_trained(full: Runs) -> None:
    said = full.run(
        "refused",
        *("fsdp.yml", "--num-processes", "2", "--gradient-accumulation-steps", "2"),
        *("--plugins", "[midsave]"),
        code=2,
        MIDSAVE="full:1:0",
    )
    assert "A checkpoint cannot be saved in" in said
    assert "step 1/6" not in said


def test_parts_and_whole_files_hold_the_same_model(full: Runs) -> None:
    options = {"state_dict_type": "FULL_STATE_DICT", "final_state_dict_type": "SHARDED_STATE_DICT"}
    (full.folder / "other.yml").write_text(
        yaml.safe_dump({"fsdp_config": {f"fsdp_{key}": value for key, value in options.items()}})
    )
    full.run("parts", "other.yml", "--num-processes", "2", "--gradient-accumulation-steps", "2")
    assert not (full.folder / "parts" / "model.safetensors").exists()
    merged = subprocess.run(
        [
            sys.executable,
            "-m",
            "axolotl",
            "merge-sharded-fsdp-weights",
            "config.yml",
            "--output-dir",
            "parts",
        ],
        cwd=full.folder,
        check=False,
        capture_output=True,
        text=True,
    )
    assert merged.returncode == 0, merged.stderr
    last = full.weights("parts/checkpoint-6")
    assert furthest(last, full.weights("parts/merged")) == 0
    assert furthest(last, full.weights("one")) < 1e-4


def test_an_interrupt_saves_once(full: Runs) -> None:
    process = full.start(
        "stopped",
        *("fsdp.yml", "--num-processes", "2", "--max-steps", "100000", "--save-strategy", "no"),
        *("--val-set-size", "0", "--save-steps", "null"),
    )
    log = full.folder / "stopped" / "run.jsonl"
    try:
        eventually(lambda: log.exists() and '"step": 2' in log.read_text(), 180)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 130, said
    (saved,) = (full.folder / "stopped").glob("checkpoint-*")
    assert damage(saved) is None
    assert said.count("To continue:") == 1
