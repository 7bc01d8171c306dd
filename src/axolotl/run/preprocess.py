"""`axolotl preprocess`: tokenise the datasets and save them; on request show what the model will see."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl import console
from axolotl.config import Config, Hardware
from axolotl.data.chat import choose_template, takes_tokenizer_template
from axolotl.data.prepare import prepare
from axolotl.data.prepared import Prepared
from axolotl.data.preview import preview
from axolotl.data.render import build_renderer
from axolotl.data.sample import prepare_sample
from axolotl.data.stream import Stream, open_stream, streamed_entries, streams, without_streams
from axolotl.data.workers import worker_count
from axolotl.distributed.world import world
from axolotl.errors import DataError
from axolotl.model.files import check_base_model
from axolotl.model.hub import check_hub
from axolotl.model.tokenizer import check as tokenizer_check
from axolotl.model.tokenizer import load_tokenizer
from axolotl.report.dataset import write_report
from axolotl.run.ready import ready, refuse, told_with_places
from axolotl.run.rows_beforehand import data_problems

if TYPE_CHECKING:
    from datasets import Dataset

    from axolotl.config.data import DatasetEntry


@told_with_places
def preprocess(
    cfg: Config, *, debug: bool = False, debug_text_only: bool = False, report: bool = False
) -> Prepared | None:
    """Prepares the data of a config; None where all of it is streamed. Of a stream, `debug` and `report` show the
    first rows. Raises a UserError for what the user can mend."""
    cfg = ready(cfg, Hardware(device="cpu", cpus=worker_count(None)))
    streamed = streams(cfg.data)
    show = debug or debug_text_only or report
    if streamed:
        console.note("The training data is streamed: it is tokenised while training goes on, not here.")
        if not cfg.data.test_datasets and not show:
            return None
    refuse(data_problems(cfg))
    tokenizer = tokenizer_of(cfg)
    prepared = prepare_data(cfg, tokenizer) if not streamed or cfg.data.test_datasets else None
    shown = prepared
    if streamed and show:
        shown = prepare_sample(_stream(cfg, tokenizer), cfg.data, seed=_seed(cfg))
    if shown and (debug or debug_text_only):
        preview(shown, tokenizer, ids=not debug_text_only)
    if shown and report:
        console.success(f"Report: {write_report(shown, tokenizer, shown.root / 'report.html')}")
    if prepared:
        console.success(f"Prepared data: {prepared.root}")
    return prepared


def tokenizer_of(cfg: Config, adapter_dir: Path | None = None) -> Any:
    """The tokenizer of the config, after a look at the files of the base model."""
    refuse([*check_base_model(cfg.model), *tokenizer_check(cfg.model), *check_hub(cfg.model.base_model)])
    return load_tokenizer(cfg.model, adapter_dir)


def prepare_data(cfg: Config, tokenizer: Any) -> Prepared:
    """The prepared datasets of the config, made now where they were not made before; of a stream, the test data.

    Raises DataError where there is none because all data is streamed.
    """
    data = without_streams(cfg.data) if streams(cfg.data) else cfg.data
    if streams(cfg.data) and not data.test_datasets:
        raise DataError(
            "the training data is streamed, so no row of it is held out.",
            "Name files under `test_datasets`.",
            cfg.place("pretraining_dataset" if cfg.data.pretraining_dataset else "streaming"),
        )
    return prepare(data, _as_in_training(cfg, tokenizer), seed=_seed(cfg), places=cfg.place)


def _as_in_training(cfg: Config, tokenizer: Any) -> Any:
    """The tokenizer with the template that came with the base model, where a dataset asks for that one and the saved
    tokenizer carries another (`carry_template`)."""
    entries = (*cfg.data.datasets, *cfg.data.test_datasets)
    own = [takes_tokenizer_template(cfg.data, entry) for entry in entries]
    carried = next((not o for entry, o in zip(entries, own, strict=True) if _is_chat(entry)), False)
    if not carried or not any(own):
        return tokenizer
    template = load_tokenizer(cfg.model).chat_template
    if template == tokenizer.chat_template:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def training_data(cfg: Config, tokenizer: Any) -> tuple[Dataset | Stream, Dataset | None]:
    """The rows to train on, prepared or streamed, and those to evaluate on."""
    if not streams(cfg.data):
        prepared = prepare_data(cfg, tokenizer)
        return prepared.train_dataset(), prepared.eval_dataset()
    held_out = prepare_data(cfg, tokenizer).eval_dataset() if cfg.data.test_datasets else None
    return _stream(cfg, tokenizer), held_out


def _stream(cfg: Config, tokenizer: Any) -> Stream:
    # Every process of a machine reads the stream for itself.
    workers = cfg.data.dataset_num_proc or max(1, min(4, worker_count(None) // world().size))
    return open_stream(cfg.data, tokenizer, seed=_seed(cfg), places=cfg.place, workers=workers)


def _seed(cfg: Config) -> int:
    return 42 if cfg.train.seed is None else cfg.train.seed


def stop_tokens(cfg: Config, tokenizer: Any) -> Sequence[str]:
    """The texts that end an answer in the config's datasets."""
    texts = [
        text
        for _, entry, _ in streamed_entries(cfg.data)
        for text in build_renderer(tokenizer, cfg.data, entry).stop_tokens()
    ]
    return list(dict.fromkeys(texts))


def carry_template(cfg: Config, tokenizer: Any) -> None:
    """Writes the chat template of the training data onto the tokenizer, so that it is saved with the weights."""
    entry = next(filter(_is_chat, cfg.data.datasets), None)
    if entry is not None:
        tokenizer.chat_template = choose_template(tokenizer, cfg.data, entry).text


def _is_chat(entry: DatasetEntry) -> bool:
    return isinstance(entry.type, str) and entry.type.startswith("chat_template")
