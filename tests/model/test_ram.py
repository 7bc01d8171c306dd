"""What loading takes in RAM: told from headers, measured in a process of its own, refused in words, ended before the kernel."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl.config.host import Ram
from axolotl.model.files import TensorEntry, read_weight_files
from axolotl.model.load import load_model_config
from axolotl.model.ram import Loading, check_ram, loading_need
from axolotl.plan.check import load_config

GIB = 1 << 30
SHARD = 16 << 20

MEASURE = """
import sys, threading, time
import torch
from transformers import AutoTokenizer
from axolotl.config.load import load_config
from axolotl.distributed.world import detect_hardware
from axolotl.model.load import load_model
import gc, json

def held():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024

peak, going = 0, True
def watch():
    global peak
    while going:
        peak = max(peak, held())
        time.sleep(0.001)

threading.Thread(target=watch, daemon=True).start()
found = {}
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
for what, device, options in (("warm", "cpu", {}), ("same", "cpu", {"bf16": True}), ("gpu", "meta", {"bf16": True}), ("wide", "cpu", {})):
    cfg = load_config([sys.argv[1]], [], verb="train").with_values(options, {k: "test" for k in options})
    model = cfg.model.model_copy(update={"base_model": sys.argv[2]}) if what == "warm" else cfg.model
    gc.collect()
    before = peak = held()
    loaded = load_model(model, cfg.adapter, tokenizer, detect_hardware(), training=True, device=device)
    found[what] = peak - before
    del loaded
print(json.dumps(found))
"""


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model of about 100 MiB in bfloat16, in seven files."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    folder = tmp_path / "sharded"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
    return folder


def write(folder: Path, base: Path, tokens: Path, **keys: object) -> Path:
    rows = folder / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    file = folder / "config.yml"
    values = {
        "base_model": str(base),
        "tokenizer_config": str(tokens),
        "datasets": [{"path": str(rows), "type": "completion"}],
        "output_dir": str(folder / "out"),
        "learning_rate": 1e-3,
    }
    file.write_text(yaml.safe_dump(values | keys))
    return file


def test_loading_takes_what_its_headers_say(sharded: Path, tmp_path: Path, tiny_llama3: Path) -> None:
    file = write(tmp_path, sharded, tiny_llama3)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(file), str(tiny_llama3)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout.splitlines()[-1])
    files = read_weight_files(sharded)
    entries = [item for shard in files.shards.values() for item in shard.items()]
    wide = loading_need(entries, torch.float32, device="cpu")
    assert wide.kept == 2 * files.total_bytes and not wide.mapped and not wide.passing
    assert 0.95 * wide.needed < taken["wide"] < 1.05 * wide.needed + SHARD
    same = loading_need(entries, torch.bfloat16, device="cpu")
    assert (same.needed, same.mapped) == (0, files.total_bytes)
    assert taken["same"] < SHARD, "weights that stay as they are take no memory of their own"
    # In place of a GPU, a device that keeps nothing.
    assert taken["gpu"] < SHARD, "what goes to a device does not gather in RAM"


def entry(dtype: str, *shape: int) -> TensorEntry:
    size = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I32": 4}[dtype]
    return TensorEntry(dtype, shape, 0, size * math.prod(shape))


def test_what_is_made_anew() -> None:
    entries = [
        ("model.embed_tokens.weight", entry("BF16", 1000, 64)),
        ("model.layers.0.mlp.experts.3.up_proj.weight", entry("BF16", 64, 64)),
        ("model.layers.0.self_attn.q_proj.weight", entry("F8_E4M3", 64, 64)),
        ("model.layers.0.self_attn.q_proj.qweight", entry("I32", 8, 64)),
    ]
    plain = loading_need(entries, torch.bfloat16, device="cpu", unpack=True)
    assert plain.kept == 2 * 64 * 64 + 2 * 64 * 64, "experts are put together, fp8 is unpacked"
    assert plain.mapped == 2 * 64_000 + 4 * 8 * 64
    split = loading_need(
        entries, torch.float32, device="cuda:0", device_map={"": 0, "model.embed_tokens": "cpu"}
    )
    assert split.kept == 4 * 64_000
    gpu = loading_need(entries, torch.float32, device="cuda:0")
    assert not gpu.kept and not gpu.mapped and 0 < gpu.passing <= 4 * (64_000 + 64 * 64 * 3)
    packed = loading_need(entries[:2], torch.bfloat16, device="cpu", bits=4)
    assert 0 < packed.kept < 64 * 64 and packed.mapped == 2 * 64_000


def test_no_room_is_told_with_what_helps(tmp_path: Path, tiny_llama3: Path) -> None:
    model = load_config([str(write(tmp_path, tiny_llama3, tiny_llama3))]).model
    now = Ram(24 * GIB, 20 * GIB, "container")
    need = Loading(kept=28 * GIB, files=frozenset({"BF16"}))
    found = check_ram(need, model, torch.float32, now=now)
    assert found is not None and found.fatal and found.shown_code == "AX1402"
    assert (
        "needs 28.0 GiB of RAM" in found.message and "20.0 GiB of the container's 24.0 GiB" in found.message
    )
    assert "`bf16: true`" in found.remedy and "`load_in_4bit: true` takes about 3.7 GiB" in found.remedy
    assert check_ram(Loading(kept=19 * GIB), model, torch.float32, now=now) is None
    two = check_ram(Loading(kept=19 * GIB), model, torch.float32, 2, now=now)
    assert two is not None and "2 processes together" in two.message
    slow = check_ram(Loading(mapped=30 * GIB), model, torch.bfloat16, now=now)
    assert slow is not None and not slow.fatal and slow.shown_code == "AX1405"
    swap = Ram(24 * GIB, 20 * GIB, "machine", swap=16 * GIB)
    told = check_ram(need, model, torch.float32, now=swap)
    assert told is not None and not told.fatal, "with swap it is slow"


def test_a_model_beyond_the_ram_is_refused_by_the_command(
    axolotl: Callable[..., CompletedProcess[str]], tmp_path: Path, tiny_llama3: Path
) -> None:
    """Its file has a header and no content: nothing of it is read."""
    base = tmp_path / "giant"
    base.mkdir()
    config = json.loads((tiny_llama3 / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config))
    count = 1 << 38
    header = json.dumps(
        {"lm_head.weight": {"dtype": "BF16", "shape": [count // 4096, 4096], "data_offsets": [0, 2 * count]}}
    )
    with (base / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header.encode())
        out.truncate(8 + len(header) + 2 * count)
    file = write(tmp_path, base, tiny_llama3)
    assert load_model_config(load_config([str(file)]).model).model_type == "llama"
    done = axolotl("train", file)
    assert done.returncode == 2, done.stderr
    assert "needs 1024.0 GiB of RAM (1024.0 GiB of weights as float32)" in done.stderr
    assert "config.yml:1:" in done.stderr and "[AX1402]" in done.stderr and "Traceback" not in done.stderr


def test_loading_ends_in_words_before_the_kernel_ends_it() -> None:
    code = """
import time
from axolotl.config.host import Ram
from axolotl.distributed.group import end_from_thread
from axolotl.distributed.ram_watch import within_ram
free = iter([8 << 30, 8 << 30, 400 << 20, 200 << 20])
with within_ram("while the weights are loaded", lambda: Ram(16 << 30, next(free, 0), "machine"), 0.01, remedy="Less.", end=end_from_thread, stalls=lambda: None):
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Memory is nearly used up while the weights are loaded" in done.stderr
    assert "ended itself before the kernel did" in done.stderr and done.stderr.count("[AX1405]") == 2
