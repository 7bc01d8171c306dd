"""Runs of the real command in several processes: a small config, its losses, its weights."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

WORDS = [
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "you",
    "that",
    "it",
    "he",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "I",
    "at",
    "be",
    "this",
    "have",
    "from",
]
HERE = Path(__file__).parent


class Runs:
    """A folder with rows and a config; each run goes into a folder of its own in it."""

    def __init__(self, folder: Path, model: Path, **keys: Any) -> None:
        self.folder = folder
        draw = random.Random(0)
        with (folder / "rows.jsonl").open("w") as stream:
            for _ in range(60):
                row = {
                    "instruction": " ".join(draw.choices(WORDS, k=5)),
                    # Some rows train many tokens, some hardly any: shares of ranks are never equal.
                    "output": " ".join(draw.choices(WORDS, k=draw.choice([1, 3, 10, 40]))),
                }
                stream.write(json.dumps(row) + "\n")
        values = {
            "base_model": str(model),
            "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
            "output_dir": "out",
            "dataset_prepared_path": "prepared",
            "sequence_len": 128,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "learning_rate": 0.003,
            "optimizer": "adamw_torch",
            "max_steps": 6,
            "save_steps": 3,
            "val_set_size": 0.1,
            "sample_packing": True,
        } | keys
        (folder / "config.yml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))

    def command(self, name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "axolotl", "train", "config.yml", "--output-dir", name, *arguments]

    def start(self, name: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Starts a run; what it says on stderr can be read."""
        return subprocess.Popen(
            self.command(name, *arguments),
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": self.path()} | environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    @staticmethod
    def path() -> str:
        """Where the processes find the plugins of these tests."""
        return os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(self, name: str, *arguments: str, code: int = 0, timeout: float = 240, **environment: str) -> str:
        """Runs to the end; returns what was said on stderr."""
        process = self.start(name, *arguments, **environment)
        try:
            _, said = process.communicate(timeout=timeout)
        finally:
            process.kill()
        assert process.returncode == code, said
        return said

    def logged(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name / "run.jsonl").read_text().splitlines()]

    def losses(self, name: str) -> dict[str, float]:
        """Training and evaluation losses by step."""
        return {
            f"{key}{line['step']}": line[key]
            for line in self.logged(name)
            for key in ("loss", "eval_loss")
            if key in line
        }

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """The final weights, of a model or an adapter."""
        files = sorted((self.folder / name).glob("*model*.safetensors"))
        return {key: value for file in files for key, value in load_file(file).items()}


def furthest(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The greatest difference between numbers, or tensors, of the same names."""
    assert a.keys() == b.keys() and a
    return max(
        float((torch.as_tensor(a[k]).double() - torch.as_tensor(b[k]).double()).abs().max()) for k in a
    )


def eventually(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Waits until something is so; fails otherwise."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)
