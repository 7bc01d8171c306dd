"""Rules about datasets, templates, length and packing."""

from __future__ import annotations

from collections.abc import Iterator

from axolotl.config.config import Config
from axolotl.config.datasets import DatasetEntry
from axolotl.config.rules.rulebook import TRAINING, conflict, rule, warning
from axolotl.errors import Problem

# What only conversations have; a format that reads plain columns cannot use it.
_CHAT_KEYS = (
    "field_messages",
    "message_property_mappings",
    "message_field_training",
    "message_field_training_detail",
    "roles",
    "roles_to_train",
    "train_on_eos",
    "train_on_eot",
    "chat_template",
    "field_tools",
    "split_thinking",
    "drop_system_message",
)
_PLAIN_FORMATS = (
    "alpaca",
    "completion",
    "input_output",
    "jeopardy",
    "summarizetldr",
    "reflection",
    "gpteacher",
)


def _entries(cfg: Config) -> Iterator[tuple[str, DatasetEntry]]:
    for name in ("datasets", "test_datasets"):
        for index, entry in enumerate(getattr(cfg.data, name)):
            yield f"{name}[{index}]", entry


@rule("base_model")
def base_model_is_there(cfg: Config) -> Iterator[Problem]:
    """Nothing starts without a model."""
    if not cfg.model.base_model:
        yield conflict(
            "`base_model` is missing.",
            "Add `base_model:` with a folder or a Hub name.",
            "base_model",
            kind="missing",
        )


@rule("datasets", verbs=TRAINING)
def datasets_are_there(cfg: Config) -> Iterator[Problem]:
    """Training needs data."""
    if not cfg.data.datasets and not cfg.data.pretraining_dataset:
        yield conflict(
            "`datasets` is missing.",
            "Add `datasets:` with an entry of `- path:` and `type:`.",
            "datasets",
            "pretraining_dataset",
            "streaming",
            kind="missing",
        )


@rule("datasets", "test_datasets")
def every_dataset_has_a_path(cfg: Config) -> Iterator[Problem]:
    """An entry says where its rows are."""
    for at, entry in _entries(cfg):
        if not entry.path and entry.type != "_synthetic":
            yield conflict(
                f"`{at}` has no `path`.",
                "Add `path:` with a file, a folder or a Hub name.",
                f"{at}.path",
                kind="missing",
            )


@rule("val_set_size", "test_datasets")
def one_source_of_evaluation(cfg: Config) -> Iterator[Problem]:
    """Evaluation rows come from a share of the training data, or from datasets of their own."""
    if cfg.data.test_datasets and cfg.data.val_set_size:
        yield conflict(
            "`val_set_size` and `test_datasets` both say what to evaluate on.",
            "Set `val_set_size: 0`, or delete `test_datasets`.",
            "val_set_size",
            "test_datasets",
        )


@rule("val_set_size")
def val_set_size_leaves_rows(cfg: Config) -> Iterator[Problem]:
    """A share is below 1; a count is whole."""
    size = cfg.data.val_set_size
    if size == 1:
        yield conflict(
            "`val_set_size: 1` keeps every row for evaluation and none for training.",
            "Write a share below 1, or a number of rows above 1.",
            "val_set_size",
            kind="invalid_value",
        )
    elif size > 1 and size != int(size):
        yield conflict(
            f"`val_set_size` is `{size}`, neither a share below 1 nor a whole number of rows.",
            "Write a share below 1, or a number of rows.",
            "val_set_size",
            kind="invalid_value",
        )


@rule("chat_template", "chat_template_jinja", "datasets")
def jinja_needs_its_text(cfg: Config) -> Iterator[Problem]:
    """`chat_template: jinja` means: the template is in chat_template_jinja."""
    if cfg.data.chat_template == "jinja" and not cfg.data.chat_template_jinja:
        yield conflict(
            "`chat_template: jinja` needs the template in `chat_template_jinja`.",
            "Add `chat_template_jinja:` with the template or its file.",
            "chat_template",
            "chat_template_jinja",
            kind="missing",
        )
    for at, entry in _entries(cfg):
        if entry.chat_template == "jinja" and not (entry.chat_template_jinja or cfg.data.chat_template_jinja):
            yield conflict(
                f"`{at}.chat_template: jinja` needs the template in `chat_template_jinja`.",
                "Add `chat_template_jinja:` to this entry.",
                f"{at}.chat_template",
                kind="missing",
            )


