"""Rules about data that is read while training goes on."""

from __future__ import annotations

from collections.abc import Iterator

from axolotl.config.config import Config
from axolotl.config.rules.rulebook import TRAINING, conflict, rule, warning
from axolotl.errors import Problem

# What needs all rows at hand before training starts.
_WHOLE_DATA = {
    "dataset_exact_deduplication": "compares every row with all others",
    "dataset_shard_num": "cuts the whole data into parts",
    "push_dataset_to_hub": "uploads prepared data",
    "skip_prepare_dataset": "hands rows over unprepared",
}
_PRETRAINING_ONLY = ("pretrain_multipack_attn", "pretraining_sample_concatenation")


def _streamed(cfg: Config) -> str | None:
    """The key that makes the training data a stream; None where it is prepared first."""
    if cfg.data.pretraining_dataset:
        return "pretraining_dataset"
    return "streaming" if cfg.data.streaming else None


@rule("pretraining_dataset", "streaming", "max_steps", verbs=TRAINING)
def a_stream_needs_its_steps(cfg: Config) -> Iterator[Problem]:
    """How long a stream is, nobody knows beforehand."""
    key = _streamed(cfg)
    if key and not cfg.train.max_steps:
        yield conflict(
            f"`{key}` streams the data, whose length is not known: it needs `max_steps`.",
            "Add `max_steps:` with the number of optimizer steps.",
            key,
            "max_steps",
            kind="missing",
        )


@rule("pretraining_dataset", "streaming", "val_set_size")
def a_stream_holds_no_rows_out(cfg: Config) -> Iterator[Problem]:
    """A share of rows can only be held out of data that is there as a whole."""
    key = _streamed(cfg)
    if key and cfg.data.val_set_size:
        yield warning(
            f"`val_set_size` has no effect: no rows are held out of data that `{key}` streams.",
            "Delete it, and name files to evaluate on under `test_datasets`.",
            "val_set_size",
            key,
        )


@rule("pretraining_dataset", "datasets")
def one_kind_of_training_data(cfg: Config) -> Iterator[Problem]:
    """The two lists are trained in different ways."""
    if cfg.data.pretraining_dataset and cfg.data.datasets:
        yield conflict(
            "`pretraining_dataset` and `datasets` are both set.",
            "Keep one of them; plain text goes under `datasets` with `type: completion`.",
            "pretraining_dataset",
            "datasets",
        )


@rule("pretraining_dataset")
def every_corpus_has_a_path(cfg: Config) -> Iterator[Problem]:
    """An entry says where its text is."""
    for index, entry in enumerate(cfg.data.pretraining_dataset):
        if not entry.path:
            yield conflict(
                f"`pretraining_dataset[{index}]` has no `path`.",
                "Add `path:` with a file, a folder or a Hub name.",
                f"pretraining_dataset[{index}].path",
                kind="missing",
            )


@rule("pretraining_dataset", "streaming", *_WHOLE_DATA)
def a_stream_is_never_whole(cfg: Config) -> Iterator[Problem]:
    """Some steps of preparation look at all rows before the first is trained."""
    key = _streamed(cfg)
    for other, does in _WHOLE_DATA.items():
        if key and cfg.get(other):
            yield conflict(
                f"`{other}` {does}, but `{key}` streams it.",
                f"Delete `{other}`, or prepare the data first: without `{key}`.",
                other,
                key,
            )


@rule("pretraining_dataset", *_PRETRAINING_ONLY)
def pretraining_keys_need_a_corpus(cfg: Config) -> Iterator[Problem]:
    """Documents of other data are always kept apart."""
    for key in _PRETRAINING_ONLY:
        if (
            cfg.is_set(key)
            and not cfg.data.pretraining_dataset
            and cfg.get(key) != (key == _PRETRAINING_ONLY[0])
        ):
            yield warning(f"`{key}` has no effect without `pretraining_dataset`.", f"Delete `{key}`.", key)
