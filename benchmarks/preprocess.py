"""How fast and in how much memory data is prepared, beside the bare tokenizer on the same text and CPUs.

usage: python benchmarks/preprocess.py [runs] [--reduced]      reduced: a hundredth of the rows, to see that it runs; keeps nothing
limits: 0.7 of the bare tokenizer's speed for alpaca rows, 0.5 for chats of ~400 tokens; 15.2 s for the whole command on
20,000 such chats and on 100,000 alpaca rows; with 1,000,000 rows 10 % more memory than with 100,000, and 1.5 GB beyond
what the imports take; 2 GB for a single answer of 50 MB, 4 GB for a single conversation of 1,000,000 turns; 1 s from
asking for 100,000 prepared rows to the first packed batch

Speed is tokens per second between a small and a large preparation, so that starting up is left out; `bare` is
`encode_batch_fast` of the `tokenizers` package over the finished texts. The machine should have nothing else to do.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from measure import PROJECT, TINY, axolotl, python, quiet_environment, record, timed, write_rows

CHATS, INSTRUCTIONS = 20_000, 100_000
SMALL = {"chat": 4_000, "alpaca": 8_000}
FEW, MANY = 100_000, 1_000_000
LARGE, TURNS = 50_000_000, 1_000_000
WHOLE_LIMIT = 15.2  # seconds
MEASURED = ("axolotl.data.prepare", "transformers", "axolotl.data.remote")


def words() -> list[str]:
    """Words of plain English, those first that are frequent."""
    text = "\n".join(p.read_text(encoding="utf-8") for p in sorted((PROJECT / "docs").glob("*.md")))
    found = [w for w in re.findall(r"[A-Za-z]+", text) if len(w) < 12]
    return sorted(set(found), key=lambda w: (-found.count(w), w))


class Writer:
    """Made-up rows: six words in ten are among the 300 most frequent."""

    def __init__(self) -> None:
        self.draw = random.Random(0)
        self.words = words()

    def text(self, count: int) -> str:
        pick = self.draw
        chosen = (
            pick.choice(self.words[:300]) if pick.random() < 0.6 else pick.choice(self.words)
            for _ in range(count)
        )
        return " ".join(chosen).capitalize() + "."

    def chat(self) -> dict[str, Any]:
        turns = self.draw.choice([4, 6, 8, 10])
        roles = ("user", "assistant")
        lengths = [max(3, int(self.draw.gauss(188 / turns, 8))) for _ in range(turns)]
        return {"messages": [{"role": roles[i % 2], "content": self.text(n)} for i, n in enumerate(lengths)]}

    def alpaca(self) -> dict[str, str]:
        read = self.draw.randint
        given = self.text(read(5, 30)) if self.draw.random() < 0.5 else ""
        return {"instruction": self.text(read(8, 25)), "input": given, "output": self.text(read(15, 60))}

    def large(self) -> dict[str, Any]:
        lines = [self.text(60) for _ in range(1000)]
        answer = "\n".join(self.draw.choices(lines, k=130_000))[:LARGE]
        return _chat_of([self.text(3), answer])

    def long(self) -> dict[str, Any]:
        lines = [self.text(5) for _ in range(1000)]
        return _chat_of(self.draw.choices(lines, k=TURNS))

    def short(self, number: int) -> dict[str, str]:
        return {
            "instruction": f"{self.text(6)} {number}",
            "input": "",
            "output": self.text(self.draw.randint(3, 20)),
        }


def _chat_of(texts: list[str]) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]}


def config(folder: Path, rows: Path, kind: str) -> Path:
    """The config file of a preparation into an empty folder."""
    values: dict[str, Any] = {
        "base_model": str(TINY),
        "datasets": [{"path": str(rows), "type": "chat_template" if kind == "chat" else "alpaca"}],
        "sequence_len": 4096,
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "learning_rate": 0.001,
    }
    if kind == "chat":
        values["chat_template"] = "llama3"
    file = folder / "config.yml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    shutil.rmtree(folder / "prepared", ignore_errors=True)
    return file


# Runs in a process of its own, without worker pools of earlier measurements; prints one JSON list.
_IN_ONE_PROCESS = """
import json, os, sys, time
import axolotl.data.prepare, axolotl.data.remote
from transformers import PreTrainedTokenizerFast
from axolotl.config.data import DataSection
from axolotl.data.prepare import prepare

def used():
    return sum(os.times()[:4])

