"""Formats against the expected tokens of the golden cases, tokenised here piece by piece with the bare tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from axolotl.config.data import DataSection
from axolotl.data.formats import check_fields, resolve_format
from axolotl.data.types import Completion, Pieces, Tokenized

CASES = [
    "alpaca_basic",
    "alpaca_chat_concise",
    "alpaca_chatml_tok",
    "alpaca_instruct",
    "alpaca_no_input_field",
    "alpaca_train_on_inputs",
    "alpaca_unicode",
    "completion_field",
    "completion_short",
    "gpteacher",
    "input_output",
    "pretokenized",
    "user_defined_full",
    "user_defined_simple",
]
EOS = {"tiny-llama3": "<|end_of_text|>", "tiny-chatml": "<|im_end|>"}


def tokens(value: object, tokenizer: Tokenizer, eos: int) -> tuple[list[int], list[int]]:
    if isinstance(value, Tokenized):
        return value.input_ids, value.labels
    ids: list[int] = []
    labels: list[int] = []
    if isinstance(value, Completion):
        ids = tokenizer.encode(value.text).ids
        return [*ids, eos], [*ids, eos]
    assert isinstance(value, Pieces)
    for piece in value.pieces:
        if not piece.text:
            continue
        part = tokenizer.encode(piece.text, add_special_tokens=piece.bos).ids
        part += [eos] * (piece.eos - (part[-1] == eos))
        ids += part
        labels += part if piece.train else [-100] * len(part)
    return ids, labels


@pytest.mark.parametrize("case", CASES)
def test_expected_tokens(case: str, goldens: Path, fixtures: Path) -> None:
    folder = goldens / case
    config = yaml.safe_load((folder / "config.yml").read_text())
    model = Path(config["base_model"]).name
    # As transformers loads it: for some models that is not quite what tokenizer.json says.
    tokenizer = AutoTokenizer.from_pretrained(fixtures / model).backend_tokenizer
    eos = tokenizer.token_to_id(EOS[model])
    data = DataSection.model_validate(
        {"datasets": config["datasets"], "train_on_inputs": config.get("train_on_inputs", False)}
    )
    entry = data.datasets[0]
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().split("\n") if line.strip()]
    columns = list(dict.fromkeys(k for row in rows for k in row))
    chosen = resolve_format(entry, columns, data)
    assert check_fields(chosen, columns, entry) is None
    expected = [
        json.loads(line) for line in (folder / "expected.jsonl").read_text().split("\n") if line.strip()
    ]
    got = [tokens(chosen.convert(row), tokenizer, eos) for row in rows]
    got = [pair for pair in got if any(label != -100 for label in pair[1])]
    assert got == [(row["input_ids"], row["labels"]) for row in expected]
