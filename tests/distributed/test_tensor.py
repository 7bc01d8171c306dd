"""Processes that share matrix products: losses and weights of one process, checkpoints, other numbers of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distributed.runs import HERE, Runs, furthest

pytestmark = pytest.mark.slow
LORA: dict[str, Any] = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    "learning_rate": 0.01,
}
ROWS: dict[str, Any] = {"sample_packing": False, "micro_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_are_those_of_whole_matrices(ranks: int) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(HERE.parent)!r})\n"
        "from axolotl.distributed.launch import run_processes\n"
        f"sys.exit(run_processes([{str(HERE / 'dividing.py')!r}], {ranks}))"
    )
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    told = [line for line in done.stdout.splitlines() if line.endswith((": passed", ": failed"))]
    assert len(told) == (16 if ranks == 2 else 8), done.stdout + done.stderr
    assert all(line.endswith(": passed") for line in told), done.stdout + done.stderr


def runs_in(folder: Path, model: Path, **keys: Any) -> Runs:
    # With the usual 1e-8, Adam makes steps of gradients that are nothing but rounding.
    runs = Runs(folder, model, max_grad_norm=1.0, adam_epsilon=1e-5, **keys)
    options = {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}
    (folder / "fsdp.yml").write_text(yaml.safe_dump(options))
    runs.run("one")
    return runs


def sharing(runs: Runs, name: str, ranks: int, *more: str, steps: int = 4, **options: Any) -> str:
    """A run in which two processes each share products, on the global batch of one process."""
    said = runs.run(
        name,
        *more,
        *("--num-processes", str(ranks), "--tensor-parallel-size", "2"),
        *("--gradient-accumulation-steps", str(steps * 2 // ranks)),
        **options,
    )
    assert "2 processes share the products of" in said
    return said


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, tiny_llama3: Path) -> Runs:
    return runs_in(tmp_path_factory.mktemp("full"), tiny_llama3)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, tiny_chatml: Path) -> Runs:
    """Rows side by side, and a head that is the embedding."""
    return runs_in(tmp_path_factory.mktemp("lora"), tiny_chatml, **LORA, **ROWS)


def agrees(runs: Runs, name: str) -> None:
    assert furthest(runs.losses("one"), runs.losses(name)) < 1e-5
    assert furthest(runs.weights("one"), runs.weights(name)) < 1e-4
    seen = [
        [(each.get("tokens"), each.get("trained_tokens")) for each in runs.logged(n)] for n in ("one", name)
    ]
    assert seen[0] == seen[1]


def test_all_weights_train_as_in_one_process(full: Runs) -> None:
    sharing(full, "two", 2)
    agrees(full, "two")


def test_all_weights_train_divided_twice(full: Runs) -> None:
    said = sharing(full, "four", 4, "fsdp.yml")
    assert "FSDP2: each weight in 2 parts" in said
    agrees(full, "four")


def test_an_adapter_trains_as_in_one_process(lora: Runs) -> None:
    sharing(lora, "two", 2, steps=2)
    agrees(lora, "two")


def test_an_adapter_trains_in_copies_of_a_group(lora: Runs) -> None:
    sharing(lora, "copies", 4, "--gradient-checkpointing", "true", steps=2)
    agrees(lora, "copies")


def test_rows_and_products_are_shared(full: Runs) -> None:
    full.run(
        "both",
        *("--num-processes", "4", "--tensor-parallel-size", "2", "--context-parallel-size", "2"),
        *("--max-steps", "6", "--fused-kernels", "true"),
    )
    agrees(full, "both")


@pytest.mark.parametrize(
    ("kind", "way"),
    [("full", "same"), ("full", "sharded"), ("full", "one"), ("lora", "same"), ("lora", "one")],
)
def test_a_run_goes_on_divided_otherwise(kind: str, way: str, request: pytest.FixtureRequest) -> None:
    runs: Runs = request.getfixturevalue(kind)
    steps = 4 if kind == "full" else 2
    checkpoint = runs.folder / "two" / "checkpoint-3"
    if not checkpoint.exists():
        sharing(runs, "two", 2, steps=steps)
    go_on = ("--resume-from-checkpoint", str(checkpoint))
    if way == "same":
        sharing(runs, way, 2, *go_on, steps=steps)
    else:
        ranks = ("fsdp.yml", "--num-processes", "2") if way == "sharded" else ()
        runs.run(way, *ranks, *go_on, "--gradient-accumulation-steps", str(steps // (2 if ranks else 1)))
    whole = {k: v for k, v in runs.losses("two").items() if k[-1] in "456"}
    found = {k: v for k, v in runs.losses(way).items() if k in whole}
    limits = (0.0, 0.0) if way == "same" else (1e-5, 1e-4)
    assert furthest(whole, found) <= limits[0]
    assert furthest(runs.weights("two"), runs.weights(way)) <= limits[1]


def test_a_rank_that_dies_while_saving_leaves_the_last_checkpoint(full: Runs) -> None:
    said = full.run(
        "died",
        *("--num-processes", "2", "--tensor-parallel-size", "2", "--plugins", "[midsave]"),
        code=1,
        MIDSAVE="kill:1:6",
    )
    assert "rank 1 with SIGKILL" in said
    assert [each.name for each in (full.folder / "died").glob("checkpoint-*")] == ["checkpoint-3"]
    sharing(full, "died", 2, "--auto-resume-from-checkpoints", "true")
    assert furthest(full.weights("one"), full.weights("died")) < 1e-4


def test_what_cannot_be_divided_is_told_before_anything_is_loaded(full: Runs) -> None:
    said = full.run("refused", "--num-processes", "4", "--tensor-parallel-size", "4", code=2)
    assert "`tensor_parallel_size: 4`: the model has 2 key/value heads" in said
    assert "Choose 2, or delete the line." in said
    assert "Traceback" not in said