def main():
    rows, kind, folder = sys.argv[1:4]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[4])
    entry = {"path": rows, "type": "chat_template" if kind == "chat" else "alpaca"}
    template = {"chat_template": "llama3"} if kind == "chat" else {}
    data = DataSection.model_validate(
        {"datasets": [entry], "sequence_len": 4096, "dataset_prepared_path": folder, **template}
    )
    began, work = time.perf_counter(), used()
    done = prepare(data, tokenizer)
    ours, ours_used = time.perf_counter() - began, used() - work
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    saved, bare = done.saved(), tokenizer.backend_tokenizer
    texts = []
    for start in range(0, len(saved), 1000):
        texts += bare.decode_batch(saved[start : start + 1000]["input_ids"], skip_special_tokens=False)
    began, tokens, work = time.perf_counter(), 0, used()
    for start in range(0, len(texts), 4000):
        batch = bare.encode_batch_fast(texts[start : start + 4000], add_special_tokens=False)
        tokens += sum(len(each) for each in batch)
    bare = time.perf_counter() - began
    print(json.dumps([done.summaries[0].counts.tokens, ours, ours_used, tokens, bare, used() - work]))

if __name__ == "__main__":
    main()
"""


def measured(folder: Path, rows: Path, kind: str) -> list[float]:
    """(tokens, seconds, CPU seconds) of `prepare`, then of the bare tokenizer on the same rows."""
    prepared = folder / "prepared"
    shutil.rmtree(prepared, ignore_errors=True)
    script = folder / "measured.py"
    script.write_text(_IN_ONE_PROCESS, encoding="utf-8")
    env = {k: v for k, v in quiet_environment().items() if k != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        python(str(script), str(rows), kind, str(prepared), str(TINY)),
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    figures: list[float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def speed(folder: Path, small: Path, large: Path, kind: str, runs: int) -> dict[str, float]:
    """Tokens per second of both, the best of the runs, and their ratios: of wall time, and of CPU time.

    Where other programs use the CPUs the first says little; the second is about the same.
    """
    ours, bare, ours_cpu, bare_cpu = [], [], [], []
    for _ in range(runs):
        a, b = measured(folder, small, kind), measured(folder, large, kind)
        ours.append((b[0] - a[0]) / (b[1] - a[1]))
        ours_cpu.append((b[0] - a[0]) / (b[2] - a[2]))
        bare.append(b[3] / b[4])
        bare_cpu.append(b[3] / b[5])
    return {
        "tokens_per_second": round(max(ours)),
        "bare_tokens_per_second": round(max(bare)),
        "ratio": round(max(ours) / max(bare), 3),
        "ratio_of_cpu_time": round(max(ours_cpu) / max(bare_cpu), 3),
        "tokens": b[0],
    }


# What a run does with prepared data before its first step, libraries, config and tokenizer at hand; prints seconds.
_CACHED_START = """
import json, sys, time
from axolotl.config import Hardware, load_config, resolve
from axolotl.model.attention import AttentionChoice
from axolotl.model.tokenizer import load_tokenizer
from axolotl.run.preprocess import training_data
from axolotl.train.batches import build_batches

cfg = resolve(load_config(sys.argv[1]), Hardware(device="cpu"))[0]
tokenizer = load_tokenizer(cfg.model)
import datasets
taken = []
for _ in range(int(sys.argv[2])):
    began = time.perf_counter()
    rows, held_out = training_data(cfg, tokenizer)
    batches = build_batches(
        rows, cfg.data, cfg.train, AttentionChoice("sdpa", "for packed rows", True), pad_token_id=tokenizer.pad_token_id
    )
    build_batches(
        held_out,
        cfg.data,
        cfg.train,
        AttentionChoice("sdpa", "for packed rows", True),
        pad_token_id=tokenizer.pad_token_id,
        evaluation=True,
    )
    batches.volume(cfg.train)
    batches.digest()
    first = next(iter(batches.loader(cfg.train)))
    taken.append(time.perf_counter() - began)
    assert first["input_ids"].numel()
