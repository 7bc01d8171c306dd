"""A small real run that is disturbed, continued by the same command, and compared with the undisturbed one."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TESTS = Path(__file__).resolve().parents[1]
SAVE_STEPS = 3
FIGURES = ("loss", "ppl", "grad_norm", "learning_rate", "tokens", "trained_tokens", "eval_loss", "eval_ppl")
_WORDS = "river stone apple window garden boat lantern quiet narrow bright carry find lose paint"
WORDS = _WORDS.split()


def environment() -> dict[str, str]:
    """One thread, no network, and the tests' modules."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": path,
    }


class Warm:
    """Children forked from a process that has imported everything (see warm.py)."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, str(TESTS / "faults" / "warm.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return dict(json.loads(self.server.stdout.readline()))

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait(30)


@dataclass
class Child:
    """A run of the command."""

    pid: int
    warm: Warm

    def code(self, timeout: float = 0.0) -> int | None:
        """Its exit code, or None while it runs."""
        return self.warm.ask({"wait": self.pid, "timeout": timeout})["code"]

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


@dataclass
class Outcome:
    """What became of the runs of one fault."""

    differences: list[str] = field(default_factory=list)
    bytes_lost: int = 0
    """Bytes of the final weights that differ from the undisturbed run's, all of them where there are none."""


