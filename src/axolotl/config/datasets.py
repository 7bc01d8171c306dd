"""The entries of `datasets`, `test_datasets` and `pretraining_dataset`."""

from __future__ import annotations

from typing import Any, Literal

from axolotl.config.section import (
    Block,
    Float,
    Fraction,
    Int,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Text,
    idle,
    later,
)

SYNTHETIC = "synthetic rows in turns"
_NO_CODE = "the code of a dataset is never run"
_OLD_CONVERSATION = (
    "`type: chat_template` reads conversations, by the keys field_messages and message_property_mappings"
)


class PromptMapping(Block):
    """A `type:` written as a mapping: which columns hold what, and how a prompt is put together."""

    system_prompt: Text | None = None
    """System text for rows that have none."""
    system_format: Text | None = None
    """Layout of the system text, with `{system}`."""
    field_system: Text | None = None
    """Column with the system text."""
    field_instruction: Text | None = None
    """Column with the instruction."""
    field_input: Text | None = None
    """Column with the input that goes with the instruction."""
    field_output: Text | None = None
    """Column with the answer that is trained."""
    format: Text | None = None
    """Layout of the prompt, with `{instruction}` and `{input}`."""
    no_input_format: Text | None = None
    """Layout of the prompt for rows without input, with `{instruction}`."""
    field_prompt: Text | None = later("preference tuning")
    """Column with the prompt of a preference row."""
    field_chosen: Text | None = later("preference tuning")
    """Column with the preferred answer."""
    field_rejected: Text | None = later("preference tuning")
    """Column with the rejected answer."""
    field_completion: Text | None = later("preference tuning")
    """Column with the judged answer."""
    field_label: Text | None = later("preference tuning")
    """Column that says whether the answer is wanted."""
    prompt_format: Text | None = later("preference tuning")
    """Layout of the prompt, with `{prompt}` and `{system}`."""
    chosen_format: Text | None = later("preference tuning")
    """Layout of the preferred answer, with `{chosen}`."""
    rejected_format: Text | None = later("preference tuning")
    """Layout of the rejected answer, with `{rejected}`."""
    completion_format: Text | None = later("preference tuning")
    """Layout of the judged answer, with `{completion}`."""


Turns = Literal["all", "turn", "last", "none"]


