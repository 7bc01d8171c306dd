"""Loss counts every token once; exact match compares answers; nothing untrained is scored in silence."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from axolotl.config.adapter import AdapterSection
from axolotl.config.data import DataSection
from axolotl.config.model import ModelSection
from axolotl.errors import DataError, ModelError
from axolotl.inference.evaluate import evaluate_loss, exact_match, last_answer
from axolotl.inference.loading import find_trained, load_trained
from axolotl.model.adapter import add_adapter
from axolotl.model.load import load_model
from axolotl.model.tokenizer import load_tokenizer
from axolotl.run.evaluate import table
from scripted import CPU, LLAMA, scripted, teach

TEXT = "The old blue house"
LORA = AdapterSection(adapter="lora", lora_r=4, lora_alpha=8, lora_target_linear=True)
BASE = ModelSection(base_model=LLAMA)


def ragged(seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for n in (3, 17, 5, 40, 9):
        ids = torch.randint(0, 4000, (n,), generator=generator).tolist()
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * (n // 3) + ids[n // 3 :])
    return Dataset.from_dict(rows)


@pytest.mark.parametrize("budget", [40, 64, 100_000])
def test_loss_is_the_mean_over_all_trained_tokens(budget: int) -> None:
    model = load_model(BASE, AdapterSection(), load_tokenizer(BASE), CPU, training=False)
    data = ragged()
    seen: list[int] = []
    report = evaluate_loss(model, data, tokens_per_batch=budget, on_batch=seen.append)
    total = count = 0.0
    for row in data:
        n = sum(label != -100 for label in row["labels"][1:])
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        total += float(model(input_ids=ids, labels=labels).loss) * n
        count += n
    assert report.tokens == count
    assert math.isclose(report.loss, total / count, rel_tol=1e-5)
    assert math.isclose(report.perplexity, math.exp(report.loss))
    assert seen[-1] == report.rows == 5


def test_nothing_to_count_is_told() -> None:
    model = load_model(BASE, AdapterSection(), load_tokenizer(BASE), CPU, training=False)
    with pytest.raises(DataError, match="no row in which any token counts"):
        evaluate_loss(model, Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, -100]]}))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([-100, -100, 3, 4], ([1, 2], [3, 4])),
        ([-100, 2, -100, 4], ([1, 2, 3], [4])),
        ([-100, 2, 3, -100], ([1], [2, 3])),
        ([1, 2, 3, 4], None),
        ([-100] * 4, None),
    ],
)
def test_the_last_answer_of_a_row(labels: list[int], expected: Any) -> None:
    assert last_answer([1, 2, 3, 4], labels) == expected


def test_exact_match(tmp_path: Path) -> None:
    loaded = scripted(TEXT)
    good = loaded.tokenizer.encode(TEXT, add_special_tokens=False)
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for question, answer in (("hi", good), ("a longer hi", [*good, 4084]), ("hm hi", good[:-1]), ("hi", [])):
        prompt = loaded.prompter.ask(question)
        rows["input_ids"].append(prompt + answer)
        rows["labels"].append([-100] * len(prompt) + answer)
    report = exact_match(loaded.model, loaded.tokenizer, Dataset.from_dict(rows), loaded.stops, batch_size=2)
    assert (report.matches, report.rows, report.skipped) == (2, 3, 1)
    assert [s.match for s in report.samples] == [True, True, False]
    assert report.samples[2].expected == "The old blue h"
    assert report.share == 2 / 3
    figures = {
        "loss": 1.0,
        "perplexity": 2.7,
        "rows": 4,
        "tokens": 9,
        "exact_match": 2 / 3,
        "matches": 2,
        "asked": 3,
    }
    assert "(2 of 3; every answer" in table(figures)[-1]
    assert (
        "(2 of 3; 1 more hold no question to ask; every"
        in table({**figures, "not_asked": report.skipped})[-1]
    )
    report.write_csv(tmp_path / "t" / "match.csv")
    with (tmp_path / "t" / "match.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["match"] for row in written] == ["True", "True", "False"]
    assert written[0]["answer"] == TEXT
    assert (
        exact_match(loaded.model, loaded.tokenizer, Dataset.from_dict(rows), loaded.stops, max_rows=1).rows
        == 1
    )


def save_adapter(folder: Path, trained: bool = True, base: str = LLAMA) -> Path:
    section = ModelSection(base_model=base)
    model = add_adapter(load_model(section, LORA, load_tokenizer(section), CPU, training=True), LORA, seed=1)
    if trained:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.01
    model.save_pretrained(folder)
    return folder


def test_what_a_run_left_is_found(tmp_path: Path) -> None:
    assert find_trained(BASE, LORA, tmp_path).adapter is None
    ninth = save_adapter(tmp_path / "checkpoint-9")
    tenth = save_adapter(tmp_path / "checkpoint-10")
    assert find_trained(BASE, LORA, tmp_path).adapter == tenth
    save_adapter(tmp_path)
    assert find_trained(BASE, LORA, tmp_path).adapter == tmp_path
    named = LORA.model_copy(update={"lora_model_dir": str(ninth)})
    assert find_trained(BASE, named, tmp_path).adapter == ninth
    with pytest.raises(ModelError, match=r"`lora_model_dir: ./no/where` is not a folder"):
        find_trained(BASE, LORA.model_copy(update={"lora_model_dir": "./no/where"}), tmp_path)


def test_a_merged_model_is_taken_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(tmp_path / "out")
    merged = ModelSection(base_model=str(tmp_path / "merged"))
    (tmp_path / "merged").mkdir()
    assert find_trained(merged, LORA, tmp_path / "out").adapter is None
    assert "is used alone" in capsys.readouterr().err


def test_a_device_that_is_not_here_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="`device: cpuu` is no device of PyTorch") as told:
        load_trained(
            BASE.model_copy(update={"device": "cpuu"}), LORA, DataSection(), CPU, tmp_path, untrained=True
        )
    assert told.value.problems[0].keys == ("device",)


def test_an_adapter_of_another_base_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = LORA.model_copy(update={"lora_model_dir": str(save_adapter(tmp_path / "a"))})
    other = ModelSection(base_model=str(Path(LLAMA).with_name("tiny-chatml")))
    with pytest.raises(ModelError, match="one is a `llama` model, the other a `qwen2` model"):
        find_trained(other, named, tmp_path)
    twin = shutil.copytree(LLAMA, tmp_path / "twin")
    assert find_trained(ModelSection(base_model=str(twin)), named, tmp_path).adapter == tmp_path / "a"
    assert f"was trained on `{LLAMA}`, not on `{twin}`" in capsys.readouterr().err.replace("\n", " ")
    find_trained(BASE, named, tmp_path)
    assert capsys.readouterr().err == ""


def test_a_fully_trained_model_is_loaded_instead_of_the_base(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(BASE)
    model = load_model(BASE, AdapterSection(), tokenizer, CPU, training=True)
    teach(model, [])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_trained(BASE, AdapterSection(), DataSection(), CPU, tmp_path)
    assert loaded.source == str(tmp_path)
    assert loaded.model.lm_head.weight.abs().max() == 0


def test_trained_and_untrained_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, fresh = save_adapter(tmp_path / "good"), save_adapter(tmp_path / "fresh", trained=False)
    loaded = load_trained(BASE, LORA, DataSection(), CPU, good, require_training=True)
    ids = torch.tensor([[5, 6, 7]])
    base = load_model(BASE, LORA, load_tokenizer(BASE), CPU, training=False)
    assert not torch.allclose(loaded.model(ids).logits, base(ids).logits, atol=1e-3)
    assert 4084 in loaded.stops.ids
    with pytest.raises(ModelError, match="was never trained"):
        load_trained(BASE, LORA, DataSection(), CPU, fresh, require_training=True)
    with pytest.raises(ModelError, match="there is no trained adapter"):
        load_trained(BASE, LORA, DataSection(), CPU, tmp_path / "nothing", require_training=True)
    with pytest.raises(ModelError, match="holds no trained weights"):
        load_trained(BASE, AdapterSection(), DataSection(), CPU, tmp_path / "nothing", require_training=True)
    bare = load_trained(BASE, LORA, DataSection(), CPU, good, untrained=True)
    assert torch.equal(bare.model(ids).logits, base(ids).logits)
    capsys.readouterr()
    load_trained(BASE, LORA, DataSection(), CPU, tmp_path / "nothing")
    assert "The base model answers alone" in capsys.readouterr().err