class Bench:
    """Config, data and the undisturbed run, in `folder`; children are forked from `warm`."""

    def __init__(self, folder: Path, warm: Warm) -> None:
        self.folder, self.warm = folder, warm
        folder.mkdir(parents=True, exist_ok=True)
        draw = random.Random(3)

        def text(low: int, high: int) -> str:
            return " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))

        rows = [{"instruction": text(3, 12), "input": "", "output": text(1, 40)} for _ in range(60)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.undisturbed = folder / "undisturbed"
        self.keys: dict[str, dict[str, Any]] = {}
        """Output folder → keys of its config, beside those of all."""

    def config(self, out: str, **keys: Any) -> str:
        """Writes a config into `out`; returns its name."""
        values = (
            {
                "base_model": str(TESTS / "fixtures" / "tiny-llama3"),
                "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
                "dataset_prepared_path": "prepared",
                "output_dir": out,
                "sequence_len": 256,
                "sample_packing": True,
                "val_set_size": 0.1,
                "adapter": "lora",
                "lora_r": 4,
                "lora_alpha": 8,
                "lora_dropout": 0.1,
                "lora_target_linear": True,
                "micro_batch_size": 1,
                "gradient_accumulation_steps": 2,
                "num_epochs": 3,
                "evals_per_epoch": 2,
                "save_steps": SAVE_STEPS,
                "save_total_limit": 3,
                "learning_rate": 0.003,
                "auto_resume_from_checkpoints": True,
                "bf16": False,
            }
            | self.keys.get(out, {})
            | keys
        )
        name = f"{plain(out)}.yml"
        (self.folder / name).write_text(yaml.safe_dump(values))
        return name

    def start(self, out: str, fault: dict[str, Any] | None = None, **keys: Any) -> Child:
        """Starts the command."""
        log = str(self.folder / f"{plain(out)}.log")
        argv = ["train", self.config(out, **keys)]
        order = {"argv": argv, "cwd": str(self.folder), "log": log, "fault": fault}
        return Child(self.warm.ask({"start": order})["pid"], self.warm)

    def run(self, out: str, fault: dict[str, Any] | None = None, timeout: float = 240, **keys: Any) -> int:
        """Runs the command to its end; its exit code."""
        child = self.start(out, fault, **keys)
        code = child.code(timeout)
        if code is None:
            child.send(signal.SIGKILL)
            child.code(30)
            raise AssertionError(f"the run still goes on:\n{self.said(out)[-3000:]}")
        return code

    def reference(self) -> None:
        """The undisturbed run, by a process of its own that imports everything for itself."""
        if not (self.undisturbed / "adapter_model.safetensors").exists():
            name = self.config("undisturbed")
            command = [sys.executable, "-m", "axolotl", "train", name]
            subprocess.run(
                command, cwd=self.folder, env=environment(), check=True, capture_output=True, timeout=300
            )

    def said(self, out: str) -> str:
        """All that the commands have printed."""
        log = self.folder / f"{plain(out)}.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def outcome(self, out: str, *, steps_of_others: bool = False) -> Outcome:
        """Compares a finished run with the undisturbed one, bit for bit."""
        found, folder = Outcome(), self.folder / out
        expected = (self.undisturbed / "adapter_model.safetensors").read_bytes()
        weights = folder / "adapter_model.safetensors"
        actual = weights.read_bytes() if weights.exists() else b""
        found.bytes_lost = sum(a != b for a, b in zip(expected, actual, strict=False))
        found.bytes_lost += abs(len(expected) - len(actual))
        if found.bytes_lost:
            found.differences.append(f"{found.bytes_lost} bytes of the final weights differ")
        ours, theirs = figures(folder / "run.jsonl"), figures(self.undisturbed / "run.jsonl")
        missing = sorted(set(theirs) - set(ours))
        if missing and not steps_of_others:
            found.differences.append(f"not logged: {missing}")
        found.differences += [
            f"{key}: {ours[key]} instead of {theirs.get(key)}" for key in ours if ours[key] != theirs.get(key)
        ]
        if not json.loads((folder / "run.json").read_text()).get("complete"):
            found.differences.append("run.json does not say complete")
        left = [p.name for p in folder.iterdir() if p.name.startswith((".tmp", ".old"))]
        if left:
            found.differences.append(f"left behind: {left}")
        return found


def plain(out: str) -> str:
    """The name of a run without slashes."""
    return out.replace("/", "-")


def figures(log: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    """(kind, step) → the figures that have to be the same in every run."""
    found = {}
    for text in log.read_text().splitlines():
        line = json.loads(text)
        if line["kind"] in ("train", "eval"):
            found[line["kind"], line["step"]] = tuple(line.get(name) for name in FIGURES)
    return found


def wait_for(condition: Any, child: Child, timeout: float = 120) -> bool:
    """Looks often until `condition()`; False where the run ends before."""
    deadline, looks = time.monotonic() + timeout, 0
    while time.monotonic() < deadline:
        if condition():
            return True
        looks += 1
        if looks % 50 == 0 and child.code() is not None:
            return False
        time.sleep(0.001)
    raise AssertionError("waited in vain")


def steps_logged(out: Path) -> int:
    """Lines of run.jsonl."""
    try:
        return (out / "run.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def kill_at_random(
    bench: Bench, out: str, draw: random.Random, number: signal.Signals, *, saving: bool
) -> str:
    """Starts the command and sends it a signal, inside a save or after a random number of steps; says where."""
    child, folder = bench.start(out), bench.folder / out
    if saving:
        skipped, before = draw.randint(0, 2), set(folder.glob("checkpoint-*"))

        def now() -> bool:
            fresh = set(folder.glob("checkpoint-*")) - before
            return len(fresh) >= skipped and any(folder.glob(".tmp-checkpoint-*/checkpoint-*"))
    else:
        lines = steps_logged(folder) + draw.randint(1, 12)

        def now() -> bool:
            return steps_logged(folder) >= lines

    if not wait_for(now, child):
        return "ended before"
    time.sleep(draw.uniform(0, 0.06 if saving else 0.2))
    inside = any(folder.glob(".tmp-checkpoint-*"))
    if child.code() is not None:
        return "ended before"
    child.send(number)
    child.code(60)
    return "inside a save" if inside else "between saves"


def damage_newest(out: Path, draw: random.Random, how: str) -> str:
    """Truncates, flips a bit of, or removes a random file of the newest checkpoint; returns which."""
    newest = max(out.glob("checkpoint-*"), key=lambda p: int(p.name.partition("-")[2]))
    file = draw.choice(sorted(p for p in newest.iterdir() if p.stat().st_size > 2))
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[: draw.randrange(len(content))])
    elif how == "flipped":
        at = draw.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :])
    else:
        file.unlink()
    return f"{newest.name}/{file.name} {how}"


def fingerprint(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and content of every file below a folder."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def fresh(bench: Bench, out: str, *, complete: bool = False) -> Path:
    """An empty output folder, or a copy of the undisturbed one."""
    folder = bench.folder / out
    shutil.rmtree(folder, ignore_errors=True)
    if complete:
        shutil.copytree(bench.undisturbed, folder)
    return folder
