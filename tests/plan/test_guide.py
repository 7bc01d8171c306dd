"""The errors that guides list, each provoked through the real command: prevented, repaired, or told in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml

from axolotl.config import load_config
from axolotl.config.host import Ram
from axolotl.distributed.exits import explain_exit
from axolotl.distributed.ram_watch import within_ram
from axolotl.errors import ConfigError
from axolotl.run.check import check
from axolotl.run.plan import plan

Run = Callable[..., CompletedProcess[str]]
TALK = [
    {
        "messages": [
            {"role": "user", "content": f"Is it {i}?"},
            {"role": "assistant", "content": "It is. " * (1 + i % 3)},
        ]
    }
    for i in range(24)
]


@pytest.fixture
def write(tmp_path: Path, tiny_llama3: Path) -> Callable[..., Path]:
    def make(rows: list[dict[str, Any]] = TALK, **keys: Any) -> Path:
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        values = {
            "base_model": str(tiny_llama3),
            "datasets": [{"path": str(data), "type": "chat_template"}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "out"),
            "learning_rate": 1e-3,
            "sequence_len": 256,
            "max_steps": 2,
            "save_strategy": "no",
        }
        file = tmp_path / "config.yml"
        file.write_text(yaml.safe_dump(values | keys), encoding="utf-8")
        return file

    return make


def giant(folder: Path, tiny: Path, layers: int) -> Path:
    """A model that no machine of today holds in RAM; its weights are never made."""
    config = json.loads((tiny / "config.json").read_text())
    config |= {
        "hidden_size": 65536,
        "intermediate_size": 262144,
        "num_hidden_layers": layers,
        "head_dim": 128,
    }
    config |= {"num_attention_heads": 512, "num_key_value_heads": 8}
    folder.mkdir()
    for file in tiny.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_bytes((tiny / "chat_template.jinja").read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_out_of_memory_is_told_before_the_model_is_loaded(
    axolotl: Run, write: Callable[..., Path], tmp_path: Path, tiny_llama3: Path
) -> None:
    base = giant(tmp_path / "giant", tiny_llama3, 64)
    began = time.monotonic()
    done = axolotl("train", write(base_model=str(base), reinit_weights=True, bf16=True))
    assert done.returncode == 2, done.stderr
    assert "[AX1402]" in done.stderr and "Training needs" in done.stderr and "are free" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 120


@pytest.mark.slow
def test_out_of_memory_while_training_is_explained(
    axolotl: Run, write: Callable[..., Path], tmp_path: Path
) -> None:
    """With the plan's table: what takes the memory, category by category."""
    (tmp_path / "shortage.py").write_text(
        "import torch\n"
        "from axolotl.train.trainer import CausalTrainer\n"
        "plain = CausalTrainer.compute_loss\n"
        "def compute_loss(self, *args, **kwargs):\n"
        "    if torch.is_grad_enabled():\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory.')\n"
        "    return plain(self, *args, **kwargs)\n"
        "CausalTrainer.compute_loss = compute_loss\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    }
    done = axolotl("train", write(plugins=["shortage"], on_oom="fail"), env=environment, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "[AX1403]" in done.stderr
    assert "training: most memory in the" in done.stderr and "optimizer state" in done.stderr


@pytest.mark.slow
def test_a_killed_run_is_told_in_words(write: Callable[..., Path], tmp_path: Path) -> None:
    """The system's SIGKILL leaves no word; whoever started the run has one."""
    file = write(max_steps=5000, logging_steps=1)
    sweep = tmp_path / "sweep.yml"
    sweep.write_text("learning_rate: [0.001]\n")
    command = [sys.executable, "-m", "axolotl", "train", str(file), "--sweep", str(sweep)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("step "):
            break
    # The other one is the sweep's own witness.
    (child,) = (c for c in children(running.pid) if b"--sweep" not in Path(f"/proc/{c}/cmdline").read_bytes())
    os.kill(child, signal.SIGKILL)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "[AX1405]" in told and "exit code -9" in told and "--auto-resume-from-checkpoints" in told


def children(parent: int) -> list[int]:
    """The processes that a process has started itself."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def test_memory_that_runs_short_is_told_before_its_end(capfd: pytest.CaptureFixture[str]) -> None:
    free = iter([9 << 30, 1 << 26, 1 << 26])
    with within_ram(
        "while the data is prepared", lambda: Ram(10 << 30, next(free, 1 << 26), "container"), 0.01
    ):
        time.sleep(0.2)
    told = capfd.readouterr().err
    assert told.count("[AX1405]") == 1
    assert "while the data is prepared" in told and "0.1 GiB of the container's 10.0 GiB" in told


@pytest.mark.parametrize(
    ("left", "stalled", "ends"),
    [
        ([100 << 20] * 9, [None] * 9, False),  # little, and enough
        ([100 << 20, 50 << 20, 1 << 20, 0], [None] * 4, True),
        ([100 << 20, 50 << 20, 9 << 30, 50 << 20, 9 << 30], [None] * 5, False),
        ([100 << 20, 50 << 20, 1 << 20, 0], [3.0] * 4, False),  # files give way without a wait
        ([100 << 20] * 4, [3.0, 4.0, 5.0, 6.0], True),
    ],
)
def test_a_run_that_gets_along_with_little_is_not_ended(
    left: list[int], stalled: list[float | None], ends: bool
) -> None:
    looks, waits, ended = iter(left), iter(stalled), threading.Event()
    over = threading.Event()

    def look() -> Ram:
        now = next(looks, None)
        if now is None:
            over.set()
        return Ram(16 << 30, 9 << 30 if now is None else now, "container")

    with within_ram(
        "while it is tried", look, 0.01, end=lambda _: ended.set(), stalls=lambda: next(waits, None)
    ):
        while not over.is_set() and not ended.is_set():
            time.sleep(0.01)
    assert ended.is_set() == ends


def test_exit_codes_in_words() -> None:
    killed = explain_exit(-9, "run 2", kernel_kills=1)
    assert killed is not None and killed.message.startswith("The kernel ended run 2")
    assert explain_exit(137, "rank 3") is not None
    crashed = explain_exit(-11, "run 1")
    assert crashed is not None and "doctor" in crashed.remedy
    assert explain_exit(2, "run 1") is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("deepspeed", "deepspeed_configs/zero2.json"),
        ("fsdp_config", {"fsdp_version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}),
    ],
)
def test_one_device_and_a_config_for_several(
    axolotl: Run, write: Callable[..., Path], key: str, value: Any
) -> None:
    file = write(**{key: value})
    line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if text.startswith(key))
    done = axolotl("train", file)
    assert done.returncode == 2
    assert f"config.yml:{line}:" in done.stderr and "[AX1407]" in done.stderr
    assert f"Delete the line `{key}:`" in done.stderr
    cfg = load_config(file)
    (found,) = [p for p in check(cfg) if p.code == "AX1407"]
    assert "--config-only" in found.remedy and "--num-processes" in found.remedy
    assert not [p for p in check(cfg, 2) if p.code == "AX1407"]
    with pytest.raises(ConfigError, match="one device and one process") as caught:
        plan(cfg, gpu="h100", gpus=1)
    assert "--gpus" in caught.value.problems[0].remedy


@pytest.mark.slow
def test_flash_attention_that_is_not_here(axolotl: Run, write: Callable[..., Path]) -> None:
    file = write(attn_implementation="flash_attention_2")
    done = axolotl("train", file)
    assert done.returncode == 0, done.stderr
    assert "`attn_implementation: flash_attention_2` is not here" in done.stderr and "[AX1406]" in done.stderr
    strict = axolotl("train", file, "--strict")
    assert strict.returncode == 2
    assert "[AX1406]" in strict.stderr and "error:" in strict.stderr


@pytest.mark.slow
def test_the_stop_token_is_trained_and_saved(
    axolotl: Run, write: Callable[..., Path], tmp_path: Path
) -> None:
    """EOS mismatch: the template ends turns with another token than the tokenizer's EOS."""
    done = axolotl("train", write())
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    tokens = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    eot = next(t["id"] for t in tokens if t["content"] == "<|eot_id|>")
    assert eot in saved


def test_the_first_loss_is_told_before_training(axolotl: Run, write: Callable[..., Path]) -> None:
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
    done = axolotl("train", write(**lora))
    assert done.returncode == 0, done.stderr
    line = next(each for each in done.stderr.splitlines() if each.startswith("Before training"))
    assert "(guessing 8.32, the base model's own " in line and "of the tokens are trained" in line
    first, base = (float(line.split(word)[1].split()[0].strip("();")) for word in ("loss ", "own "))
    assert first == pytest.approx(base, abs=1e-3), "a new adapter changes nothing"
    # The tiny model's weights are random: it guesses.
    assert "[AX1205]" in done.stderr


@pytest.mark.slow
def test_hardly_anything_is_trained(axolotl: Run, write: Callable[..., Path]) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "a"}]}
        for _ in range(8)
    ]
    entry = {"path": str(write(rows).parent / "rows.jsonl"), "type": "chat_template", "train_on_eos": "none"}
    done = axolotl("train", write(rows, datasets=[entry], sequence_len=512))
    assert done.returncode == 0, done.stderr
    assert "[AX1103]" in done.stderr


