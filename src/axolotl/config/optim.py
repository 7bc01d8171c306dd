"""The optimizer's keys: optimizer, learning rate, schedule."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from axolotl.config.section import (
    ZERO_IS_OFF,
    Block,
    Float,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
    later,
    required,
)


class LrGroup(Block):
    """A learning rate for some of the parameters."""

    name: Text
    """Name of the group, for logs."""
    modules: list[Text]
    """Parts of parameter names; a parameter that contains one belongs to the group."""
    lr: PositiveFloat
    """Learning rate of the group."""


class OptimSection(Section):
    """How weights move: optimizer, learning rate, schedule."""

    title: ClassVar[str] = "Optimizer and schedule"

    optimizer: Text = "adamw_torch_fused"
    """Name of the optimizer."""
    optim_args: Text | dict[str, Any] | None = None
    """Extra arguments for the optimizer: a mapping, or `name=value,name=value`."""
    optim_target_modules: list[Text] | Text | None = later("optimizers that project gradients")
    """Layers whose gradients a projecting optimizer compresses; all_linear takes every linear layer."""
    learning_rate: PositiveFloat = required(0.0)
    """Highest learning rate of the schedule."""
    weight_decay: NonNegativeFloat = 0.0
    """Pull of the weights towards zero."""
    embedding_lr: Annotated[PositiveFloat | None, ZERO_IS_OFF] = None
    """Learning rate of the embeddings."""
    embedding_lr_scale: Annotated[PositiveFloat | None, ZERO_IS_OFF] = None
    """Learning rate of the embeddings as a multiple of learning_rate."""
    lr_groups: list[LrGroup] | None = None
    """Learning rates for groups of parameters."""
    max_grad_norm: NonNegativeFloat | None = None
    """Longest gradient; longer ones are scaled down. 1.0 when unset, 0 turns it off."""
    adam_beta1: Fraction | None = None
    """How long the mean of the gradients remembers (Adam)."""
    adam_beta2: Fraction | None = None
    """How long the mean of their squares remembers (Adam)."""
    adam_beta3: Fraction | None = None
    """Third decay rate, for CAME."""
    adam_epsilon: PositiveFloat | None = None
    """Small number that keeps Adam's division stable."""
    adam_epsilon2: PositiveFloat | None = None
    """Second small number, for CAME."""
    dion_lr: PositiveFloat | None = later("the Dion optimizer")
    """Learning rate of the matrices under Dion."""
    dion_momentum: Fraction | None = later("the Dion optimizer")
    """Momentum of Dion."""
    dion_rank_fraction: Fraction = later("the Dion optimizer", 1.0)
    """Rank of Dion's updates as a share of the full rank."""
    dion_rank_multiple_of: PositiveInt = later("the Dion optimizer", 1)
    """Number that Dion's rank is a multiple of."""
    qgalore_rank: PositiveInt = later("the Q-GaLore optimizer", 256)
    """Rank of the projected gradients."""
    qgalore_update_proj_gap: PositiveInt = later("the Q-GaLore optimizer", 200)
    """Steps between two updates of the projection."""
    qgalore_scale: Float = later("the Q-GaLore optimizer", 0.25)
    """Scale of the projected update."""
    qgalore_proj_type: Text = later("the Q-GaLore optimizer", "std")
    """Side from which gradients are projected."""
    qgalore_proj_quant: bool = later("the Q-GaLore optimizer", True)
    """Keep the projection quantised."""
    qgalore_proj_bits: PositiveInt = later("the Q-GaLore optimizer", 4)
    """Bits of the quantised projection."""
    qgalore_proj_group_size: PositiveInt = later("the Q-GaLore optimizer", 256)
    """How many numbers of the projection share one scale."""
    qgalore_cos_threshold: Float = later("the Q-GaLore optimizer", 0.4)
    """Similarity above which a projection counts as settled."""
    qgalore_gamma_proj: PositiveInt = later("the Q-GaLore optimizer", 2)
    """Factor by which a settled projection waits longer."""
    qgalore_queue_size: PositiveInt = later("the Q-GaLore optimizer", 5)
    """Projections that are compared."""
    neftune_noise_alpha: Annotated[PositiveFloat | None, ZERO_IS_OFF] = None
    """Strength of the noise on the embeddings in training (NEFTune)."""
    grokfast_alpha: Fraction = later("Grokfast", 0.98)
    """Momentum of the slow gradients that Grokfast amplifies."""
    grokfast_lamb: NonNegativeFloat = later("Grokfast", 2.0)
    """How strongly Grokfast amplifies them."""

    lr_scheduler: Text = "cosine"
    """Course of the learning rate: cosine, linear, constant, ..."""
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Extra arguments for the schedule."""
    lr_quadratic_warmup: bool = False
    """Raise the learning rate quadratically instead of linearly (cosine)."""
    lr_div_factor: PositiveFloat | None = None
    """The first learning rate is learning_rate divided by this (one_cycle)."""
    cosine_min_lr_ratio: Fraction | None = None
    """Where cosine ends, as a share of learning_rate."""
    cosine_constant_lr_ratio: Fraction | None = None
    """Share of the steps after which the learning rate stays at its minimum."""
    warmup_steps: NonNegativeInt | None = None
    """Steps in which the learning rate rises from 0."""
    warmup_ratio: Fraction | None = None
    """The same as a share of all steps."""
    jagged_restart_steps: PositiveInt | None = later("schedules with restarts of the warmup")
    """Steps after which the learning rate starts over."""
    jagged_restart_warmup_steps: PositiveInt | None = later("schedules with restarts of the warmup")
    """Steps in which it rises again."""
    jagged_restart_anneal_steps: PositiveInt | None = later("schedules with restarts of the warmup")
    """Steps in which it falls before a restart."""
