"""The training run's keys: batch, epochs, evaluation, saving, memory."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from axolotl.config.section import (
    ZERO_IS_OFF,
    Also,
    Block,
    Fraction,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Steps,
    Text,
    idle,
    later,
)


def _no(value: Any) -> Any:
    # A bare `no` is false in YAML.
    return "no" if value is False else value


def _unlimited(value: Any) -> Any:
    # Old files write -1 or 0 for "as num_epochs says".
    return None if value in (-1, 0) and not isinstance(value, bool) else value


Strategy = Annotated[Literal["no", "steps", "epoch"] | None, BeforeValidator(_no)]
SaveStrategy = Annotated[Literal["no", "steps", "epoch", "best"] | None, BeforeValidator(_no)]


class DynamicCheckpoint(Block):
    """A checkpoint on request: when a file appears."""

    enabled: bool = False
    """Look for the file."""
    check_interval: PositiveInt = 10
    """Steps between two looks."""
    trigger_file_path: Text = ""
    """The file; `axolotl_checkpoint.save` in output_dir when empty."""


class SelectiveCheckpointing(Block):
    """Which results are kept instead of computed again."""

    save: list[Text] = Field(default_factory=lambda: ["attention"])
    """What is kept: `attention`, `matmul` (all linear layers), or names of linear layers such as `o_proj`."""
    save_sliding_window: bool = False
    """Also keep the results of sliding-window attention."""
    save_modules: list[Text] | None = later("keeping products by pattern or size")
    """Linear layers whose results are kept: names or patterns of names."""
    save_matmul_min_k: PositiveInt | None = later("keeping products by pattern or size")
    """Keep the results of linear layers that have at least so many inputs."""
    recompute_layer_types: list[Text] | None = None
    """Layer types that are computed again in full."""
    offload: bool = False
    """Keep the results in CPU memory."""


def _newest(value: Any) -> Any:
    return "true" if value is True else value


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?\s*[smhd]\s*)+")


_TIME = Also("a time such as `2h`", {"type": "string", "pattern": "^[0-9]"})


def _seconds(value: Any) -> Any:
    """`90`, `45m` or `1h 30m` in seconds; `false` is 0."""
    if value is False:
        return 0.0
    if isinstance(value, str) and _DURATION.fullmatch(value.strip().lower()):
        parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smhd])", value.lower())
        return float(sum(float(number) * _UNITS[unit] for number, unit in parts))
    if isinstance(value, bool) or (
        isinstance(value, str) and not re.fullmatch(r"\d+(\.\d+)?", value.strip())
    ):
        raise ValueError("a time such as `2h`, `45m` or `1h30m`, or a number of seconds, is expected here")
    return value


class TrainSection(Section):
    """The run: batch, epochs, evaluation, saving, memory."""

    title: ClassVar[str] = "Training"

    # Batch and epochs
    micro_batch_size: PositiveInt | Literal["auto"] = 1
    """Rows in one forward pass on one device; `auto`: as many as fit, of batch_size (or gradient_accumulation_steps) rows."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes whose gradients are added up for one step."""
    batch_size: PositiveInt | None = None
    """Rows of one step on one device, instead of gradient_accumulation_steps."""
    eval_batch_size: PositiveInt | None = None
    """Rows in one forward pass of the evaluation; micro_batch_size when unset."""
    auto_find_batch_size: bool | None = later("finding the batch size")
    """Halve the batch when memory runs out, and start again."""
    num_epochs: PositiveFloat = 1.0
    """Times that training goes through the data."""
    max_steps: Annotated[PositiveInt | None, BeforeValidator(_unlimited), Also("", {"enum": [-1, 0]})] = None
    """Steps after which training ends, whatever num_epochs says."""
    seed: NonNegativeInt | None = None
    """Seed of everything random; 42 when unset."""
    balance_labels: bool = later("balancing trained tokens among batches", False)
    """Give all batches about as many trained tokens."""
    label_balance_window_optim_steps: PositiveInt = later("balancing trained tokens among batches", 1)
    """Steps among which they are balanced."""
    deterministic: bool = False
    """Use only kernels that compute the same bits each time; slower, and needed on a GPU alone."""
    dataloader_num_workers: NonNegativeInt | None = None
    """Processes that load batches."""
    dataloader_pin_memory: bool | None = None
    """Keep batches in memory that a GPU reads fast."""
    dataloader_prefetch_factor: Annotated[PositiveInt | None, ZERO_IS_OFF] = None
    """Batches that each of these processes loads ahead."""
    dataloader_drop_last: bool | None = None
    """Leave out the last batch when it is not full."""
    accelerator_config: dict[str, Any] | None = None
    """Options of accelerate, such as how batches are dispatched."""

    # Memory and speed
    gradient_checkpointing: Literal["auto"] | PositiveInt | bool = False
    """Compute layers again in the backward pass instead of keeping what they hold: less memory, more time; a number: only so many layers; `auto`: as many as need be."""
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    """Options of PyTorch's own checkpoints, such as use_reentrant, which then take the place of ours."""
    selective_checkpointing: bool | SelectiveCheckpointing = False
    """Keep the costly results, by default those of attention, and compute only the cheap ones again."""
    activation_offloading: Literal["legacy", "disk", "hidden_states"] | bool = False
    """Where layer inputs wait for the backward pass: CPU memory, disk; `hidden_states`: they alone, `legacy`: copied while the GPU waits."""
    layer_offloading: bool = later("layer offloading", False)
    """Keep frozen layers in CPU memory until they are needed."""
    torch_compile: Literal["auto"] | bool | None = None
    """Compile the layers with torch.compile, all of a kind at once; what cannot be compiled runs as it is."""
    torch_compile_regional: bool | None = idle("layers are always compiled by themselves")
    """Compile each layer by itself."""
    torch_compile_backend: Text | None = None
    """Backend of torch.compile."""
    torch_compile_mode: (
        Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None
    ) = None
    """Mode of torch.compile."""
    torch_compile_options: dict[str, bool | int | float | str] | None = None
    """Options of torch.compile's backend, instead of a mode."""
    torch_empty_cache_steps: Annotated[PositiveInt | None, ZERO_IS_OFF] = None
    """Steps after which PyTorch's cached memory is given back."""
    gc_collect_steps: Int | None = None
    """Steps after which Python's garbage is collected; -1 at the end of each epoch and before evaluation."""

    # Logging
    logging_steps: Steps | None = None
    """Steps between two log lines."""
    include_tokens_per_second: bool | None = idle("tokens per second are always logged")
    """Log trained tokens per second."""
    include_tkps: bool = idle("tokens per second are always logged", True)
    """Log tokens per second and device."""
    logging_nan_inf_filter: bool | None = idle("losses are logged as they are")
    """Log a loss that is no number as the mean of those before it."""
    sync_profiler_steps: Annotated[PositiveInt | None, ZERO_IS_OFF] = later("counting waits for the GPU")
    """Steps in which waits for the GPU are counted."""
    sync_profiler_start_step: NonNegativeInt = later("counting waits for the GPU", 2)
    """Step at which that begins."""
    profiler_steps: Annotated[PositiveInt | None, ZERO_IS_OFF] = None
    """Steps that PyTorch's profiler records."""
    profiler_steps_start: NonNegativeInt = 0
    """Step at which the profiler begins."""

    # Evaluation
    eval_strategy: Strategy = None
    """When to evaluate: no, steps or epoch."""
    eval_on_start: bool | None = None
    """Evaluate before the first step too; unset: wherever there is something to evaluate on."""
    eval_steps: Annotated[Steps | None, ZERO_IS_OFF] = None
    """Steps between two evaluations; below 1, a share of all steps."""
    evals_per_epoch: NonNegativeInt | None = None
    """Evaluations in each epoch."""
    do_causal_lm_eval: bool = later("evaluation by generation", False)
    """Generate answers in the evaluation and score them."""
    eval_causal_lm_metrics: list[Text] | None = later("evaluation by generation")
    """Scores of these answers."""
    eval_table_size: NonNegativeInt | None = idle("`generate_samples` logs answers")
    """Generated answers that are logged as a table."""
    do_bench_eval: bool = later("benchmarks in training", False)
    """Answer multiple-choice questions in the evaluation."""
    bench_dataset: Text | None = later("benchmarks in training")
    """Dataset of these questions."""
    bench_split: Text | None = later("benchmarks in training")
    """Its split."""
    generate_samples: bool = False
    """Answer a few rows of the evaluation data at each evaluation, and log the answers."""
    num_generation_samples: PositiveInt = 3
    """Samples to generate."""
    generation_max_new_tokens: PositiveInt = 50
    """Longest sample, in tokens."""
    generation_temperature: NonNegativeFloat = 0.7
    """Randomness of the samples."""
    generation_top_p: Fraction | None = None
    """Draw from the likeliest tokens that hold this share of probability."""
    generation_top_k: NonNegativeInt | None = None
    """Draw from this many of the likeliest tokens."""
    generation_prompt_ratio: Fraction = 0.5
    """Share of a row that is given as prompt, where it has no masked beginning."""
    generation_do_sample: bool = True
    """Draw tokens at random instead of taking the likeliest."""
    early_stopping_patience: Annotated[PositiveInt | None, ZERO_IS_OFF] = None
    """Evaluations without improvement after which training ends."""
    loss_watchdog_threshold: Annotated[PositiveFloat | None, ZERO_IS_OFF] = None
    """Loss above which something is wrong."""
    loss_watchdog_patience: Annotated[PositiveInt | None, ZERO_IS_OFF] = None
    """Steps above that loss after which training ends; 3 when unset."""
    spike_threshold: NonNegativeFloat = 10.0
    """Robust deviations from the usual, at which a step's loss or gradient norm is told and its rows noted; 0 for never."""
    spike_patience: Annotated[PositiveInt | None, ZERO_IS_OFF] = None
    """Such steps on end after which training ends; never when unset."""

    # Saving and resuming
    save_strategy: SaveStrategy = None
    """When to save a checkpoint: no, steps, epoch or best."""
    save_steps: Annotated[Steps | None, ZERO_IS_OFF] = None
    """Steps between two checkpoints; below 1, a share of all steps."""
    saves_per_epoch: NonNegativeInt | None = None
    """Checkpoints in each epoch."""
    save_total_limit: Annotated[PositiveInt | None, ZERO_IS_OFF] = None
    """Checkpoints that are kept; older ones are deleted."""
    save_first_step: bool | None = None
    """Save a checkpoint after the first step, to see that saving works."""
    save_only_model: bool = False
    """Save weights without the state that resuming needs."""
    save_async: bool = False
    """Write checkpoints beside training, out of a copy in CPU memory; it holds as much as a checkpoint has bytes."""
    load_best_model_at_end: bool = False
    """End with the best checkpoint instead of the last."""
    metric_for_best_model: Text | None = None
    """Figure that decides which checkpoint is best."""
    greater_is_better: bool | None = None
    """Whether a higher figure is better."""
    resume_from_checkpoint: Annotated[
        Text | None, BeforeValidator(_newest), Also("`true`", {"type": "boolean"})
    ] = None
    """Checkpoint folder to continue from; `true` takes the newest intact one in output_dir."""
    auto_resume_from_checkpoints: bool = False
    """Continue from the newest intact checkpoint in output_dir."""
    dynamic_checkpoint: DynamicCheckpoint | None = None
    """Save a checkpoint when a file appears."""

    # Limits and accidents
    max_time: Annotated[PositiveFloat | None, BeforeValidator(_seconds), _TIME] = None
    """Time after which training saves a checkpoint and ends: `2h`, `45m`, or seconds."""
    hang_timeout: Annotated[
        NonNegativeFloat, BeforeValidator(_seconds), _TIME, Also("`false`", {"enum": [False]})
    ] = 1800.0
    """Time without a step after which the stacks of all threads are written down; `false` for never."""
    on_oom: Literal["retry", "fail"] = "retry"
    """When the GPU's memory runs out: halve micro_batch_size and go on from the same step, or end."""

    @property
    def rows_at_once(self) -> int:
        """micro_batch_size as a number; 1 where `auto` has not been worked out."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size