@rule("chat_template", "chat_template_jinja")
def a_template_has_one_source(cfg: Config) -> Iterator[Problem]:
    """Only `chat_template: jinja` reads the text of a template; another name goes before it."""
    name = cfg.data.chat_template
    if cfg.data.chat_template_jinja and name not in (None, "jinja"):
        if name.startswith("tokenizer_default"):
            yield warning(
                f"`chat_template_jinja` is used, not the tokenizer's own template as `{name}` says.",
                "Write `chat_template: jinja`, or delete `chat_template_jinja`.",
                "chat_template_jinja",
                "chat_template",
            )
        else:
            yield warning(
                f"`chat_template_jinja` has no effect beside `chat_template: {name}`.",
                "Write `chat_template: jinja`, or delete `chat_template_jinja`.",
                "chat_template_jinja",
                "chat_template",
            )


@rule("datasets", "test_datasets", "dataset_shard_num", "dataset_shard_idx")
def shards_are_counted_from_zero(cfg: Config) -> Iterator[Problem]:
    """The index of a shard is below their number."""
    pairs = [(f"{at}.shards", e.shards, f"{at}.shards_idx", e.shards_idx) for at, e in _entries(cfg)]
    pairs.append(
        ("dataset_shard_num", cfg.data.dataset_shard_num, "dataset_shard_idx", cfg.data.dataset_shard_idx)
    )
    for many, number, which, index in pairs:
        if index is not None and number is None:
            yield conflict(
                f"`{which}` chooses a part, but `{many}` does not say how many there are.",
                f"Add `{many.rpartition('.')[2]}:`.",
                which,
                many,
            )
        elif index is not None and number is not None and index >= number:
            yield conflict(
                f"`{which}` is `{index}`, but there are only {number} parts, counted from 0.",
                f"Write a number from 0 to {number - 1}.",
                which,
                many,
                kind="invalid_value",
            )


@rule("min_sample_len", "sequence_len")
def rows_fit_between_the_limits(cfg: Config) -> Iterator[Problem]:
    """The shortest row allowed is not longer than the longest."""
    if cfg.data.min_sample_len is not None and cfg.data.min_sample_len > cfg.data.sequence_len:
        yield conflict(
            "`min_sample_len` is above `sequence_len`, so every row would be dropped.",
            "Lower `min_sample_len`.",
            "min_sample_len",
            "sequence_len",
        )


@rule("sample_packing", "batch_flattening")
def one_way_of_joining_rows(cfg: Config) -> Iterator[Problem]:
    """Packing and flattening both join rows."""
    if cfg.data.sample_packing and cfg.data.batch_flattening is True:
        yield conflict(
            "`sample_packing` and `batch_flattening` both join rows.",
            "Delete `batch_flattening`.",
            "batch_flattening",
            "sample_packing",
        )


@rule("sample_packing", "group_by_length")
def packed_rows_have_one_length(cfg: Config) -> Iterator[Problem]:
    """Grouping by length has nothing to do once rows are packed."""
    if cfg.data.sample_packing and cfg.data.group_by_length:
        yield warning(
            "`group_by_length` has no effect with `sample_packing`: packed rows are of one length.",
            "Delete `group_by_length`.",
            "group_by_length",
            "sample_packing",
        )


@rule("group_by_length", "curriculum_sampling")
def one_order_of_rows(cfg: Config) -> Iterator[Problem]:
    """Grouping by length would change the order that curriculum sampling keeps."""
    if cfg.data.group_by_length and cfg.data.curriculum_sampling:
        yield warning(
            "`group_by_length` has no effect beside `curriculum_sampling`, which keeps the order of the data.",
            "Delete one of them.",
            "group_by_length",
            "curriculum_sampling",
        )


@rule("datasets", "test_datasets")
def conversation_keys_need_conversations(cfg: Config) -> Iterator[Problem]:
    """Keys about messages do nothing for formats that read plain columns."""
    for at, entry in _entries(cfg):
        if isinstance(entry.type, str) and entry.type.split(":")[0].split(".")[0] in _PLAIN_FORMATS:
            for key in _CHAT_KEYS:
                if key in entry.model_fields_set:
                    yield warning(
                        f"`{at}.{key}` has no effect on `type: {entry.type}`, which reads plain columns.",
                        "Write `type: chat_template` if the rows are conversations.",
                        f"{at}.{key}",
                    )


@rule("datasets")
def a_dataset_is_listed_once(cfg: Config) -> Iterator[Problem]:
    """Two equal entries train every row twice."""
    entries = cfg.data.datasets
    for index, entry in enumerate(entries):
        if entry in entries[:index]:
            first = entries.index(entry)
            yield warning(
                f"`datasets[{index}]` is the same as `datasets[{first}]`: its rows are trained twice.",
                "Delete one of them, unless you mean it.",
                f"datasets[{index}]",
                f"datasets[{first}]",
            )
