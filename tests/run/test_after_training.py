"""What training prepared is what the verbs after it read: no row is tokenised twice, or with another template."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from preparing import FIXTURES, alpaca, write_rows

Command = Callable[..., subprocess.CompletedProcess[str]]


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {i}?"},
                {"role": "assistant", "content": f"{i}."},
            ]
        }
        for i in range(count)
    ]


def config(folder: Path, **values: Any) -> Path:
    plain = {
        "base_model": str(FIXTURES / "tiny-llama3"),
        "val_set_size": 0.2,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "sequence_len": 256,
        "micro_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        **values,
    }
    file = folder / "config.yml"
    file.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return file


@pytest.mark.slow
@pytest.mark.parametrize("case", ["several templates", "added tokens", "all weights"])
def test_evaluating_and_merging_find_what_training_prepared(
    tmp_path: Path, axolotl: Command, case: str
) -> None:
    chats = str(write_rows(tmp_path / "a.jsonl", conversations(20)))
    others = str(write_rows(tmp_path / "b.jsonl", conversations(10)))
    rows = str(write_rows(tmp_path / "c.jsonl", alpaca(20)))
    plain = {"path": chats, "type": "chat_template"}
    values: dict[str, Any] = {"datasets": [plain], "chat_template": "chatml"}
    if case == "several templates":
        values = {
            "datasets": [
                {**plain, "chat_template": "gemma"},
                {**plain, "path": others, "chat_template": "tokenizer_default"},
                {"path": rows, "type": "alpaca"},
            ]
        }
    elif case == "added tokens":
        values |= {
            "tokens": ["<mark>"],
            "special_tokens": {
                "pad_token": "<|reserved_special_token_1|>",
                "additional_special_tokens": ["<z>"],
            },
            "added_tokens_overrides": {4090: "<zap>"},
            "lora_modules_to_save": ["embed_tokens", "lm_head"],
        }
    elif case == "all weights":
        values["adapter"] = None
    file = config(tmp_path, **values)
    done = axolotl("train", file)
    assert done.returncode == 0, done.stderr
    prepared = list((tmp_path / "prepared").iterdir())
    for verb in ("evaluate",) if case == "all weights" else ("evaluate", "merge-lora"):
        done = axolotl(verb, file)
        assert done.returncode == 0, done.stderr
        assert "prepared data found" in done.stderr
        assert "preparing again" not in done.stderr
        assert list((tmp_path / "prepared").iterdir()) == prepared
