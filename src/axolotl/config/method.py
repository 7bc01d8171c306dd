"""The training method's keys: preference tuning, reinforcement learning, distillation, multimodal, plugins."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from axolotl.config.method_blocks import Diffusion, Ebft, Hatchery, LlmCompressor, RoleBoundary, Trl, Vllm
from axolotl.config.section import (
    Float,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
    later,
)

PREFERENCE = "preference tuning"
RL = "reinforcement learning"
REWARD = "reward models"
MULTIMODAL = "multimodal training"
DISTILLATION = "distillation"
NEMO = "NeMo Gym"


class MethodSection(Section):
    """What is learned and from which signal. Unset is supervised fine-tuning."""

    title: ClassVar[str] = "Method"

    plugins: list[Text] | None = None
    """Features from elsewhere: dotted names of modules or classes, or names of installed entry points."""
    trainer_cls: Text | None = later("trainer classes of the user's own")
    """Dotted name of a trainer class to use."""

    rl: Literal["dpo", "ipo", "simpo", "kto", "orpo", "grpo", "gdpo", "ebft"] | None = later(
        PREFERENCE, by_value={"grpo": RL, "gdpo": RL, "ebft": RL}
    )
    """Method of preference tuning or reinforcement learning."""
    rl_beta: NonNegativeFloat | None = later(PREFERENCE)
    """How closely the model stays by its reference."""
    rl_adapter_ref_model: bool | None = later(PREFERENCE)
    """Use the model without its adapter as the reference."""
    dpo_use_weighting: bool | None = later(PREFERENCE)
    """Weigh preference pairs by their likelihood."""
    dpo_label_smoothing: Fraction | None = later(PREFERENCE)
    """Share of preference pairs that may be labelled wrongly."""
    dpo_use_liger_kernel: bool | None = later(PREFERENCE)
    """Use Liger's fused loss for DPO."""
    dpo_padding_free: bool | None = later(PREFERENCE)
    """Compute pairs without padding."""
    dpo_loss_type: Text | list[Text] | None = later(PREFERENCE)
    """Losses of DPO that are added up."""
    dpo_loss_weights: list[Float] | None = later(PREFERENCE)
    """Weight of each of them."""
    dpo_ld_alpha: Fraction | None = later(PREFERENCE)
    """Weight of the tokens by which one answer is longer than the other of its pair."""
    precompute_ref_log_probs: bool | None = later(PREFERENCE)
    """Compute the reference's log-probabilities before training."""
    orpo_alpha: PositiveFloat | None = later(PREFERENCE)
    """Weight of ORPO's preference term."""
    simpo_gamma: NonNegativeFloat | None = later(PREFERENCE)
    """Margin of SimPO."""
    cpo_alpha: NonNegativeFloat | None = later(PREFERENCE)
    """Weight of the likelihood term of CPO and SimPO."""
    kto_desirable_weight: NonNegativeFloat | None = later(PREFERENCE)
    """Weight of wanted answers in KTO."""
    kto_undesirable_weight: NonNegativeFloat | None = later(PREFERENCE)
    """Weight of unwanted answers in KTO."""
    trl: Trl | None = later(RL)
    """Options of reinforcement learning and of TRL's trainers."""
    vllm: Vllm | None = None
    """The vLLM server that generates answers."""
    ebft: Ebft | None = later(RL)
    """Options of energy-based fine-tuning."""

    reward_model: bool = later(REWARD, False)
    """Train a model that scores answers."""
    process_reward_model: bool = later(REWARD, False)
    """Train a model that scores the steps of an answer."""
    center_rewards_coefficient: NonNegativeFloat | None = later(REWARD)
    """Pull of the rewards towards a mean of zero."""

    processor_type: Text | None = later(MULTIMODAL)
    """Class of transformers that prepares text together with images or sound."""
    processor_kwargs: dict[str, Any] | None = later(MULTIMODAL)
    """Arguments for loading it."""
    image_size: PositiveInt | list[PositiveInt] | None = later(MULTIMODAL)
    """Size that images are brought to: one number, or height and width."""
    image_resize_algorithm: Text | None = later(MULTIMODAL)
    """How images are scaled: bilinear, bicubic or lanczos."""
    role_boundaries: list[RoleBoundary] | None = later(MULTIMODAL)
    """Texts that open and close the turns of each role."""

    kd_trainer: bool | None = later(DISTILLATION)
    """Learn from a teacher's log-probabilities."""
    kd_ce_alpha: NonNegativeFloat | None = later(DISTILLATION)
    """Weight of the usual loss beside the teacher's."""
    kd_alpha: NonNegativeFloat | None = later(DISTILLATION)
    """Weight of the teacher's loss."""
    kd_temperature: PositiveFloat | None = later(DISTILLATION)
    """Temperature at which student and teacher are compared."""
    kd_temperature_min: PositiveFloat | None = later(DISTILLATION)
    """Lowest temperature drawn from the teacher."""
    kd_beta: NonNegativeFloat = later(DISTILLATION, 0.0)
    """Mix of forward and reverse divergence."""
    kd_normalize_topk: bool | None = later(DISTILLATION)
    """Make the teacher's likeliest tokens sum to one."""
    kd_online_server_base_url: Text | None = later(DISTILLATION)
    """Address of the server on which the teacher answers."""
    kd_online_topk: PositiveInt | None = later(DISTILLATION)
    """Tokens of which the server gives log-probabilities."""
    kd_online_server: Literal["vllm", "sglang"] = later(DISTILLATION, "vllm")
    """Kind of that server."""
    kd_online_timeout: PositiveInt = later(DISTILLATION, 120)
    """Seconds to wait for it."""

    diffusion: Diffusion | None = later("diffusion language models")
    """Train a model that fills in masked tokens."""
    diffusion_lm: dict[str, Any] | None = later("diffusion language models")
    """The same in newer files."""
    diffusion_decision: dict[str, Any] | None = later("diffusion language models")
    """Train such a model to choose among given answers."""
    hatchery: Hatchery | None = later("training on a remote service")
    """Train on a remote service."""
    coreweave: dict[str, Any] | None = later("handing weights to CoreWeave while training")
    """Hand weights to CoreWeave's inference while training."""
    llmcompressor: LlmCompressor | None = later("sparse training with llm-compressor")
    """Compress the model with a recipe of llm-compressor."""
    spectrum_top_fraction: Fraction = later("Spectrum", 0.5)
    """Share of the layers that is trained, chosen by their signal-to-noise ratio."""
    spectrum_model_name: Text | None = later("Spectrum")
    """Model whose ratios are taken."""
    lm_eval_tasks: list[Text] | None = None
    """Benchmarks of lm-evaluation-harness for `axolotl lm-eval`: names, patterns such as `arc_*`, or own task files."""
    lm_eval_batch_size: PositiveInt | None = 8
    """Rows that these ask at a time."""
    lm_eval_post_train: bool | None = True
    """Run them at the end of training too."""
    lm_eval_model: Text | None = None
    """Model or adapter that `axolotl lm-eval` takes instead of what was trained."""

    nemo_gym_enabled: bool = later(NEMO, False)
    """Use NeMo Gym's environments."""
    nemo_gym_dir: Text | None = later(NEMO)
    """Folder of NeMo Gym."""
    nemo_gym_auto_clone: bool | None = later(NEMO)
    """Fetch NeMo Gym when it is missing."""
    nemo_gym_config_paths: list[Text] | None = later(NEMO)
    """Its configuration files."""
    nemo_gym_head_port: PositiveInt = later(NEMO, 11_000)
    """Port of its head server."""
    nemo_gym_server_timeout: PositiveInt = later(NEMO, 360)
    """Seconds in which its servers have to start."""
    nemo_gym_verify_timeout: PositiveInt = later(NEMO, 30)
    """Seconds in which an answer has to be judged."""
    nemo_gym_run_timeout: PositiveInt = later(NEMO, 300)
    """Seconds in which an episode has to end."""
    nemo_gym_datasets: list[dict[str, Any]] | None = later(NEMO)
    """Its datasets."""
    nemo_gym_auto_start: bool = later(NEMO, True)
    """Start its servers."""
    nemo_gym_model_name: Text | None = later(NEMO)
    """Name under which the model answers."""
    nemo_gym_multi_turn: bool | None = later(NEMO)
    """Episodes of several turns."""
    nemo_gym_max_turns: NonNegativeInt | None = later(NEMO)
    """Most turns in an episode."""
