"""The nested blocks of the method's keys. None of their features is built yet; they are here to be checked."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from axolotl.config.section import (
    Block,
    Float,
    Fraction,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    Port,
    PositiveFloat,
    PositiveInt,
    Text,
)


class Trl(Block):
    """Options of reinforcement learning and of TRL's trainers."""

    options_only: ClassVar[bool] = True

    beta: NonNegativeFloat | None = None
    """How closely the model stays by its reference."""
    max_completion_length: PositiveInt | None = None
    """Longest answer, in tokens."""
    use_vllm: bool = False
    """Generate answers with vLLM."""
    vllm_mode: Literal["server", "colocate"] | None = None
    """Whether vLLM runs as a server or beside the trainer."""
    vllm_server_host: Text = "0.0.0.0"
    """Host of the server."""
    vllm_server_port: Port = 8000
    """Port of the server."""
    vllm_server_timeout: PositiveInt | None = None
    """Seconds to wait for the server."""
    vllm_guided_decoding_regex: Text | None = None
    """Regular expression that answers have to match."""
    reward_funcs: list[Text] | None = None
    """Functions or models that reward an answer."""
    reward_weights: list[Float] | None = None
    """Weight of each reward."""
    generation_batch_size: PositiveInt | None = None
    """Answers that are generated at a time."""
    num_generations: PositiveInt | None = None
    """Answers to each prompt."""
    log_completions: bool = False
    """Log answers."""
    num_completions_to_print: PositiveInt | None = None
    """Answers that are shown."""
    importance_sampling_level: Literal["sequence", "token"] | None = None
    """Whether importance ratios are taken by token or by sequence."""
    sync_ref_model: bool = False
    """Let the reference follow the model."""
    ref_model_mixup_alpha: Fraction = 0.9
    """How closely it follows."""
    ref_model_sync_steps: PositiveInt = 64
    """Steps between two updates of it."""
    scale_rewards: bool | Text = True
    """Divide rewards by their standard deviation."""
    temperature: NonNegativeFloat | None = None
    """Randomness of the answers."""
    top_p: Fraction | None = None
    """Draw from the likeliest tokens that hold this share of probability."""
    top_k: Int | None = None
    """Draw from this many of the likeliest tokens."""
    min_p: Fraction | None = None
    """Draw from tokens at least this likely."""
    repetition_penalty: PositiveFloat | None = None
    """Penalty for tokens that came already."""
    generation_kwargs: dict[str, Any] | None = None
    """Further arguments for generation."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables that the chat template can read."""
    num_iterations: PositiveInt | None = None
    """Updates with the same answers."""
    epsilon: PositiveFloat | None = None
    """Limit of the importance ratio."""
    epsilon_high: PositiveFloat | None = None
    """Its upper limit, where it differs."""
    use_liger_loss: bool | None = None
    """Use Liger's fused loss."""
    loss_type: Text | None = None
    """How token losses are averaged."""
    mask_truncated_completions: bool = False
    """Leave out answers that were cut off."""
    vllm_enable_sleep_mode: bool | None = None
    """Let vLLM give back memory between generations."""
    rollout_func: Text | None = None
    """Function that makes the answers."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] | None = None
    """How several rewards become one."""
    use_data_producer: bool = False
    """Make answers in a process of its own."""
    async_prefetch: bool = False
    """Make the next answers while training."""
    prefetch_depth: PositiveInt | None = None
    """Batches made ahead."""
    vllm_sync_interval: PositiveInt | None = None
    """Steps between two transfers of weights to vLLM."""
    streaming_partial_batch: bool | None = None
    """Train on groups as they come."""
    streaming_min_groups: PositiveInt | None = None
    """Fewest groups to train on."""
    vllm_importance_sampling_correction: bool | None = None
    """Correct for the difference between vLLM and the trainer."""
    vllm_importance_sampling_mode: (
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = None
    """How that correction is limited."""
    vllm_importance_sampling_cap: PositiveFloat | None = None
    """Its limit."""
    vllm_importance_sampling_clip_min: NonNegativeFloat | None = None
    """Smallest ratio that it corrects by."""
    vllm_importance_sampling_clip_max: PositiveFloat | None = None
    """Greatest ratio that it corrects by."""
    entropy_coef: Float | None = None
    """Weight of the entropy of answers in the loss."""
    use_adaptive_entropy: bool | None = None
    """Let that weight follow a target."""
    entropy_target: Float | None = None
    """The target."""
    entropy_coef_delta: Float | None = None
    """By how much the weight changes at a time."""
    entropy_coef_min: Float | None = None
    """Smallest weight."""
    entropy_coef_max: Float | None = None
    """Greatest weight."""
    log_multimodal: bool | None = None
    """Log images beside answers."""
    off_policy_mask_threshold: Float | None = None
    """Divergence above which an answer is left out."""
    use_bias_correction_kl: bool | None = None
    """Correct the divergence for old answers."""
    reward_num_workers: PositiveInt = 1
    """Processes that compute rewards."""
    replay_buffer_size: NonNegativeInt = 0
    """Answers kept for later."""
    replay_recompute_logps: bool = True
    """Compute their log-probabilities again."""
    reroll_start_fraction: Fraction = 1.0
    """Share of training after which hard prompts are tried again."""
    reroll_max_groups: NonNegativeInt = 1
    """Most prompts tried again at a time."""
    skip_zero_advantage_batches: bool = True
    """Skip batches that teach nothing."""
    vllm_lora_sync: bool = False
    """Send only the adapter to vLLM."""


class Vllm(Block):
    """The vLLM server that generates answers."""

    device: Text = "auto"
    """Device it runs on."""
    tensor_parallel_size: PositiveInt | None = None
    """Devices that share each matrix product."""
    data_parallel_size: PositiveInt | None = None
    """Copies of the model."""
    gpu_memory_utilization: Fraction = 0.9
    """Share of the GPU's memory that it takes."""
    dtype: Text = "auto"
    """Number type it computes in."""
    max_model_len: PositiveInt | None = None
    """Longest context."""
    enable_prefix_caching: bool | None = None
    """Keep common beginnings."""
    host: Text = "127.0.0.1"
    """Address it listens on; 0.0.0.0 opens it to the network."""
    port: Port = 8000
    """Port it listens on."""
    enable_reasoning: bool | None = None
    """Tell reasoning from answer."""
    reasoning_parser: Text | None = None
    """How they are told apart."""
    enforce_eager: bool | None = None
    """Do without CUDA graphs."""
    serve_module: Text | None = None
    """Module that serves."""
    worker_extension_cls: Text | None = None
    """Class that extends the workers."""


