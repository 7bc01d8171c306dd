"""Rows that several processes share: losses, weights and gradients are those of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distributed.runs import HERE, Runs, furthest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_and_its_gradients_are_those_of_whole_rows(ranks: int) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(HERE.parent)!r})\n"
        "from axolotl.distributed.launch import run_processes\n"
        f"sys.exit(run_processes([{str(HERE / 'attending.py')!r}], {ranks}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees") == 7 * ranks


KINDS: dict[str, dict[str, Any]] = {
    "packed": {},
    "rows": {"sample_packing": False, "micro_batch_size": 2, "gradient_accumulation_steps": 2},
    "lora": {
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "gradient_checkpointing": True,
        "fused_kernels": True,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_runs_have_the_losses_of_one_process(tmp_path: Path, tiny_llama3: Path, kind: str) -> None:
    runs = Runs(tmp_path, tiny_llama3, **KINDS[kind])
    runs.run("one")
    steps = KINDS[kind].get("gradient_accumulation_steps", 4)
    for ranks, context in ((2, 2), (4, 4), (4, 2)) if kind == "packed" else ((4, 2),):
        said = runs.run(
            f"{ranks}by{context}",
            *("--num-processes", str(ranks), "--context-parallel-size", str(context)),
            *("--gradient-accumulation-steps", str(steps * context // ranks)),
            timeout=400,
        )
        assert f"{context} share each row" in said
        assert furthest(runs.losses("one"), runs.losses(f"{ranks}by{context}")) < 2e-5
        assert furthest(runs.weights("one"), runs.weights(f"{ranks}by{context}")) < 1e-4
    seen = {
        line["step"]: (line["tokens"], line["trained_tokens"])
        for line in runs.logged("one")
        if "loss" in line
    }
    for line in runs.logged("4by2"):
        assert "loss" not in line or seen[line["step"]] == (line["tokens"], line["trained_tokens"])


def test_rows_are_shared_where_weights_are_too(tmp_path: Path, tiny_llama3: Path) -> None:
    runs = Runs(tmp_path, tiny_llama3, max_steps=3)
    runs.run("one")
    runs.run(
        "two",
        *("--num-processes", "2", "--context-parallel-size", "2"),
        *("--fsdp-version", "2", "--fsdp-config.reshard-after-forward", "true"),
    )
    assert furthest(runs.losses("one"), runs.losses("two")) < 2e-5
    assert furthest(runs.weights("one"), runs.weights("two")) < 1e-4


def test_a_shared_run_goes_on_without_sharing(tmp_path: Path, tiny_llama3: Path) -> None:
    runs = Runs(tmp_path, tiny_llama3)
    runs.run("two", "--num-processes", "2", "--context-parallel-size", "2")
    runs.run("one", "--resume-from-checkpoint", str(tmp_path / "two" / "checkpoint-3"))
    whole = {k: v for k, v in runs.losses("two").items() if k[-1] in "456"}
    assert furthest(whole, {k: v for k, v in runs.losses("one").items() if k in whole}) < 1e-5


def test_heads_that_cannot_be_divided_are_told(tmp_path: Path, tiny_llama3: Path) -> None:
    runs = Runs(tmp_path, tiny_llama3)
    said = runs.run("out", "--num-processes", "3", "--context-parallel-size", "3", code=2)
    assert "config.yml" in said or "--context-parallel-size" in said
    assert "`context_parallel_size: 3`" in said and "Traceback" not in said
