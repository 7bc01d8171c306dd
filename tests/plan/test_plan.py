"""`axolotl plan`: the real command, what fits, the file it writes, automatic values, steps, layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml

from axolotl.config import Config, Hardware, resolve
from axolotl.config.edit import edited
from axolotl.data.prepare import prepare
from axolotl.data.survey import find_prepared, sample
from axolotl.errors import ConfigError, EnvironmentProblem
from axolotl.model.tokenizer import load_tokenizer
from axolotl.plan.auto import fitted
from axolotl.plan.check import load_config
from axolotl.plan.fit import batches, changed
from axolotl.plan.gpus import GIB, gpu, gpu_called, gpu_names, hardware_of
from axolotl.plan.layout import Layout, layout_of
from axolotl.plan.rehearsal import Batch
from axolotl.plan.show import table
from axolotl.plan.steps import Course, course_of, rows_of, shapes_without_data
from axolotl.plan.whole import Plan, Question, changes, plan_run, question
from axolotl.run.memory import free_memory
from axolotl.train.build import attention_for
from scripts import script

write_model = script("geometries").write_model
Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def rows(write_jsonl: Any) -> Path:
    talk = [
        {
            "messages": [
                {"role": "user", "content": "why " * (3 + i % 7)},
                {"role": "assistant", "content": "so " * (2 + i % 11)},
            ]
        }
        for i in range(120)
    ]
    path: Path = write_jsonl("data.jsonl", talk)
    return path


@pytest.fixture
def write(tmp_path: Path, rows: Path, tiny_llama3: Path) -> Callable[..., Path]:
    """write(model="llama-8b", **keys) → a config file for a geometry without weights, or for the tiny model."""

    def make(model: str = "", **keys: Any) -> Path:
        base = write_model(model, tmp_path / model, tiny_llama3) if model else tiny_llama3
        values: dict[str, Any] = {
            "base_model": str(base),
            "datasets": [{"path": str(rows), "type": "chat_template"}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "out"),
            "learning_rate": 1e-4,
            "sequence_len": 512,
            "bf16": "auto",
        }
        file = tmp_path / "config.yml"
        file.write_text(yaml.safe_dump(values | keys, sort_keys=False), encoding="utf-8")
        return file

    return make


LORA = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True}


def planned(file: Path, name: str = "h200", gpus: int | None = None, memory: int = 0, **options: Any) -> Plan:
    chosen = gpu(name)
    hardware = hardware_of(chosen, gpus or 1, 2)
    cfg, _ = resolve(load_config(file, verb="plan"), hardware)
    asked, why = question(cfg, chosen, hardware, gpus=gpus, tokenizer=load_tokenizer(cfg.model))
    return plan_run(asked, memory or chosen.memory, why, **options)


def test_the_command_as_json(axolotl: Run, write: Callable[..., Path], tmp_path: Path) -> None:
    file = write("llama-1b", micro_batch_size=2, gradient_accumulation_steps=2, num_epochs=3, val_set_size=20)
    done = axolotl("plan", file, "--gpu", "h200", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] and found["quality"] == "measured card"
    assert found["parameters"]["trained"] == found["parameters"]["total"] == 1235814400
    parts = found["memory"]["training"]["bytes"]
    assert parts["weights"] == pytest.approx(2 * 1235814400, rel=0.001)
    assert parts["optimizer"] == pytest.approx(4 * 1235814400, rel=0.001)
    assert (
        sum(v for k, v in parts.items() if k not in ("fragmentation", "cuda_context"))
        == found["memory"]["training"]["allocated"]
    )
    assert found["steps"] == {
        "exact": True,
        "total": 75,
        "per_epoch": 25,
        "epochs": 3.0,
        "tokens_per_epoch": found["steps"]["tokens_per_epoch"],
        "rows": 100,
        "trained_share": found["steps"]["trained_share"],
    }
    assert found["evaluations"] == 4 and found["memory"]["evaluation"]["needed"] > 0
    assert not (tmp_path / "prepared").exists() and not (tmp_path / "out").exists(), "a plan writes nothing"


@pytest.mark.slow
def test_the_table_and_the_exit_code(axolotl: Run, write: Callable[..., Path]) -> None:
    done = axolotl("plan", write(**LORA), "--gpu", "4090")
    assert done.returncode == 0, done.stderr
    assert "(estimate)" in done.stdout and "trained of" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("fits on NVIDIA GeForce RTX 4090: needs ")


@pytest.mark.slow
def test_without_a_gpu_and_without_a_name(axolotl: Run, write: Callable[..., Path]) -> None:
    done = axolotl("plan", write())
    assert done.returncode == 2 and "--gpu h200" in done.stderr
    wrong = axolotl("plan", write(), "--gpu", "h20")
    assert wrong.returncode == 2 and "Did you mean `h200`?" in wrong.stderr


@pytest.mark.slow
def test_what_does_not_fit_is_made_to_fit(axolotl: Run, write: Callable[..., Path]) -> None:
    """3B in full needs far more than 24 GiB; the first proposal is written, and then it fits."""
    file = write("llama-1b", micro_batch_size=8, sequence_len=2048, pad_to_sequence_len=True)
    before = file.read_text()
    done = axolotl("plan", file, "--gpu", "4090", "--write")
    assert done.returncode == 1, done.stderr
    assert "does not fit on NVIDIA GeForce RTX 4090" in done.stdout
    assert "fastest first" in done.stdout and "+++ config.yml" in done.stdout
    after = yaml.safe_load(file.read_text())
    assert file.read_text() != before
    rows = after.get("micro_batch_size", 8) * after.get("gradient_accumulation_steps", 1)
    assert rows == 8, "a step keeps its rows"
    again = axolotl("plan", file, "--gpu", "4090", "--json")
    assert again.returncode == 0, again.stdout
    assert json.loads(again.stdout)["fits"]


@pytest.mark.slow
def test_proposals_are_ranked_and_each_fits(write: Callable[..., Path]) -> None:
    file = write("llama-1b", **LORA, micro_batch_size=8, sequence_len=2048, pad_to_sequence_len=True)
    memory = 12 * GIB
    found = planned(file, memory=memory)
    assert not found.fits and found.changes
    assert all(c.needed <= memory for c in found.changes)
    costs = [round(c.seconds / found.needs.step.total, 1) for c in found.changes]
    assert costs == sorted(costs)
    assert not any(c.shortens for c in found.changes), "shorter rows come only where nothing else helps"


@pytest.mark.slow
def test_shorter_rows_come_last(write: Callable[..., Path]) -> None:
    keys = {"gradient_checkpointing": True, "sequence_len": 32768, "pad_to_sequence_len": True}
    smallest = planned(write("llama-1b", **(LORA | {"adapter": "qlora"}), load_in_4bit=True, **keys))
    found = planned(write("llama-1b", **LORA, **keys), memory=int(0.95 * smallest.needs.needed))
    assert not found.fits
    assert found.changes and all(c.shortens for c in found.changes)


@pytest.mark.slow
def test_free_memory_is_used(write: Callable[..., Path]) -> None:
    keys = {"gradient_checkpointing": True, "micro_batch_size": 1, "gradient_accumulation_steps": 4}
    file = write("llama-1b", **LORA, **keys, sequence_len=1024, pad_to_sequence_len=True)
    found = planned(file, faster=True)
    assert found.fits and found.changes
    assert found.changes[0].cost < -0.1
    assert found.changes[0].values["gradient_checkpointing"] is False


def test_nothing_fits(write: Callable[..., Path]) -> None:
    file = write("llama-8b")
    cfg, _ = resolve(load_config(file, verb="plan"), hardware_of(gpu("t4"), 1, 1))
    asked, _ = question(cfg, gpu("t4"), hardware_of(gpu("t4"), 1, 1))
    assert changes(asked, gpu("t4").memory, None) == []


# Automatic values


def automatic(file: Path, memory: int, name: str = "h200") -> Config:
    chosen = gpu(name)
    return fitted(load_config(file), chosen, hardware_of(chosen, 1, 2), memory)


@pytest.mark.slow
def test_an_automatic_batch_keeps_the_rows_of_a_step(write: Callable[..., Path]) -> None:
    file = write("llama-1b", **LORA, micro_batch_size="auto", batch_size=12, sequence_len=2048)
    small, large = automatic(file, 14 * GIB), automatic(file, 130 * GIB)
    for cfg in (small, large):
        assert cfg.train.rows_at_once * cfg.train.gradient_accumulation_steps == 12
        assert "fits" in cfg.resolved["micro_batch_size"]
    assert small.train.rows_at_once < large.train.rows_at_once
    again, found = resolve(large, hardware_of(gpu("h200"), 1, 2))
    assert again.train.micro_batch_size == large.train.micro_batch_size
    assert not [r for r in found if r.key == "gradient_accumulation_steps"]


@pytest.mark.slow
def test_automatic_recomputation_only_where_it_has_to_be(write: Callable[..., Path]) -> None:
    keys = {**LORA, "micro_batch_size": 4, "sequence_len": 2048, "pad_to_sequence_len": True}
    all_of, none_of = (
        planned(write("llama-1b", **keys, gradient_checkpointing=way)).needs.needed for way in (True, False)
    )
    assert all_of < none_of
    file = write("llama-1b", **keys, gradient_checkpointing="auto")
    assert automatic(file, 130 * GIB).train.gradient_checkpointing is False
    # The tighter, the more of the sixteen layers.
    sizes = [int(all_of + share * (none_of - all_of)) for share in (0.8, 0.5, 0.2)]
    some = [automatic(file, size).train.gradient_checkpointing for size in sizes]
    assert 0 < some[0] < some[1] < some[2] <= 16 and some[0] is not True
    assert automatic(file, int(all_of + 0.01 * (none_of - all_of))).train.gradient_checkpointing is True
    with pytest.raises(EnvironmentProblem, match=r"nothing fits into 3\.0 GiB"):
        automatic(file, 3 * GIB)


@pytest.mark.slow
def test_automatic_values_train(axolotl: Run, write: Callable[..., Path]) -> None:
    """The real command on this machine: RAM stands for the GPU's memory."""
    file = write(
        **LORA,
        micro_batch_size="auto",
        gradient_accumulation_steps=8,
        gradient_checkpointing="auto",
        max_steps=1,
    )
    done = axolotl("train", file)
    assert done.returncode == 0, done.stderr
    assert "micro_batch_size: 8 (auto: the fastest that fits" in done.stderr
    assert "gradient_checkpointing: false (auto: there is room without" in done.stderr
    saved = yaml.safe_load((file.parent / "out" / "axolotl_config.yml").read_text())
    assert saved["micro_batch_size"] == 8 and saved["gradient_checkpointing"] is False
    done = axolotl("preprocess", file)
    assert done.returncode == 0, done.stderr