class Ebft(Block):
    """Options of energy-based fine-tuning."""

    feature_layers: list[Float] = Field(default_factory=lambda: [0.25, 0.5, 0.75])
    """Depths at which features are taken."""
    embed_method: Literal["last_token", "mean_pooling", "completion_mean", "concat"] = "last_token"
    """How features become one vector."""
    use_whitening: bool = False
    """Whiten the features."""
    alignment_coef: Float = 1.0
    """Weight of being like the reference answer."""
    diversity_coef: Float = 1.0
    """Weight of being unlike the other answers."""
    ce_coef: Float = 0.0
    """Weight of the usual loss."""
    adaptive_max_tokens: bool = True
    """Limit answers by the length of the reference answer."""
    gt_length_multiplier: float = Field(default=1.5, ge=0.1)
    """That limit as a multiple."""
    mode: Literal["structured", "strided"] = "structured"
    """Whole answers, or short ones all along the text."""
    stride: PositiveInt = 8
    """Tokens between two of them."""
    context_length: PositiveInt = 8
    """Tokens before each of them."""
    generate_max_len: PositiveInt = 8
    """Their length."""
    n_samples_per_prompt: PositiveInt = 4
    """Answers to each prompt."""
    temperature: NonNegativeFloat = 0.6
    """Randomness of the answers."""
    top_p: Fraction = 1.0
    """Draw from the likeliest tokens that hold this share of probability."""
    rl_coef: Float = 1.0
    """Weight of the reward."""
    advantage_estimator: Literal["rloo", "group_norm", "reinforce"] = "rloo"
    """How rewards become advantages."""
    min_completion_prefix: NonNegativeInt = 0
    """Fewest tokens of the answer that are given."""


class RoleBoundary(Block):
    """The texts around the turns of one role."""

    role: Text
    """The role."""
    start: Text
    """Text that opens its turns."""
    end: Text | None = None
    """Text that closes them."""
    include_start: bool = False
    """Train on the opening text."""
    include_end: bool = True
    """Train on the closing text."""


class Diffusion(Block):
    """Training of a model that fills in masked tokens."""

    noise_schedule: Literal["linear", "cosine"] = "linear"
    """How the share of masked tokens is drawn."""
    min_mask_ratio: Fraction = 0.1
    """Smallest share."""
    max_mask_ratio: Fraction = 0.9
    """Largest share."""
    num_diffusion_steps: PositiveInt = 128
    """Steps of the process."""
    eps: Fraction = 0.001
    """Share below which nothing is masked."""
    importance_weighting: bool = True
    """Weigh tokens by the share that was masked."""
    mask_token_id: NonNegativeInt | None = None
    """Id of the mask token."""
    mask_token_str: Text | None = None
    """Text of the mask token."""
    generate_samples: bool = True
    """Write samples while training."""
    generation_interval: PositiveInt = 100
    """Steps between them."""
    num_generation_samples: PositiveInt = 3
    """Samples to write."""
    generation_steps: PositiveInt = 128
    """Steps that each takes."""
    generation_temperature: NonNegativeFloat = 0.0
    """Randomness of the samples."""
    generation_max_length: PositiveInt = 100
    """Longest sample, in tokens."""


class Hatchery(Block):
    """Training on a remote service."""

    backend: Literal["tinker", "hatchery"] = "tinker"
    """The service."""
    base_url: Text | None = None
    """Its address."""
    api_key: Text | None = Field(default=None, json_schema_extra={"secret": True}, repr=False)
    """The key to it."""
    project_id: Text | None = None
    """Project on the service."""
    lora_rank: int = Field(default=32, ge=1, le=256)
    """Rank of the adapter."""
    train_attn: bool = True
    """Adapt attention."""
    train_mlp: bool = True
    """Adapt the feed-forward layers."""
    train_unembed: bool = True
    """Adapt the output head."""
    loss_fn: Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"] = "cross_entropy"
    """Loss."""
    loss_fn_config: dict[str, Any] | None = None
    """Options of the loss."""
    pipeline: bool = True
    """Send the next step before the last is back."""
    max_sample_tokens: PositiveInt = 256
    """Longest answer, in tokens."""
    sample_temperature: NonNegativeFloat = 1.0
    """Randomness of the answers."""
    num_samples: PositiveInt = 4
    """Answers to each prompt."""
    reward_funcs: list[Text] | None = None
    """Functions that reward an answer."""
    save_steps: PositiveInt | None = None
    """Steps between two saves."""
    save_name_prefix: Text = "checkpoint"
    """Beginning of their names."""
    future_timeout: PositiveFloat = 600.0
    """Seconds to wait for the service."""


class LlmCompressor(Block):
    """Compression of the model with llm-compressor."""

    recipe: Any = None
    """What to do, as a recipe of llm-compressor."""
    save_compressed: bool = False
    """Save the model compressed."""
