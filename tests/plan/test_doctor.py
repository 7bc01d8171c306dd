"""`axolotl doctor`: the machine, and where generation stops; the real command, and each finding provoked."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from axolotl.config.host import disk_free, memory_stalls, oom_kills, ram
from axolotl.distributed.world import detect_hardware
from axolotl.plan import machine
from axolotl.plan.extras import BAD_PAIRS, UNLOCKS, bad_pairs
from axolotl.plan.machine import allows, attention_backends, built_for, match_driver
from axolotl.plan.stops import Ends, compare_ends, ids_of
from axolotl.run.doctor import without_names

Run = Callable[..., CompletedProcess[str]]


def config(folder: Path, base: Path, rows: list[dict[str, Any]], **keys: Any) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    values = {
        "base_model": str(base),
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "chat_template"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "learning_rate": 1e-4,
    }
    file = folder / "config.yml"
    file.write_text(yaml.safe_dump(values | keys), encoding="utf-8")
    return file


TALK = [
    {"messages": [{"role": "user", "content": f"Is it {i}?"}, {"role": "assistant", "content": "It is."}]}
    for i in range(9)
]


def test_the_machine_alone(axolotl: Run, tmp_path: Path) -> None:
    secret = "hf_" + "x" * 30
    done = axolotl("doctor", cwd=tmp_path, env={**os.environ, "HF_TOKEN": secret})
    assert done.returncode == 0, done.stdout
    assert "a token is set" in done.stdout and secret not in done.stdout
    block = done.stdout.split("```text")[1]
    assert "versions: axolotl" in block and "RAM:" in block
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_as_json(axolotl: Run) -> None:
    done = axolotl("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["ok"] is True and done.returncode == 0
    topics = {f["topic"] for f in found["findings"]}
    assert {"versions", "GPU", "attention", "RAM", "disk", "open files", "Hub", "extras not here"} <= topics


def test_rows_and_stops_of_a_config(axolotl: Run, tiny_chatml: Path, tmp_path: Path) -> None:
    done = axolotl("doctor", config(tmp_path, tiny_chatml, TALK))
    assert done.returncode == 0, done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("--- ")]
    assert len(rows) == 5
    assert "⟦It is.‹<|im_end|>›⟧" in done.stdout.replace("\n", "")
    assert "generation stops at `<|im_end|>`" in done.stdout
    assert not (tmp_path / "prepared").exists()


@pytest.mark.slow
def test_a_foreign_template(axolotl: Run, tiny_llama3: Path, tmp_path: Path) -> None:
    """The template of another family ends turns with a text that is no token of this vocabulary."""
    file = config(tmp_path, tiny_llama3, TALK, chat_template="chatml")
    done = axolotl("doctor", file)
    assert done.returncode == 1
    assert "[AX1203]" in done.stdout and "`<|im_end|>`" in done.stdout
    assert "special_tokens: {eos_token" in done.stdout
    mended = config(
        tmp_path, tiny_llama3, TALK, chat_template="chatml", special_tokens={"eos_token": "<|im_end|>"}
    )
    assert axolotl("doctor", mended).returncode == 0


@pytest.mark.slow
def test_a_stop_token_that_is_not_trained(axolotl: Run, tiny_chatml: Path, tmp_path: Path) -> None:
    entry = {"path": str(tmp_path / "rows.jsonl"), "type": "chat_template", "train_on_eos": "none"}
    done = axolotl("doctor", config(tmp_path, tiny_chatml, TALK, datasets=[entry]))
    assert done.returncode == 1
    assert "[AX1204]" in done.stdout and "train_on_eos: turn" in done.stdout


@pytest.mark.slow
def test_data_of_another_type_is_told_with_its_code(axolotl: Run, tiny_chatml: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "Say it.", "output": "It."}]
    done = axolotl("doctor", config(tmp_path, tiny_chatml, rows), "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert "AX1102" in {f["code"] for f in found["findings"]}


# What each part says of the end


@pytest.fixture
def tokenizer(tiny_llama3: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(tiny_llama3))


def ends_of(tokenizer: Any, **changes: Any) -> Ends:
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    known = Ends((eot, "<|eot_id|>"), (eot,), (eot,), ("<|eot_id|>",), len(tokenizer))
    return replace(known, **changes)


def texts(ends: Ends, tokenizer: Any) -> str:
    stop = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    return " | ".join(
        f"{f.state}:{f.text} {f.remedy}" for f in compare_ends(ends, tokenizer, [np.array([-100, 5, stop])])
    )


def test_all_agree(tokenizer: Any) -> None:
    assert texts(ends_of(tokenizer), tokenizer).startswith("ok:generation stops at `<|eot_id|>`")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer_eos": None}, "problem:The tokenizer names no EOS"),
        ({"generation_eos": (3,)}, "note:The base model's generation_config.json stops at 3"),
        ({"generation_eos": None}, "note:The base model has no generation_config.json"),
        ({"config_eos": (3,)}, "note:The base model's config.json says EOS is 3"),
        ({"tokenizer_eos": (7, "<end>")}, 'special_tokens: {eos_token: "<|eot_id|>"}'),
        ({"vocabulary": 10}, "problem:Token"),
        ({"template": ("no such token",)}, "problem:The template ends a turn with `no such token`"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_each_disagreement_names_its_fix(tokenizer: Any, changes: dict[str, Any], words: str) -> None:
    assert words in texts(ends_of(tokenizer, **changes), tokenizer)


def test_eos_ids_come_in_three_forms() -> None:
    assert [ids_of(None), ids_of(3), ids_of([3, 4])] == [(), (3,), (3, 4)]


# The machine's parts


@pytest.mark.parametrize(
    ("built", "driver", "usable", "state", "word"),
    [
        ("13.0", "580.65", True, "ok", "driver 580.65"),
        ("13.0", "550.10", False, "problem", "needs driver 580"),
        ("12.8", "535.10", False, "problem", "--gpus all"),
        ("12.8", "510.10", False, "problem", "needs driver 525"),
        (None, "580.65", False, "problem", "built for the CPU"),
        ("12.8", None, False, "note", "runs on the CPU"),
        (None, None, False, "note", "no NVIDIA driver"),
    ],
)
def test_driver_and_torch(built: str | None, driver: str | None, usable: bool, state: str, word: str) -> None:
    found = match_driver(built, driver, usable)
    assert found.state == state and word in f"{found.text} {found.remedy}"


def test_what_a_capability_allows() -> None:
    assert allows((9, 0)) == "bf16 yes, fp8 yes, flash attention yes"
    assert allows((8, 0)) == "bf16 yes, fp8 no, flash attention yes"
    assert "no (fp16 instead)" in allows((7, 5))
    tried = attention_backends("cpu", torch.float32)
    assert tried["math"] and tried["cudnn"] is None


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90", "sm_100"], True),
        ((8, 9), ["sm_80", "sm_90"], True),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100"], True),
        ((9, 4), ["gfx942"], True),
        ((9, 0), [], True),
    ],
)
def test_the_gpus_that_a_torch_has_code_for(
    capability: tuple[int, int], archs: list[str], runs: bool
) -> None:
    assert built_for(capability, archs) is runs


def test_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The calls that only a GPU answers, answered as torch does: one free, one of another kind and full, one in use."""
    full = 143 << 30
    properties = [
        SimpleNamespace(name=n, major=m, total_memory=full)
        for n, m in (("NVIDIA H200", 9), ("NVIDIA H200", 9), ("NVIDIA GeForce RTX 5090", 12))
    ]

    def memory(i: int) -> tuple[int, int]:
        if i == 1:
            raise torch.AcceleratorError(
                "CUDA error: out of memory\nCUDA kernel errors might be reported later"
            )
        return (full - (1 << 30), full) if i == 0 else (full // 4, full)

    for name, answer in {
        "is_available": lambda: True,
        "device_count": lambda: 3,
        "get_device_properties": lambda i: properties[i],
        "get_device_capability": lambda i: (properties[i].major, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "mem_get_info": memory,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "driver_version", lambda: "580.159.04")
    asked: list[Any] = []
    times = {"flash": 0.31, "cudnn": 0.22, "efficient": None, "math": 4.0}
    monkeypatch.setattr(machine, "attention_backends", lambda *about: asked.append(about) or times)
    found = machine.look_at_machine(detect_hardware(), tmp_path)
    gpus = [f for f in found if f.topic == "GPU"]
    assert gpus[0].text == "0: NVIDIA H200, capability 9.0, 142.0 GiB of 143.0 GiB free; " + allows((9, 0))
    assert gpus[1].state == "problem" and gpus[1].text.endswith("cannot be used: CUDA error: out of memory")
    assert gpus[2].text.startswith("2: NVIDIA GeForce RTX 5090, capability 12.0")
    assert gpus[3].state == "problem" and "no code for capability 12.0 (it has sm_80, sm_90)" in gpus[3].text
    assert "other programs hold 107.2 GiB" in gpus[4].text and "the GPUs differ" in gpus[5].text
    assert next(f for f in found if f.topic == "CUDA").text.endswith("CUDA 13.0, driver 580.159.04")
    attention = next(f for f in found if f.topic == "attention").text
    assert attention.startswith(
        "forward and backward: cudnn 0.2 ms, flash 0.3 ms, math 4.0 ms; not here: efficient"
    )
    assert asked == [("cuda", torch.bfloat16)]


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Mon Sep 29\nGCC version: gcc 12",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (dvs-builder)",
    ],
)
def test_both_kinds_of_driver_tell_their_version(tmp_path: Path, text: str) -> None:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(text)
    assert machine.driver_version(tmp_path) == "580.159.04"


