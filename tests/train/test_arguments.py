"""The table from config keys to transformers' arguments."""

from __future__ import annotations

import dataclasses

import pytest

from axolotl.config import Config, Hardware, resolve
from axolotl.config.keys import owners
from axolotl.config.train import TrainSection
from axolotl.data.packing import Volume
from axolotl.errors import EnvironmentProblem
from axolotl.train.arguments import FIXED, TABLE, argument_names, best_metric, build_arguments, check
from axolotl.train.tracking import trackers, tracking_environment
from train.miniature import CPU

VOLUME = Volume(10, 5, 15, 3.0, 1000, 1.0)


def build(cfg, **options):
    return build_arguments(cfg, VOLUME, CPU, **{"has_eval_data": True, **options})


def test_every_key_of_the_table_belongs_to_a_section_and_becomes_a_known_argument():
    assert {row.key for row in TABLE} <= set(owners())
    assert all(set(row.arguments) & argument_names() for row in TABLE)


def test_values_arrive(config):
    keys = {
        "micro_batch_size": 3,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 0.5,
        "seed": 7,
        "logging_steps": 5,
        "neftune_noise_alpha": 2.0,
    }
    args, _ = build(config(**keys))
    assert args.per_device_train_batch_size == 3
    assert args.gradient_accumulation_steps == 4
    assert (args.max_grad_norm, args.seed, args.data_seed, args.logging_steps) == (0.5, 7, 7, 5)
    assert args.neftune_noise_alpha == 2.0
    assert args.max_steps == 15
    assert args.use_cpu


def test_defaults_are_ours(config):
    args, _ = build(config(save_strategy=None))
    assert args.logging_steps == 1
    assert args.max_grad_norm == 1.0
    assert args.report_to == []
    assert not args.logging_nan_inf_filter
    assert not args.bf16
    assert args.eval_on_start


def test_resuming_does_not_evaluate_again_at_the_start(config):
    assert not build(config(), resuming=True)[0].eval_on_start


def test_the_evaluation_before_the_first_step_can_be_left_out(config):
    assert build(config(evals_per_epoch=4, eval_on_start=True))[0].eval_on_start
    args, cadence = build(config(evals_per_epoch=4, eval_on_start=False))
    assert not args.eval_on_start
    assert cadence.evaluate


def test_without_eval_data_there_is_no_evaluation(config):
    args, cadence = build(config(evals_per_epoch=4), has_eval_data=False)
    assert str(args.eval_strategy.value) == "no"
    assert not cadence.evaluate


def test_best_model(config):
    args, cadence = build(
        config(load_best_model_at_end=True, evals_per_epoch=1, saves_per_epoch=1, save_strategy=None)
    )
    assert args.load_best_model_at_end
    assert args.metric_for_best_model == "eval_loss"
    assert args.greater_is_better is False
    assert cadence.evaluate <= cadence.save
    # What cannot be had is not asked for.
    assert not build(config(load_best_model_at_end=True, evals_per_epoch=1), has_eval_data=False)[
        0
    ].load_best_model_at_end


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, ("eval_loss", False)),
        ({"metric_for_best_model": "ppl"}, ("eval_ppl", False)),
        ({"metric_for_best_model": "eval_accuracy"}, ("eval_accuracy", True)),
        ({"metric_for_best_model": "accuracy", "greater_is_better": False}, ("eval_accuracy", False)),
    ],
)
def test_which_figure_is_best(config, keys, expected):
    assert best_metric(config(**keys).train) == expected


def test_an_argument_that_this_version_lacks_is_left_out(config):
    @dataclasses.dataclass
    class Old:
        output_dir: str
        max_steps: int
        max_grad_norm: float = 1.0

    args, _ = build(config(max_grad_norm=0.5), arguments_class=Old)
    assert args == Old(str(config().output.output_dir), 15, 0.5)
    assert "save_safetensors" in FIXED


def test_trackers_are_asked_for_by_name(config, tmp_path):
    cfg = config(use_tensorboard=True)
    assert trackers(cfg.tracking) == ["tensorboard"]
    assert tracking_environment(cfg.tracking, cfg.output) == {
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "out" / "runs")
    }
    assert trackers(config().tracking) == []


def test_missing_trackers_are_told_together(config, monkeypatch):
    monkeypatch.setattr("axolotl.registry.importlib.util.find_spec", lambda name: None)
    cfg = config(wandb_project="p", mlflow_experiment_name="m", wandb_entity="e")
    with pytest.raises(EnvironmentProblem) as error:
        trackers(cfg.tracking)
    assert [p.message.split("`")[1] for p in error.value.problems] == ["wandb", "mlflow"]
    environment = tracking_environment(cfg.tracking, cfg.output)
    assert environment["WANDB_PROJECT"] == "p"
    assert environment["WANDB_ENTITY"] == "e"


@pytest.mark.parametrize(
    ("keys", "told", "remedy"),
    [
        ({"accelerator_config": {"nope": 1}}, "accelerator_config.nope", "split_batches"),
        (
            {"gradient_checkpointing_kwargs": {"use_rentrant": False}},
            "gradient_checkpointing_kwargs.use_rentrant",
            "`use_reentrant`",
        ),
        ({"torch_compile_backend": "inducter"}, "torch_compile_backend", "`inductor`"),
        ({"metric_for_best_model": "foo"}, "metric_for_best_model", ""),
    ],
)
def test_options_that_no_library_knows_are_told(keys, told, remedy):
    [problem] = check(TrainSection.model_validate(keys))
    assert problem.keys == (told,)
    assert remedy in problem.remedy


def test_options_that_are_known_are_no_problem():
    keys = {
        "accelerator_config": {"split_batches": True, "dispatch_batches": False},
        "gradient_checkpointing_kwargs": {"use_reentrant": False, "preserve_rng_state": True},
        "torch_compile_backend": "inductor",
        "metric_for_best_model": "eval_loss",
    }
    assert list(check(TrainSection.model_validate(keys))) == []


@pytest.mark.parametrize(("device", "on"), [("cuda", True), ("cpu", False)])
def test_compiling_by_itself_is_for_gpus(device, on):
    cfg = Config(train=TrainSection(torch_compile="auto"))
    assert resolve(cfg, Hardware(device=device))[0].train.torch_compile is on
