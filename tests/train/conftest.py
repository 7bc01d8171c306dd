"""The real trainer on a run in miniature."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from transformers import AutoTokenizer

from axolotl.config import Config, load_config
from axolotl.config.resolve import resolve
from axolotl.train.session import build_trainer
from train.miniature import CPU


@pytest.fixture(scope="session")
def tokenizer(tiny_llama3: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama3)


@pytest.fixture
def config(tmp_path: Path, tiny_llama3: Path) -> Callable[..., Config]:
    """config(learning_rate=1e-3, ...) → the resolved config of a small run into tmp_path / "out"."""

    def make(**keys: Any) -> Config:
        values = {
            "base_model": str(tiny_llama3),
            "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
            "output_dir": str(tmp_path / "out"),
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "sequence_len": 64,
            "save_strategy": "no",
            "val_set_size": 0.1,
        } | keys
        file = tmp_path / "config.yml"
        file.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return resolve(load_config(file), CPU)[0]

    return make


@pytest.fixture
def trainer(config: Callable[..., Config], tokenizer: Any) -> Callable[..., Any]:
    """trainer(model, train_rows, eval_rows, resume, **keys) → a trainer, with its config as `.cfg`."""

    def make(
        model: Any,
        train: datasets.Dataset,
        evaluation: datasets.Dataset | None = None,
        resume: Path | None = None,
        **keys: Any,
    ) -> Any:
        cfg = config(**keys)
        built = build_trainer(cfg, model, tokenizer, train, evaluation, CPU, resume)
        built.cfg = cfg
        return built

    return make
