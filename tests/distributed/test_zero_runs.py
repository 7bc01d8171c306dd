"""DeepSpeed on CPUs: the losses and weights of one process, resuming, saving, errors. Stage 3 is seen to divide weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from axolotl.distributed.zero import SHIPPED
from axolotl.train.checkpoint import damage
from distributed.runs import Runs, furthest

pytestmark = [pytest.mark.slow, pytest.mark.extras]
TWO = ("--num-processes", "2", "--gradient-accumulation-steps", "2")
# The first run on a machine compiles a part of DeepSpeed.
LONG = 600
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}


def with_configs(folder: Path, model: Path, **keys: Any) -> Runs:
    runs = Runs(folder, model, **keys)
    for file in SHIPPED.glob("*.json"):
        (folder / file.name).write_text(file.read_text())
    return runs


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny_llama3: Path) -> Runs:
    """All weights, packed rows; `one` has been run by one process without DeepSpeed."""
    runs = with_configs(tmp_path_factory.mktemp("zero"), tiny_llama3)
    runs.run("one", timeout=LONG)
    return runs


def parts(runs: Runs, name: str, step: int, what: str) -> list[Path]:
    return sorted((runs.folder / name / f"checkpoint-{step}" / f"global_step{step}").glob(f"*{what}*.pt"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_and_weights_are_those_of_one_process(packed: Runs, stage: int) -> None:
    name = f"zero{stage}"
    said = packed.run(name, *TWO, "--deepspeed", f"zero{stage}.json", timeout=LONG)
    assert "× 2 processes" in said and "Warning" not in said
    assert furthest(packed.losses("one"), packed.losses(name)) < 1e-5
    assert furthest(packed.weights("one"), packed.weights(name)) < 1e-4
    # Each process has saved its own part, and the states are divided: together as large as those of one.
    states = parts(packed, name, 3, "optim_states")
    assert len(states) == 2
    sizes = [file.stat().st_size for file in states]
    whole = (packed.folder / "one" / "checkpoint-3" / "optimizer.pt").stat().st_size
    assert max(sizes) < 0.9 * whole
    assert len(parts(packed, name, 3, "model_states")) == (2 if stage == 3 else 1)
    assert damage(packed.folder / name / "checkpoint-3") is None


@pytest.mark.parametrize("stage", [2, 3])
def test_resuming_is_exact(packed: Runs, stage: int) -> None:
    before, after = f"zero{stage}", f"again{stage}"
    zero = ("--deepspeed", f"zero{stage}.json")
    if not (packed.folder / before / "checkpoint-3").exists():
        packed.run(before, *TWO, *zero, timeout=LONG)
    checkpoint = packed.folder / before / "checkpoint-3"
    packed.run(after, *TWO, *zero, "--resume-from-checkpoint", str(checkpoint), timeout=LONG)
    wanted = {k: v for k, v in packed.losses(before).items() if k[-1] in "456"}
    assert furthest(wanted, {k: v for k, v in packed.losses(after).items() if k in wanted}) == 0
    assert furthest(packed.weights(before), packed.weights(after)) == 0


def test_a_run_that_was_broken_off_after_its_last_step_is_finished(packed: Runs) -> None:
    name = "zero3"
    if not (packed.folder / name / "checkpoint-6").exists():
        packed.run(name, *TWO, "--deepspeed", "zero3.json", timeout=LONG)
    wanted = packed.weights(name)
    checkpoint = shutil.copytree(
        packed.folder / name / "checkpoint-6", packed.folder / "end" / "checkpoint-6"
    )
    resume = ("--resume-from-checkpoint", str(checkpoint))
    packed.run("end", *TWO, "--deepspeed", "zero3.json", *resume, timeout=LONG)
    assert furthest(wanted, packed.weights("end")) == 0


def test_checkpoints_that_do_not_fit_are_told(packed: Runs) -> None:
    resume = ("--resume-from-checkpoint", str(packed.folder / "zero2" / "checkpoint-3"))
    if not (packed.folder / "zero2" / "checkpoint-3").exists():
        packed.run("zero2", *TWO, "--deepspeed", "zero2.json", timeout=LONG)
    said = packed.run("none", *TWO, *resume, code=2, timeout=LONG)
    assert "the config has no `deepspeed`" in said
    said = packed.run("none", *TWO, "--deepspeed", "zero3.json", *resume, code=2, timeout=LONG)
    assert "stage 1 or 2" in said and "Traceback" not in said
    four = ("--num-processes", "4", "--gradient-accumulation-steps", "1", "--deepspeed", "zero2.json")
    said = packed.run("none", *four, *resume, code=2, timeout=LONG)
    assert "the parts of 2 processes" in said and said.count("error:") == 1


def test_four_processes_and_an_adapter(tmp_path: Path, tiny_llama3: Path) -> None:
    runs = with_configs(tmp_path, tiny_llama3, sample_packing=False, **LORA)
    runs.run("one", timeout=LONG)
    four = ("--num-processes", "4", "--gradient-accumulation-steps", "1")
    for stage in (2, 3):
        runs.run(f"zero{stage}", *four, "--deepspeed", f"zero{stage}.json", timeout=LONG)
        assert furthest(runs.losses("one"), runs.losses(f"zero{stage}")) < 1e-5
        assert furthest(runs.weights("one"), runs.weights(f"zero{stage}")) < 1e-4


def test_bf16_trains_float32_copies(packed: Runs) -> None:
    said = packed.run("bf16", *TWO, "--bf16", "true", "--deepspeed", "zero3_bf16.json", timeout=LONG)
    assert "Traceback" not in said
    # bfloat16 has 8 bits: the course is that of float32 to about a hundredth.
    assert furthest(packed.losses("one"), packed.losses("bf16")) < 0.1
    assert {weight.dtype for weight in packed.weights("bf16").values()} == {torch.bfloat16}
    state = torch.load(parts(packed, "bf16", 3, "optim_states")[0], weights_only=False)
    copies = state["optimizer_state_dict"]["fp32_flat_groups"]
    assert copies and all(each.dtype == torch.float32 for each in copies)


def test_weights_that_checkpoints_do_without_are_saved_at_the_end(packed: Runs) -> None:
    config = json.loads((SHIPPED / "zero3.json").read_text())
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    (packed.folder / "lean.json").write_text(json.dumps(config))
    packed.run("lean", *TWO, "--deepspeed", "lean.json", timeout=LONG)
    assert not list((packed.folder / "lean" / "checkpoint-3").glob("*.safetensors"))
    assert furthest(packed.weights("one"), packed.weights("lean")) < 1e-4


def test_a_rank_that_dies_leaves_its_checkpoints(packed: Runs) -> None:
    arguments = (*TWO, "--deepspeed", "zero2.json", "--plugins", "[accident]", "--save-steps", "2")
    said = packed.run("dies", *arguments, code=1, timeout=LONG, ACCIDENT="kill:1:5")
    assert "the process of rank 1 with SIGKILL" in said
    assert damage(max((packed.folder / "dies").glob("checkpoint-*"))) is None


def test_one_process_is_told_which_line_to_delete(packed: Runs) -> None:
    said = packed.run("alone", "--deepspeed", "zero2.json", code=2, timeout=LONG)
    assert "Delete the line `deepspeed:`" in said
    assert "mpi4py" not in said and "Traceback" not in said