# Steps


def test_prepared_data_and_a_sample_say_the_same(write: Callable[..., Path]) -> None:
    file = write(sample_packing=True, micro_batch_size=2, val_set_size=0.1, num_epochs=2)
    hardware = hardware_of(gpu("h200"), 1, 1)
    cfg, _ = resolve(load_config(file), hardware)
    tokenizer = load_tokenizer(cfg.model)
    attention = attention_for(cfg.model, cfg.data, hardware)
    before, held = rows_of(cfg, tokenizer)
    prepare(cfg.data, tokenizer, seed=42, places=cfg.place)
    after, held_after = rows_of(cfg, tokenizer)
    assert (before.source, after.source) == ("whole", "prepared")
    assert held is not None and held_after is not None and len(held.dataset) == len(held_after.dataset) == 12
    one, two = (course_of(cfg, r, attention, 1) for r in (before, after))
    # Which rows are held out differs; their number does not.
    assert one.rows == two.rows == 108
    assert one.volume.total_steps == pytest.approx(two.volume.total_steps, abs=1)
    assert two.exact and two.largest.packed
    assert (two.largest.rows, two.largest.length) == (2, 512)
    assert course_of(cfg, after, attention, 2).volume.steps_per_epoch == pytest.approx(
        two.volume.steps_per_epoch / 2, abs=1
    )