print(json.dumps(taken))
"""


def cached_start(folder: Path, rows: Path, runs: int) -> dict[str, float]:
    """Seconds from asking for data that is prepared already to its first packed batch; the first call reads the files'
    content, as the first of a process does."""
    file = config(folder, rows, "alpaca")
    more = {"sample_packing": True, "val_set_size": 0.05, "num_epochs": 1, "micro_batch_size": 2}
    file.write_text(file.read_text(encoding="utf-8") + yaml.safe_dump(more), encoding="utf-8")
    done = timed(axolotl("preprocess", file), env=quiet_environment(), cwd=folder)[1]
    assert done.returncode == 0, done.stderr
    script = folder / "cached_start.py"
    script.write_text(_CACHED_START, encoding="utf-8")
    done = timed(python(str(script), str(file), str(max(2, runs))), env=quiet_environment(), cwd=folder)[1]
    assert done.returncode == 0, done.stderr
    assert "prepared data found" in done.stderr, done.stderr
    taken: list[float] = json.loads(done.stdout.splitlines()[-1])
    return {"first_in_process": round(taken[0], 3), "best": round(min(taken), 3)}


def whole(folder: Path, rows: Path, kind: str, runs: int) -> float:
    """Seconds of `axolotl preprocess` as a user waits for it, the best of the runs."""
    best = float("inf")
    for _ in range(runs):
        took, done = timed(
            axolotl("preprocess", config(folder, rows, kind)), env=quiet_environment(), cwd=folder
        )
        assert done.returncode == 0, done.stderr
        best = min(best, took)
    return round(best, 2)


def tree_memory(command: list[str], folder: Path) -> int:
    """The most resident memory of a command and all its processes at one time, in bytes."""
    process = psutil.Popen(
        command, cwd=folder, env=quiet_environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    peak = 0
    while process.poll() is None:
        total = 0
        for each in [process, *_children(process)]:
            try:
                total += each.memory_info().rss
            except psutil.Error:
                continue
        peak = max(peak, total)
        time.sleep(0.1)
    assert process.returncode == 0, process.stderr.read()
    return peak


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _reduce(by: int) -> None:
    """Fewer of everything: the figures then mean nothing."""
    for name in ("CHATS", "INSTRUCTIONS", "FEW", "MANY", "LARGE", "TURNS"):
        globals()[name] //= by
    for kind in SMALL:
        SMALL[kind] //= by


def main() -> None:
    numbers = [int(arg) for arg in sys.argv[1:] if arg.isdigit()]
    runs = numbers[0] if numbers else 2
    reduced = "--reduced" in sys.argv
    if reduced:
        _reduce(100)
    writer = Writer()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows: dict[str, Path] = {}
        for kind, make, count in (("chat", writer.chat, CHATS), ("alpaca", writer.alpaca, INSTRUCTIONS)):
            made = [make() for _ in range(count)]
            rows[kind] = write_rows(folder / f"{kind}.jsonl", made)
            rows[f"{kind}_small"] = write_rows(folder / f"{kind}_small.jsonl", made[: SMALL[kind]])
            del made
        speeds = {k: speed(folder, rows[f"{k}_small"], rows[k], k, runs) for k in ("alpaca", "chat")}
        commands = {k: whole(folder, rows[k], k, runs) for k in ("alpaca", "chat")}
        start = cached_start(folder, rows["alpaca"], runs)
        memory: dict[str, int] = {}
        for count in (FEW, MANY):
            short = folder / f"short_{count}.jsonl"
            with short.open("w", encoding="utf-8") as file:
                for number in range(count):
                    file.write(json.dumps(writer.short(number)) + "\n")
            memory[f"{count}_rows"] = tree_memory(
                axolotl("preprocess", config(folder, short, "alpaca")), folder
            )
        for kind, make in (("row_of_50_mb", writer.large), ("conversation_of_1000000_turns", writer.long)):
            single = write_rows(folder / "single.jsonl", [make(), *(writer.chat() for _ in range(10))])
            memory[kind] = tree_memory(axolotl("preprocess", config(folder, single, "chat")), folder)
        imports = python("-c", f"import time, {', '.join(MEASURED)}; time.sleep(1)")
        memory["imports"] = tree_memory(imports, folder)
    growth = memory[f"{MANY}_rows"] / memory[f"{FEW}_rows"]
    beyond = memory[f"{MANY}_rows"] - memory["imports"]
    figures = {
        "speed": speeds,
        "whole_command_seconds": {
            f"chat_{CHATS}_rows": commands["chat"],
            f"alpaca_{INSTRUCTIONS}_rows": commands["alpaca"],
        },
        f"cached_start_seconds_{INSTRUCTIONS}_rows": start,
        "peak_tree_memory_mib": {k: round(v / 2**20) for k, v in memory.items()},
        "memory_growth_from_100000_to_1000000_rows": round(growth, 3),
        "cpus_used": len(os.sched_getaffinity(0)),
    }
    limits = {
        "alpaca_ratio_0.7": speeds["alpaca"]["ratio"] >= 0.7,
        "chat_ratio_0.5": speeds["chat"]["ratio"] >= 0.5,
        f"chat_20000_rows_{WHOLE_LIMIT}_s": commands["chat"] <= WHOLE_LIMIT,
        f"alpaca_100000_rows_{WHOLE_LIMIT}_s": commands["alpaca"] <= WHOLE_LIMIT,
        "cached_start_1_s": start["first_in_process"] <= 1,
        "memory_growth_1.1": growth <= 1.1,
        "memory_1.5_GB": beyond <= 1.5e9,
        "row_of_50_mb_2_GB": memory["row_of_50_mb"] <= 2e9,
        "conversation_of_1000000_turns_4_GB": memory["conversation_of_1000000_turns"] <= 4e9,
    }
    if reduced:
        print(json.dumps(figures))
    else:
        record("preprocess", figures, limits)


if __name__ == "__main__":
    main()
