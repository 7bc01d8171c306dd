"""Every case with known tokens and labels: config and data as users write them, prepared in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from axolotl.config import Hardware, load_config, resolve
from axolotl.data.prepare import prepare
from axolotl.errors import UserError
from axolotl.model.tokenizer import load_tokenizer

TESTS = Path(__file__).resolve().parent.parent
CASES = sorted(p.parent.name for p in (TESTS / "goldens").glob("*/config.yml"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def in_order(rows: list[dict[str, Any]], order: str) -> list[dict[str, Any]]:
    return sorted(rows, key=json.dumps) if order == "any" else rows


def same(got: Any, expected: list[dict[str, Any]], order: str = "exact") -> None:
    rows = [{name: list(row[name]) for name in expected[0]} for row in got]
    assert in_order(rows, order) == in_order(expected, order)


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_labels(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = TESTS / "goldens" / name
    work = tmp_path / "goldens" / name
    shutil.copytree(case, work, ignore=shutil.ignore_patterns("expected*", "meta.json"))
    (tmp_path / "fixtures").symlink_to(TESTS / "fixtures")
    monkeypatch.chdir(work)
    about = json.loads((case / "meta.json").read_text())

    cfg, _ = resolve(load_config("config.yml"), Hardware(device="cpu"))
    tokenizer = load_tokenizer(cfg.model)
    seed = 42 if cfg.train.seed is None else cfg.train.seed
    if about["expect_error"]:
        with pytest.raises(UserError):
            prepare(cfg.data, tokenizer, seed=seed, places=cfg.place)
        assert not list(work.rglob("state.json"))
        return
    prepared = prepare(cfg.data, tokenizer, seed=seed, places=cfg.place)
    order = about.get("order", "exact")
    same(load_from_disk(str(prepared.train)), rows_of(case / "expected.jsonl"), order)
    assert prepared.train.joinpath("state.json").exists()
    if (case / "expected_test.jsonl").exists():
        same(load_from_disk(str(prepared.tests[0])), rows_of(case / "expected_test.jsonl"), order)
        times = [(p / "state.json").stat().st_mtime_ns for p in (prepared.train, *prepared.tests)]
        assert times == sorted(set(times))
    if (case / "expected_split_train.jsonl").exists():
        same(prepared.train_dataset(), rows_of(case / "expected_split_train.jsonl"))
        same(prepared.eval_dataset(), rows_of(case / "expected_split_eval.jsonl"))
