"""Batches of a stream: every row once in a pass, the same for any number of ranks, resumed bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from axolotl.config.data import DataSection
from axolotl.config.train import TrainSection
from axolotl.data.stream import Stream, open_stream
from axolotl.errors import ConfigError
from axolotl.model.attention import AttentionChoice
from axolotl.train.session import train
from axolotl.train.streamed import PLACE, Place, StreamSource, stream_batches
from preparing import llama3, write_rows
from train.miniature import losses, rows, same_weights, tiny_model, weights

TOKENIZER = llama3()
SDPA, FLASH = AttentionChoice("sdpa", "", joined=False), AttentionChoice("flash", "", joined=True)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = ({"text": f"{i} " + "so " * (1 + i * 7 % 20)} for i in range(50))
    return write_rows(tmp_path / "corpus.jsonl", texts)


def data(corpus: Path, **values: Any) -> DataSection:
    keys = {
        "pretraining_dataset": [{"path": str(corpus)}],
        "sequence_len": 96,
        "sample_packing": True,
        "streaming_multipack_buffer_size": 16,
    }
    return DataSection.model_validate(keys | values)


def source(section: DataSection, attention: AttentionChoice = SDPA, **values: Any) -> StreamSource:
    section_ = TrainSection.model_validate({"max_steps": 12, "micro_batch_size": 2, **values})
    return stream_batches(open_stream(section, TOKENIZER), section, section_, attention, pad_token_id=0)


def batches(found: StreamSource, rank: int = 0, ranks: int = 1, steps: int = 12) -> list[torch.Tensor]:
    loader = found.loader(TrainSection.model_validate({"max_steps": steps}), rank, ranks)
    try:
        return [batch["input_ids"] for batch in loader]
    finally:
        found.close()


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("attention", [SDPA, FLASH], ids=["sdpa", "flash"])
@pytest.mark.parametrize("packed", [True, False])
def test_ranks_share_the_batches_of_one_process(
    corpus: Path, packed: bool, attention: AttentionChoice
) -> None:
    section = data(corpus, sample_packing=packed)
    alone = batches(source(section, attention))
    both = [batches(source(section, attention), rank, 2, steps=6) for rank in (0, 1)]
    assert same([b for pair in zip(*both, strict=True) for b in pair], alone)


def test_a_pass_holds_every_row_once(corpus: Path) -> None:
    found = source(data(corpus))
    numbers: list[int] = []
    for n in range(200):
        for bin_ in found.rows.__getitems__([n]):
            texts = (TOKENIZER.decode(ids, skip_special_tokens=True) for ids, _ in bin_)
            numbers += [int(text.split()[0]) for text in texts]
        if len(numbers) >= 100:
            break
    found.close()
    assert sorted(numbers[:50]) == sorted(numbers[50:100]) == list(range(50))
    assert numbers[:50] != numbers[50:100], "each pass has an order of its own"
    assert numbers[:50] != list(range(50))


def test_in_order_without_shuffling(corpus: Path) -> None:
    section = data(corpus, sample_packing=False, shuffle_merged_datasets=False)
    seen = [
        TOKENIZER.decode(row, skip_special_tokens=True).split()[0]
        for b in batches(source(section))
        for row in b
    ]
    assert seen == [str(i) for i in range(24)]


def test_a_place_spares_reading_what_is_before_it(corpus: Path, tmp_path: Path) -> None:
    through = source(data(corpus))
    wanted = batches(through)
    through.rows._batch(9)
    for name, text in through.place(9).items():
        (tmp_path / name).write_text(text)
    through.close()
    place = Place.read(tmp_path / PLACE)
    assert place is not None and 0 < place.batch <= 9
    again = source(data(corpus))
    again.go_to(tmp_path)
    assert torch.equal(again.collator(again.rows.__getitems__([9]))["input_ids"], wanted[9])
    again.close()
    assert again.rows.stream.counts[0].read <= 50 - place.position[0].row + 16


def test_a_damaged_place_means_reading_all_again(corpus: Path, tmp_path: Path) -> None:
    wanted = batches(source(data(corpus)))
    for text in ("", "{}", json.dumps({"buffer": 1, "batch": 2, "position": []})):
        (tmp_path / PLACE).write_text(text)
        again = source(data(corpus))
        again.go_to(tmp_path)
        assert same(batches(again), wanted)


def test_documents_join_where_asked(corpus: Path) -> None:
    apart = source(data(corpus))
    assert "position_ids" in next(iter(apart.loader(TrainSection.model_validate({"max_steps": 1}))))
    for values in (
        {"pretrain_multipack_attn": False},
        {"sample_packing": False, "pretraining_sample_concatenation": True},
    ):
        joined = source(data(corpus, **values))
        batch = next(iter(joined.loader(TrainSection.model_validate({"max_steps": 1}))))
        joined.close()
        assert "position_ids" not in batch
        assert (batch["input_ids"] == TOKENIZER.eos_token_id).sum() > len(batch["input_ids"])
    apart.close()


def test_a_stream_without_max_steps_cannot_be_trained(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="max_steps"):
        source(data(corpus)).volume(TrainSection())


def open_(cfg: Any) -> Stream:
    return open_stream(cfg.data, TOKENIZER, seed=42)


CASES: dict[str, dict[str, Any]] = {
    "packed": {"sample_packing": True, "micro_batch_size": 1},
    "single rows, accumulated": {"gradient_accumulation_steps": 3},
    "joined": {"sample_packing": True, "pretrain_multipack_attn": False},
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_bit_identical(
    trainer: Any, config: Any, corpus: Path, tmp_path: Path, case: str
) -> None:
    keys = {
        "datasets": None,
        "pretraining_dataset": [{"path": str(corpus)}],
        "val_set_size": None,
        "streaming_multipack_buffer_size": 8,
        "max_steps": 13,
        "save_steps": 9,
        "save_strategy": "steps",
        **CASES[case],
    }

    def run(name: str, resume: Path | None, seed: int) -> Any:
        values = keys | {"output_dir": str(tmp_path / name)}
        made = trainer(tiny_model(dropout=0.1, seed=seed), open_(config(**values)), rows(3), resume, **values)
        train(made, made.cfg, resume)
        return made

    through = run("through", None, 0)
    folder = tmp_path / "through" / "checkpoint-9"
    place = Place.read(folder / PLACE)
    assert place is not None and place.batch > 0, "the checkpoint knows where to read on"
    again = run("again", folder, 1)
    assert losses(again) == losses(through)
    assert same_weights(weights(again.model), weights(through.model))
    assert again.trained_tokens == through.trained_tokens
    read = [made.parts.batches.rows.stream.counts[0].read for made in (again, through)]
    assert read[0] < read[1]
