"""One, two and four processes with real training: the same losses and weights, resuming, signals, deaths."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from axolotl.train.checkpoint import damage
from distributed.runs import Runs, eventually, furthest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny_llama3: Path) -> Runs:
    """All weights, packed rows; `one` has been run by one process."""
    runs = Runs(tmp_path_factory.mktemp("packed"), tiny_llama3)
    runs.run("one")
    return runs


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_and_weights_are_those_of_one_process(packed: Runs, ranks: int) -> None:
    name = f"ranks{ranks}"
    said = packed.run(name, "--num-processes", str(ranks), "--gradient-accumulation-steps", str(4 // ranks))
    assert f"× {ranks} processes" in said
    assert said.count("step 6/6") == 1
    assert furthest(packed.losses("one"), packed.losses(name)) < 1e-5
    assert furthest(packed.weights("one"), packed.weights(name)) < 1e-4


@pytest.mark.parametrize("ranks", [2, 1, 4])
def test_a_run_of_two_processes_goes_on_with_any_number(packed: Runs, ranks: int) -> None:
    checkpoint = packed.folder / "ranks2" / "checkpoint-3"
    if not checkpoint.exists():
        packed.run("ranks2", "--num-processes", "2", "--gradient-accumulation-steps", "2")
    name = f"on{ranks}"
    said = packed.run(
        name,
        *("--num-processes", str(ranks), "--gradient-accumulation-steps", "2"),
        *("--resume-from-checkpoint", str(checkpoint)),
    )
    whole = {k: v for k, v in packed.losses("ranks2").items() if k[-1] in "456"}
    found = {k: v for k, v in packed.losses(name).items() if k in whole}
    if ranks == 2:
        assert furthest(whole, found) == 0
        assert furthest(packed.weights("ranks2"), packed.weights(name)) == 0
    else:
        assert f"gradient_accumulation_steps 2 → {4 // ranks}" in said
        assert furthest(whole, found) < 1e-5


def test_ranks_without_rows_and_without_packing(tmp_path: Path, tiny_llama3: Path) -> None:
    # 21 rows in batches of 3 over 2 ranks: at the end of an epoch one rank has nothing to do.
    runs = Runs(
        tmp_path,
        tiny_llama3,
        adapter="lora",
        lora_r=4,
        lora_alpha=8,
        lora_target_linear=True,
        sample_packing=False,
        micro_batch_size=3,
        gradient_accumulation_steps=2,
        val_set_size=0.65,
        max_steps=8,
        save_steps=None,
        save_strategy="no",
    )
    runs.run("one")
    runs.run("two", "--num-processes", "2", "--gradient-accumulation-steps", "1")
    assert furthest(runs.losses("one"), runs.losses("two")) < 1e-5
    assert furthest(runs.weights("one"), runs.weights("two")) < 1e-4


@pytest.fixture
def long(tmp_path: Path, tiny_llama3: Path) -> Runs:
    """A run that does not end by itself."""
    return Runs(tmp_path, tiny_llama3, max_steps=100_000, save_steps=None, save_strategy="no", val_set_size=0)


def _running(runs: Runs, name: str) -> Callable[[], bool]:
    log = runs.folder / name / "run.jsonl"
    return lambda: log.exists() and '"step": 2' in log.read_text()


def test_an_interrupt_saves_once_and_ends_all(long: Runs) -> None:
    process = long.start("out", "--num-processes", "2")
    try:
        eventually(_running(long, "out"), 120)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    (saved,) = (long.folder / "out").glob("checkpoint-*")
    assert damage(saved) is None
    assert {f.name for f in saved.glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert said.count("finishing this step") == 1
    assert said.count("To continue:") == 1
    assert f"--resume-from-checkpoint {saved.relative_to(long.folder)} --num-processes 2\n" in said.replace(
        f"{long.folder}/", ""
    )


def test_an_error_of_one_rank_ends_all_and_is_told_with_its_rank(long: Runs) -> None:
    said = long.run("out", "--num-processes", "2", "--plugins", "[accident]", code=1, ACCIDENT="raise:1:2")
    assert said.count("Traceback") == 1
    assert "On rank 1:" in said
    assert "ArithmeticError: on purpose" in said


def test_a_rank_that_dies_is_named_and_its_checkpoints_stay(long: Runs) -> None:
    arguments = (
        "--num-processes",
        "2",
        "--plugins",
        "[accident]",
        "--save-strategy",
        "steps",
        "--save-steps",
        "2",
    )
    said = long.run("out", *arguments, code=1, ACCIDENT="kill:1:5")
    assert "the process of rank 1 with SIGKILL" in said and "AX1405" in said
    assert "Traceback" not in said
    assert damage(max((long.folder / "out").glob("checkpoint-*"))) is None


@pytest.mark.parametrize("trial", range(3))
def test_torchrun_starts_again_and_goes_on(packed: Runs, trial: int) -> None:
    if not (packed.folder / "ranks2" / "run.jsonl").exists():
        packed.run("ranks2", "--num-processes", "2", "--gradient-accumulation-steps", "2")
    rank, step = trial % 2, 4 + trial % 2
    said = packed.run(
        f"again{trial}",
        *("--plugins", "[accident]", "--gradient-accumulation-steps", "2", "--launcher", "torchrun"),
        *("--", "--nproc-per-node", "2", "--max-restarts", "1"),
        ACCIDENT=f"kill:{rank}:{step}",
    )
    assert "Started again by the launcher after a failure" in said
    assert "checkpoint-3" in said
    assert furthest(packed.losses("ranks2"), packed.losses(f"again{trial}")) == 0
    assert furthest(packed.weights("ranks2"), packed.weights(f"again{trial}")) == 0


def test_an_error_before_training_is_told_once(long: Runs) -> None:
    (long.folder / "rows.jsonl").write_text("not json\n")
    said = long.run("out", "--num-processes", "2", code=2)
    assert said.count("rows.jsonl") == 1
    assert "Traceback" not in said


def test_accelerate_can_start_it(packed: Runs) -> None:
    packed.run(
        "accelerated",
        *("--launcher", "accelerate", "--", "--cpu", "--num_processes", "1", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    )
    assert furthest(packed.losses("one"), packed.losses("accelerated")) == 0


def test_options_that_a_launcher_does_not_know_are_errors(packed: Runs) -> None:
    for launcher in ("torchrun", "accelerate"):
        said = packed.run("none", "--launcher", launcher, "--", "--no-such-option=1", code=2)
        assert "--no-such-option" in said


def test_no_process_is_left(packed: Runs) -> None:
    mine = str(packed.folder)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            assert os.readlink(folder / "cwd") != mine, (folder / "cmdline").read_bytes()
        except OSError:
            continue