class DatasetEntry(Block):
    """One dataset: where it is, how its rows read, which part of them is trained."""

    path: Text | None = None
    """File, folder, URL or Hub name of the dataset."""
    type: Text | PromptMapping | None = None
    """Format of the rows: a name such as `alpaca` or `chat_template`, or a mapping of columns."""
    name: Text | None = None
    """Configuration (subset) of a Hub dataset."""
    split: Text | None = None
    """Split to read, `train` when unset; slices such as `train[:500]` work."""
    data_files: Text | list[Text] | dict[str, Text | list[Text]] | None = None
    """The only files to read, within the folder or the Hub dataset."""
    ds_type: Text | None = None
    """File type: json, csv, parquet, arrow or text; told by the name when unset."""
    revision: Text | None = None
    """Branch, tag or commit of a Hub dataset."""
    trust_remote_code: bool = idle(_NO_CODE, False)
    """Run Python code that comes with the dataset; datasets that need it have to be converted to files first."""
    shards: PositiveInt | None = None
    """Cut the dataset into so many parts and use one of them."""
    shards_idx: NonNegativeInt | None = None
    """Which of these parts, counted from 0."""
    preprocess_shards: PositiveInt | None = idle("rows are always prepared piece by piece")
    """Prepare the dataset in so many parts, one after the other."""
    input_transform: Text | None = later("transforming rows before their format reads them")
    """How rows are read before the format sees them."""
    input_format: Text | None = later("layouts around the input")
    """Layout of the text around the input."""
    conversation: Text | None = idle("`chat_template` says how turns are laid out")
    """Name of a conversation layout, as old files carry it; `chat_template` takes its place."""

    chat_template: Text | None = None
    """Chat template for this dataset alone."""
    chat_template_jinja: Text | None = None
    """The template itself, or the path of its file, where `chat_template` is `jinja`."""
    field: Text | None = None
    """Column with the text, for `completion`."""
    field_human: Text | None = idle(_OLD_CONVERSATION)
    """Column with the user's text, in old conversation formats."""
    field_model: Text | None = idle(_OLD_CONVERSATION)
    """Column with the model's text, in old conversation formats."""
    field_messages: Text | None = None
    """Column with the list of messages."""
    field_tools: Text | None = None
    """Column with the tools on offer."""
    field_system: Text | None = None
    """Column with the system text."""
    field_thinking: Text | None = None
    """Key of a message that holds its reasoning."""
    template_thinking_key: Text | None = None
    """Name under which the chat template expects the reasoning."""
    message_property_mappings: dict[str, Text] | None = None
    """Names of the message keys: the template's name, then the one in the data."""
    message_field_training: Text | None = None
    """Key of a message that says whether it is trained."""
    message_field_training_detail: Text | None = None
    """Key of a message that lists the character ranges to train."""
    split_thinking: bool | None = None
    """Take reasoning out of the answer's text into its own field."""
    roles: dict[str, list[Text]] | None = None
    """Names of the roles: the template's role, then those in the data."""
    roles_to_train: list[Text] | None = None
    """Roles whose turns are trained; assistant when unset."""
    train_on_eos: Turns | None = None
    """Which EOS tokens are trained: of trained turns (turn), of all, of the last, of none."""
    train_on_eot: Turns | None = None
    """The same for the tokens that end a turn; follows train_on_eos when unset."""
    drop_system_message: bool | None = None
    """Leave system messages out."""
    special_tokens_in_content: Literal["text", "parse"] = "text"
    """Control tokens that stand in a message's text: plain text, or parsed as the tokens that they name."""
    weight: PositiveFloat | None = None
    """How often each row is seen in an epoch, beside the other datasets: 2 twice, 0.5 every second row."""

    logprobs_field: Text | None = later("distillation")
    """Column with the teacher's log-probabilities."""
    temperature: Float | None = later("distillation")
    """Temperature at which the teacher gave them."""
    field_chosen: Text | None = later("preference tuning")
    """Column with the preferred answer."""
    field_rejected: Text | None = later("preference tuning")
    """Column with the rejected answer."""
    step_separator: Text | None = later("reward models")
    """Text between the steps of a solution."""
    max_completion_length: PositiveInt | None = later("reward models")
    """Longest solution, in tokens."""
    train_on_last_step_only: bool | None = later("reward models")
    """Judge the last step alone."""
    length: PositiveInt | None = None
    """Number of rows of a synthetic dataset."""
    sequence_length: PositiveInt | None = None
    """Tokens in each row of a synthetic dataset."""
    min_input_id: NonNegativeInt | None = None
    """Smallest token id of a synthetic dataset."""
    max_input_id: PositiveInt | None = None
    """One above the largest token id of a synthetic dataset."""
    min_turns: PositiveInt | None = later(SYNTHETIC)
    """Fewest pairs of turns in a row."""
    max_turns: PositiveInt | None = later(SYNTHETIC)
    """Most pairs of turns in a row."""
    min_turn_length: PositiveInt | None = later(SYNTHETIC)
    """Fewest tokens in a turn."""
    input_fraction: Fraction | None = later(SYNTHETIC)
    """Share of a row's tokens that are not trained."""
    seed: Int | None = None
    """Seed of a synthetic dataset."""


class PretrainingEntry(Block):
    """One text corpus that is streamed."""

    path: Text | None = None
    """File, folder or Hub name of the corpus."""
    name: Text | None = None
    """Configuration (subset) of a Hub dataset."""
    split: Text = "train"
    """Split to read."""
    text_column: Text = "text"
    """Column with the text."""
    type: Text | dict[str, Any] = "pretrain"
    """Format of the rows."""
    trust_remote_code: bool = idle(_NO_CODE, False)
    """Run Python code that comes with the dataset; datasets that need it have to be converted to files first."""
    data_files: Text | list[Text] | None = None
    """The only files to read."""
    ds_type: Text | None = None
    """File type: json, csv, parquet, arrow or text."""
    skip: NonNegativeInt | None = None
    """Rows to leave out at the beginning."""
