"""`axolotl doctor`: the machine, and where generation stops; the real command, and each finding provoked."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from axolotl.config.host import disk_free, oom_kills, ram
from axolotl.plan.extras import BAD_PAIRS, UNLOCKS, bad_pairs
from axolotl.plan.machine import allows, attention_backends, match_driver
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
    assert attention_backends("cpu")["math"]


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


def test_what_is_pasted_names_nobody() -> None:
    home = str(Path.home())
    text = f"{home}/models https://me:word@proxy.example hf_abcdefghijklmn"
    assert without_names(text) == "~/models https://***@proxy.example ***"