def test_a_sample_of_a_large_dataset_is_scaled(write: Callable[..., Path], rows: Path) -> None:
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join(lines * 40) + "\n")
    file = write(gradient_accumulation_steps=4)
    cfg, _ = resolve(load_config(file), hardware_of(gpu("h200"), 1, 1))
    tokenizer = load_tokenizer(cfg.model)
    found, tasks = find_prepared(cfg.data, tokenizer)
    assert found is None
    seen = sample(tasks)
    assert seen.of in (None, 4800) and seen.read == 1024
    if seen.of is None:
        pytest.fail("the number of lines of a JSONL file is not known, so nothing can be scaled")
    train, _ = rows_of(cfg, tokenizer)
    course = course_of(cfg, train, attention_for(cfg.model, cfg.data, Hardware()), 1)
    assert not course.exact
    assert course.rows == pytest.approx(4800, rel=0.01)
    assert course.volume.total_steps == pytest.approx(1200, rel=0.01)


@pytest.mark.slow
def test_data_that_cannot_be_opened_leaves_the_memory(
    axolotl: Run, write: Callable[..., Path], rows: Path
) -> None:
    file = write()
    rows.unlink()
    done = axolotl("plan", file, "--gpu", "h200", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["fits"]
    assert found["steps"] is None and "data.jsonl" in found["steps_unknown"]


# Layouts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "weights", "optimizer"),
    [
        ({}, 1.0, 1.0),
        ({"fsdp_config": {"fsdp_version": 2}, "fsdp_version": 2}, 0.5, 0.25),
        ({"deepspeed": "deepspeed_configs/zero2.json"}, 1.0, 0.25),
        ({"deepspeed": "deepspeed_configs/zero3_bf16.json"}, 0.5, 0.25),
    ],
    ids=["ddp", "fsdp", "zero2", "zero3"],
)
def test_several_gpus_divide_what_their_strategy_says(
    write: Callable[..., Path], keys: dict[str, Any], weights: float, optimizer: float
) -> None:
    alone = planned(write("qwen3-1.7b")).needs.training.by_category
    shared = planned(write("qwen3-1.7b", **keys), gpus=4)
    parts = shared.needs.training.by_category
    assert shared.layout.gpus == shared.layout.copies == 4
    assert (
        parts["weights"] <= weights * alone["weights"]
        if weights < 1
        else parts["weights"] == alone["weights"]
    )
    state = 3 * alone["optimizer"] if "deepspeed" in keys else alone["optimizer"]
    assert parts["optimizer"] == pytest.approx(optimizer * state, rel=0.01)
    assert shared.needs.step.exchange > 0
    assert "no run" in shared.needs.notes[0]


