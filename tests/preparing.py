"""What the tests of preparation share: small rows, a small config, and processes that die on purpose."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from axolotl.config.data import DataSection

FIXTURES = Path(__file__).resolve().parent / "fixtures"


def llama3() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(FIXTURES / "tiny-llama3")


def alpaca(count: int, words: int = 3) -> list[dict[str, str]]:
    """Rows that all differ, of different lengths."""
    return [
        {
            "instruction": f"Count to {i}",
            "input": "",
            "output": " ".join(str(i + k) for k in range(words + i % 5)),
        }
        for i in range(count)
    ]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def section(*paths: Path, folder: Path, **values: Any) -> DataSection:
    """A config of alpaca files, prepared below `folder`."""
    entries = [{"path": str(path), "type": "alpaca"} for path in paths]
    return DataSection.model_validate(
        {"datasets": entries, "dataset_prepared_path": str(folder), "sequence_len": 256, **values}
    )


def in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a forked process; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of all prepared rows and their index, by file name."""
    names = [p for p in sorted(folder.rglob("*")) if p.suffix in (".arrow", ".parquet")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in names}