def test_every_extra_says_what_it_unlocks(project: Path) -> None:
    extras = tomllib.loads((project / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) == set(UNLOCKS)


def test_known_bad_pairs() -> None:
    def versions(**have: str) -> Callable[[str], str | None]:
        return lambda name: have.get(name.replace("-", "_"))

    assert bad_pairs(versions(transformers="5.23.0", peft="0.17.1"))[0].remedy.startswith("pip install 'peft")
    assert not bad_pairs(versions(transformers="5.23.0", peft="0.21.2"))
    assert bad_pairs(versions(flash_attn_4="4.0.0b36", torch="2.11.0+cu130"))
    assert not bad_pairs(versions(flash_attn_4="4.0.0", torch="2.11.0"))
    assert bad_pairs(versions(numpy="2.4.6", triton="3.6.0")) and not bad_pairs(
        versions(numpy="2.4.6", triton="3.9.0")
    )
    assert all(pair.remedy for pair in BAD_PAIRS)
    assert bad_pairs() == [], "the versions of this environment work together"


def group(root: Path, path: str, **files: str) -> None:
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_memory_within_the_limits_of_a_container(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 800 kB\n")
    assert (ram(tmp_path).total, ram(tmp_path).free, ram(tmp_path).limit) == (1024000, 819200, "machine")
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    group(
        tmp_path, "job", memory__max="500000", memory__current="300000", memory__stat="inactive_file 100000\n"
    )
    group(tmp_path, "job/step", memory__max="max", memory__current="300000")
    now = ram(tmp_path)
    assert (now.total, now.free, now.limit) == (500000, 300000, "container")


def test_files_that_can_be_dropped_and_swap_are_no_shortage(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\nSwapFree: 700 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    stat = "anon 100000\ninactive_file 200000\nactive_file 150000\n"
    group(tmp_path, "", memory__max="500000", memory__current="490000", memory__stat=stat)
    now = ram(tmp_path)
    assert (now.total, now.free, now.swap) == (500000, 360000, 700 * 1024)
    assert not now.nearly_out and not now.gone
    group(tmp_path, "", memory__stat="", memory__swap__max="400000", memory__swap__current="400000")
    now = ram(tmp_path)
    assert (now.free, now.swap) == (10000, 0) and now.nearly_out
    group(tmp_path, "", memory__current="499999")
    assert ram(tmp_path).gone


def test_memory_within_the_limits_of_an_old_container(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 800 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("7:memory:/docker/abc\n1:cpu:/x\n")
    # Inside a container the group of the kernel's name is mounted as the root.
    group(
        tmp_path,
        "memory",
        memory__limit_in_bytes="400000",
        memory__usage_in_bytes="350000",
        memory__oom_control="oom_kill_disable 0\noom_kill 3\n",
    )
    now = ram(tmp_path)
    assert (now.total, now.free, now.limit) == (400000, 50000, "container")
    assert oom_kills(tmp_path) == 3
    assert disk_free(tmp_path / "not" / "there") > 0


def test_the_kernels_lists_of_files_are_no_shortage(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    stat = "anon 300000\nslab_reclaimable 190000\nslab_unreclaimable 5000\n"
    group(tmp_path, "", memory__max="500000", memory__current="499000", memory__stat=stat)
    assert ram(tmp_path).free == 191000 and not ram(tmp_path).gone


def test_swap_is_what_every_group_allows(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\nSwapFree: 700 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    group(
        tmp_path,
        "a",
        memory__max="max",
        memory__current="1",
        memory__swap__max="0",
        memory__swap__current="0",
    )
    group(tmp_path, "a/b", memory__max="500000", memory__current="1", memory__swap__max="max")
    assert (ram(tmp_path).total, ram(tmp_path).swap) == (500000, 0)
    old = "memory__limit_in_bytes", "memory__usage_in_bytes", "memory__memsw__limit_in_bytes"
    for together, used, left in (
        ("500000", "400000", 0),
        ("600000", "420000", 80000),
        ("9" * 19, "1", 716800),
    ):
        (tmp_path / "proc/self/cgroup").write_text("5:memory:/\n")
        values = dict(zip(old, ("500000", "400000", together), strict=True))
        group(tmp_path, "memory", **values, memory__memsw__usage_in_bytes=used)
        assert ram(tmp_path).swap == left


def test_stalls_are_those_of_the_own_group(tmp_path: Path) -> None:
    assert memory_stalls(tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/pressure").mkdir()
    line = "some avg10=0.00 avg60=0.00 avg300=0.00 total=%d\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n"
    (tmp_path / "proc/pressure/memory").write_text(line % 2_500_000)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    assert memory_stalls(tmp_path) == 2.5
    group(tmp_path, "job", memory__pressure=line % 1_000_000)
    assert memory_stalls(tmp_path) == 1.0


def test_what_is_pasted_names_nobody() -> None:
    home = str(Path.home())
    text = f"{home}/models https://me:word@proxy.example hf_abcdefghijklmn"
    assert without_names(text) == "~/models https://***@proxy.example ***"
