"""Optimizers of the optional packages, for real: each learns, and goes on from a checkpoint as if it had not stopped."""

from __future__ import annotations

import pytest
import torch

from axolotl.errors import EnvironmentProblem
from axolotl.optim.registry import optimizers
from axolotl.train.session import train
from train.miniature import losses, rows, same_weights, tiny_model, weights

pytestmark = pytest.mark.extras

FACTS = {name: optimizers.describe(name).facts for name in optimizers.names()}
OPTIONAL = sorted(name for name, facts in FACTS.items() if "extra" in facts)
ON_GPUS = {"paged_ademamix_32bit", "paged_ademamix_8bit"}


@pytest.mark.parametrize("background", [False, True], ids=["", "save_async"])
@pytest.mark.parametrize("name", [name for name in OPTIONAL if name not in ON_GPUS])
def test_it_runs_and_resumes_bit_for_bit(trainer, name, background):
    keys = {
        "optimizer": name,
        # In 8-bit floats small second moments become 0, and steps large.
        "learning_rate": 1e-4 if name == "ao_adamw_fp8" else 3e-3,
        "num_epochs": 2,
        "save_steps": 5,
        "save_strategy": "steps",
        "save_async": background,
        "evals_per_epoch": 2,
        "warmup_steps": 1,
    }
    # The largest matrices have more than 4096 numbers, from which on bitsandbytes keeps eight bits.
    run = trainer(tiny_model(), rows(12), rows(3, seed=5), **keys)
    before = weights(run.model)
    assert train(run, run.cfg).complete
    assert not same_weights(before, weights(run.model))
    assert losses(run)[-1] < losses(run)[0]
    folder = run.parts.output_dir / "checkpoint-5"
    again = trainer(tiny_model(seed=9), rows(12), rows(3, seed=5), folder, **keys)
    assert train(again, again.cfg, folder).complete
    assert losses(again) == losses(run)
    assert same_weights(weights(again.model), weights(run.model))


def test_eight_bits_are_eight_bits(trainer):
    run = trainer(tiny_model(), rows(8), optimizer="adamw_8bit", learning_rate=1e-3)
    train(run, run.cfg)
    states = [s for s in run.optimizer.optimizer.state.values() if "state1" in s]
    kinds = {s["state1"].dtype for s in states}
    assert kinds <= {torch.uint8, torch.float32}


@pytest.mark.parametrize("name", sorted(ON_GPUS))
def test_what_needs_a_gpu_says_so_before_the_first_step(trainer, name):
    run = trainer(tiny_model(), rows(8), optimizer=name)
    with pytest.raises(EnvironmentProblem, match="needs a GPU"):
        train(run, run.cfg)
    assert losses(run) == []