def test_gpus_that_share_products_hold_parts_of_matrices(write: Callable[..., Path]) -> None:
    alone = planned(write("qwen3-1.7b")).needs
    shared = planned(write("qwen3-1.7b", tensor_parallel_size=2))
    one, part = alone.training.by_category, shared.needs.training.by_category
    assert shared.layout.copies == 1 and "2 share each matrix product" in shared.layout.title
    for what in ("weights", "optimizer"):
        assert part[what] == pytest.approx(one[what] / 2, rel=0.01)
    assert part["temporary"] == one["temporary"]
    assert shared.needs.step.matmul == pytest.approx(alone.step.matmul / 2)
    assert shared.needs.step.exchange > 0


def test_layouts_are_read_from_the_config(write: Callable[..., Path]) -> None:
    keys = {"fsdp_config": {"fsdp_version": 2}, "tensor_parallel_size": 2, "dp_shard_size": 2}
    cfg = load_config(write(**keys), verb="plan")
    layout = layout_of(cfg.distributed, None, 1)
    assert (layout.gpus, layout.tensor, layout.shards, layout.copies) == (4, 2, 2, 2)
    assert layout_of(load_config(write()).distributed, None, 8).gpus == 1
    with pytest.raises(ConfigError, match=r"6 GPUs cannot be divided.*make 4"):
        layout_of(cfg.distributed, 6, 1)
    shared = load_config(write(fsdp_config={"fsdp_version": 2}, context_parallel_size=2), verb="plan")
    layout = layout_of(shared.distributed, 4, 1)
    # Those that share a row divide the weights too.
    assert (layout.context, layout.copies, layout.shards) == (2, 2, 4)


def test_what_waits_in_ram_is_counted(write: Callable[..., Path]) -> None:
    plain = planned(write("llama-1b"))
    assert plain.needs.host == {}
    copied = planned(write("llama-1b", save_async=True))
    assert copied.needs.host == {"copy for save_async": copied.disk.checkpoint}
    assert copied.disk.checkpoint == pytest.approx(6 * 1235814400, rel=0.01)
    assert "RAM for the run" in table(copied) and "RAM for the run" not in table(plain)
    low = planned(write("llama-1b", save_async=True, **LORA))
    assert low.needs.host["copy for save_async"] < 0.1 * copied.disk.checkpoint
    away = planned(
        write("llama-1b", gradient_checkpointing=True, activation_offloading=True, fused_kernels=False)
    )
    batch = away.needs.batch
    inputs = 16 * batch.rows * batch.length * 2048 * 2
    logits = batch.rows * batch.length * 128256 * 4
    # Logits and their softmax too, but not the weights of the head.
    assert inputs + logits <= away.needs.host["offloaded activations"] <= 1.2 * inputs + 2.1 * logits


@pytest.mark.slow
def test_layers_that_stay_gathered_need_more(write: Callable[..., Path]) -> None:
    def weights(**options: Any) -> tuple[int, dict[str, int]]:
        found = planned(write("llama-1b", fsdp_config={"fsdp_version": 2, **options}), gpus=4)
        return found.needs.training.by_category["weights"], found.needs.host

    divided, none = weights()
    whole, _ = weights(reshard_after_forward=False)
    assert none == {} and whole == pytest.approx(1.25 * 2 * 1235814400, rel=0.01) and divided < 0.6 * whole
    away, host = weights(offload_params=True)
    assert away == pytest.approx(divided - 0.25 * 2 * 1235814400, rel=0.01)
    assert host["offloaded weights"] == pytest.approx(2 * 1235814400, rel=0.01)
    assert host["offloaded optimizer and gradients"] == pytest.approx(6 * 1235814400, rel=0.01)


