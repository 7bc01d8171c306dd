"""The data's keys: datasets, chat template, sequence length, packing."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from axolotl.config.datasets import DatasetEntry, PretrainingEntry, PromptMapping
from axolotl.config.section import (
    ZERO_IS_OFF,
    Also,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
    idle,
    later,
)

__all__ = ["DataSection", "DatasetEntry", "PretrainingEntry", "PromptMapping"]


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return [{"path": value}]
    return [value] if isinstance(value, dict) else value


_COUNTED = "the prepared rows are counted"


class DataSection(Section):
    """What is trained on: datasets, chat template, sequence length, packing."""

    title: ClassVar[str] = "Data"

    # Datasets
    datasets: list[DatasetEntry] = Field(default_factory=list)
    """The datasets to train on, one entry each; they are merged."""
    test_datasets: list[DatasetEntry] = Field(default_factory=list)
    """Datasets to evaluate on, instead of a share of the training data."""
    max_dropped_fraction: Fraction | None = None
    """Largest share of a dataset's rows that may be dropped before preparation fails; no limit when unset."""
    val_set_size: NonNegativeFloat = 0.0
    """Share of the rows kept for evaluation; above 1, the number of rows."""
    dataset_prepared_path: Text | None = None
    """Folder in which tokenised data is kept for the next run."""
    num_dataset_shards_to_save: PositiveInt | None = idle("prepared rows are cut into files of a fixed size")
    """Number of files of the prepared dataset."""
    push_dataset_to_hub: Text | None = later("uploading prepared data")
    """Hub organisation or user that gets the prepared dataset."""
    hf_use_auth_token: bool | None = None
    """Use the saved Hub token, as private datasets need."""
    shuffle_merged_datasets: bool = True
    """Shuffle the rows after the datasets were merged."""
    shuffle_before_merging_datasets: bool = False
    """Shuffle each dataset before they are merged."""
    dataset_shard_num: Annotated[PositiveInt | None, ZERO_IS_OFF] = None
    """Cut the merged data into so many parts and use one of them."""
    dataset_shard_idx: NonNegativeInt | None = None
    """Which of these parts, counted from 0."""
    dataset_exact_deduplication: bool = False
    """Drop rows that occur a second time, token for token."""
    dataset_keep_in_memory: bool = False
    """Keep the prepared data in memory instead of reading it from disk."""
    dataset_num_proc: PositiveInt | None = None
    """Processes that prepare data; chosen from the number of CPUs when unset."""
    skip_prepare_dataset: bool = later("training on unprepared rows", False)
    """Hand the rows to the trainer as they are, unprepared."""
    remove_unused_columns: bool | None = idle("prepared rows hold only what training needs")
    """Drop columns that the model does not take."""
    train_on_inputs: bool = False
    """Train on the prompts too, not only on the answers."""

    # Chat template
    chat_template: Text | None = None
    """Chat template: a name, `tokenizer_default`, or `jinja` with chat_template_jinja."""
    chat_template_jinja: Text | None = None
    """The template itself, or the path of its file."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables that the chat template can read."""
    eot_tokens: list[Text] | None = None
    """Tokens that end a turn, where they differ from EOS."""
    default_system_message: Text | None = None
    """System text for conversations without one, where the template has room for it."""

    # Length, packing, padding
    sequence_len: PositiveInt = 512
    """Longest row in tokens; with packing, the length of a packed row."""
    eval_sequence_len: PositiveInt | None = None
    """Longest row of the evaluation data; sequence_len when unset."""
    excess_length_strategy: Annotated[
        Literal["drop", "truncate", "raise"] | None, BeforeValidator(_lower)
    ] = None
    """What happens to longer rows: drop (the default), truncate, or raise an error."""
    min_sample_len: NonNegativeInt | None = None
    """Rows with fewer tokens are dropped; 2 when unset."""
    max_prompt_len: PositiveInt | None = later("preference tuning")
    """Longest prompt of a preference row."""
    sample_packing: bool = False
    """Put several rows into one of sequence_len, without letting them see each other."""
    eval_sample_packing: bool | None = None
    """The same for evaluation; follows sample_packing when unset."""
    sample_packing_group_size: PositiveInt = idle("packing looks at all rows at once", 100_000)
    """Rows among which packing looks for those that fit together."""
    sample_packing_bin_size: PositiveInt = 200
    """Most rows in one packed row."""
    sample_packing_sequentially: bool = False
    """Pack rows in the order they come."""
    sample_packing_mp_start_method: Text | None = idle("rows are packed in one process")
    """How packing starts its processes."""
    sample_packing_eff_est: Annotated[PositiveFloat | None, ZERO_IS_OFF] = idle(_COUNTED)
    """Share of packed rows that is not padding; computed."""
    multipack_real_batches: bool | None = idle(
        "the attention decides whether packed rows are joined, and documents never see each other"
    )
    """Keep packed rows apart in a batch instead of joining them into one long row."""
    pad_to_sequence_len: bool | None = None
    """Pad every row to sequence_len, which keeps memory steady."""
    pad_to_multiple_of: Annotated[PositiveInt | None, ZERO_IS_OFF] = None
    """Pad rows to a multiple of this many tokens."""
    curriculum_sampling: bool = False
    """Keep the order of the data instead of drawing at random."""
    group_by_length: bool = False
    """Put rows of similar length into one batch."""
    batch_flattening: Literal["auto"] | bool | None = None
    """Join the rows of a batch without padding, where attention can keep them apart."""
    use_pose: bool = later("PoSE", False)
    """Simulate long contexts by skipping positions (PoSE)."""
    pose_split_on_token_ids: list[NonNegativeInt] | None = later("PoSE")
    """Tokens at which a row may be cut for PoSE."""
    pose_max_context_len: PositiveInt | None = later("PoSE")
    """Context length that PoSE simulates."""
    pose_num_chunks: PositiveInt | None = later("PoSE")
    """Pieces into which PoSE cuts a row."""
    total_num_tokens: Annotated[PositiveInt | None, ZERO_IS_OFF] = idle(_COUNTED)
    """Tokens in the data; counted when unset."""
    total_supervised_tokens: Annotated[PositiveInt | None, ZERO_IS_OFF] = idle(_COUNTED)
    """Trained tokens in the data; counted when unset."""

    # Streaming
    pretraining_dataset: Annotated[
        list[PretrainingEntry], BeforeValidator(_listed), Also("a path", {"type": "string"})
    ] = Field(default_factory=list)
    """Text corpora that are read while training goes on; needs max_steps."""
    streaming: bool = False
    """Read the data while training instead of preparing it first; needs max_steps."""
    streaming_multipack_buffer_size: PositiveInt = 10_000
    """Rows that are read ahead to shuffle and pack them."""
    pretrain_multipack_attn: bool = True
    """Keep packed documents from seeing each other."""
    pretraining_sample_concatenation: bool = False
    """Join the documents of pretraining_dataset into rows of sequence_len, in which they see each other."""
