"""What every test stands on: no network, one thread, throw-away caches, the tiny models, small datasets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before any library reads them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    HF_HOME=tempfile.mkdtemp(prefix="axolotl-tests-hf-"),
    WANDB_MODE="disabled",
    COLUMNS="200",
)
if not Path("/dev/nvidiactl").exists():
    # Triton decides when it is first imported, for the whole process.
    os.environ["TRITON_INTERPRET"] = "1"
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
    os.environ.pop(name, None)

TESTS = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def _registries_as_they_were() -> Iterator[None]:
    """What a test registers is gone after it: other tests, and their worker processes, cannot import it."""
    from axolotl.data.formats import formats
    from axolotl.optim.registry import optimizers, schedules

    registries = (formats, optimizers, schedules)
    for registry in registries:
        registry.names()
    before = [set(r.names()) for r in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry.names()) - names:
            registry.forget(name)


@pytest.fixture(scope="session")
def project() -> Path:
    """The project's root."""
    return TESTS.parent


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of the tiny models."""
    return TESTS / "fixtures"


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of the cases with expected tokens."""
    return TESTS / "goldens"


@pytest.fixture(scope="session")
def tiny_llama3(fixtures: Path) -> Path:
    """A random Llama with Llama-3's special tokens."""
    return fixtures / "tiny-llama3"


@pytest.fixture(scope="session")
def tiny_chatml(fixtures: Path) -> Path:
    """A random Qwen2 with ChatML tokens."""
    return fixtures / "tiny-chatml"


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Iterable[dict[str, Any]]], Path]:
    """write_jsonl("train.jsonl", rows) → the file's path, in this test's folder."""

    def write(name: str, rows: Iterable[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def axolotl() -> Callable[..., subprocess.CompletedProcess[str]]:
    """axolotl("train", "config.yml", cwd=...) runs the real command in a process of its own."""

    def run(*args: str | Path, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "axolotl", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)

    return run