@pytest.mark.slow
def test_a_loss_that_stays_flat(axolotl: Run, write: Callable[..., Path]) -> None:
    flat = axolotl("train", write(learning_rate=1e-9, max_steps=101, logging_steps=1))
    assert flat.returncode == 0, flat.stderr
    line = next(each for each in flat.stderr.splitlines() if "[AX1206]" in each)
    assert "learning rate" in line and "The learning rate is small: 2e-05 is usual here." in line


@pytest.mark.slow
def test_a_loss_that_jumps(axolotl: Run, write: Callable[..., Path]) -> None:
    keys = {
        "learning_rate": 0.3,
        "max_steps": 50,
        "logging_steps": 1,
        "warmup_steps": 49,
        "spike_threshold": 4,
    }
    wild = axolotl(
        "train", write(optimizer="sgd", lr_scheduler="constant_with_warmup", max_grad_norm=0, **keys)
    )
    assert "[AX1207]" in wild.stderr or "[AX1208]" in wild.stderr, wild.stderr[-2000:]


def test_columns_that_do_not_fit_the_type(axolotl: Run, write: Callable[..., Path]) -> None:
    done = axolotl("preprocess", write([{"instruction": "Say it.", "output": "It."}]))
    assert done.returncode == 2
    assert "[AX1102]" in done.stderr and "`type: alpaca`" in done.stderr