# GPUs


def test_every_gpu_of_the_table_is_found_by_its_drivers_name() -> None:
    assert len(gpu_names()) >= 12
    for name in gpu_names():
        row = gpu(name)
        assert row.memory > 10 * GIB and row.bandwidth > 1e11 and row.peak(True) > row.fp32
        assert row.measured == (name == "h200")
    called = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA L40S": "l40s",
        "NVIDIA L4": "l4",
        "NVIDIA GeForce RTX 4090": "4090",
        "Tesla T4": "t4",
    }
    for title, name in called.items():
        found = gpu_called(title)
        assert found is not None and found.name == name
    assert gpu_called("Voodoo 3") is None
    with pytest.raises(ConfigError, match="not a GPU"):
        gpu("voodoo")


def test_a_card_without_bf16_is_planned_in_fp16(write: Callable[..., Path]) -> None:
    found = planned(write(**LORA), "t4")
    assert found.cfg.model.fp16 and not found.cfg.model.bf16


# The text of a config file


def test_values_are_written_and_all_else_stays() -> None:
    text = "# mine\nmicro_batch_size: 8  # rows\ndatasets:\n  - path: x\nlist:\n  - 1\n  - 2\nlr: 1\n"
    new = edited(text, {"micro_batch_size": 2, "list": [3], "load_in_4bit": True})
    assert new == (
        "# mine\nmicro_batch_size: 2  # rows\ndatasets:\n  - path: x\nlist: [3]\nlr: 1\nload_in_4bit: true\n"
    )


def test_the_batches_of_a_step(write: Callable[..., Path]) -> None:
    cfg, _ = resolve(load_config(write(micro_batch_size=4, gradient_accumulation_steps=3)), Hardware())
    assert list(batches(cfg)) == [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]
    other = changed(cfg, {"micro_batch_size": 2, "gradient_checkpointing": True})
    assert other.train.eval_batch_size == 2
    assert other.train.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_the_docs_show_what_was_compared(project: Path) -> None:
    """The table of docs/plan.md is that of the saved comparison, and its errors are within what is claimed."""
    saved = json.loads((project / "benchmarks" / "results" / "plan_points.json").read_text())
    page = (project / "docs" / "plan.md").read_text(encoding="utf-8")
    table = page.split("<!-- points -->")[1].split("<!-- /points -->")[0]
    assert len(saved["rows"]) == table.count("\n| ") - 1
    for row in saved["rows"]:
        shown = f"| {row['name']} | {row['measured_gib']:.2f} | {row['predicted_gib']:.2f} | {row['memory_error']:+.2%} |"
        assert shown in table
        assert -0.02 <= row["memory_error"] <= 0.05


def test_every_process_sees_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else ranks would choose batches of different sizes."""
    hardware = Hardware(device="cuda", gpu_names=("a", "b"), gpu_memory_bytes=(80 * GIB, 79 * GIB))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert {free_memory(hardware) for rank in "01" if not monkeypatch.setenv("RANK", rank)} == {79 * GIB}


@pytest.mark.parametrize("name", ["8xh100", "8 x H100", "8x-h100"])
def test_a_number_in_front_of_a_gpu_is_told_to_be_an_option_of_its_own(name: str) -> None:
    with pytest.raises(ConfigError, match="Write `--gpu h100 --gpus 8`"):
        gpu(name)


def test_rows_of_which_nothing_is_known_are_filled_up(write: Callable[..., Path]) -> None:
    """Attention of rows of different lengths gets a mask, which costs memory: what `auto` chooses has to allow for it."""
    hardware = hardware_of(gpu("h200"), 1, 2)
    for packing in (False, True):
        file = write("llama-1b", **LORA, micro_batch_size=2, sequence_len=2048, sample_packing=packing)
        cfg, _ = resolve(load_config(file), hardware)
        choice = attention_for(cfg.model, cfg.data, hardware)
        batch = shapes_without_data(cfg, choice)
        assert batch.packed is packing and batch.masked is not packing
    one = Question(cfg, gpu("h200"), hardware, Layout("one GPU"), choice)
    known = Batch(1, 2048)
    asked = replace(one, train=Course(None, known, known, 1.0, True, 1))  # type: ignore[arg-type]
    assert not asked.batch(cfg, 1).masked and asked.batch(cfg, 4).masked
