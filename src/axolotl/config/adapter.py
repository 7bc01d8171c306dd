"""The adapter's keys: LoRA and its relatives."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from axolotl.config.section import (
    ZERO_IS_OFF,
    Block,
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

MIXLORA = "mixtures of adapters (MixLoRA)"


class LoftQ(Block):
    """Start values that make up for the error of quantisation."""

    loftq_bits: PositiveInt = 4
    """Bits of the quantised weights."""
    loftq_iter: PositiveInt = 1
    """Rounds of alternating quantisation and approximation."""


class Peft(Block):
    """Further options of the peft package."""

    loftq_config: LoftQ | None = None
    """Start values that make up for the error of quantisation."""
    backend: Text | None = later("adapters on torchao weights")
    """Package that holds the quantised weights."""
    weight_dtype: Text | None = later("adapters on torchao weights")
    """Number type in which it holds them: int4, nf4 or int8."""
    group_size: PositiveInt | None = later("adapters on torchao weights")
    """How many weights share one scale."""


class Mora(Block):
    """Square matrices instead of low-rank pairs."""

    use_mora: bool = True
    """Turn it on."""
    mora_type: int | Text | None = None
    """How inputs are compressed to the square matrix."""


class AdapterSection(Section):
    """LoRA and its relatives: what is trained beside the frozen weights."""

    title: ClassVar[str] = "Adapter"

    adapter: Text | None = None
    """Kind of adapter: lora, qlora, or another that PEFT has, such as vera, oft, ia3. Unset trains the whole model."""
    lora_model_dir: Text | None = None
    """Folder of an adapter to continue with, or to use for inference and merging."""
    lora_r: PositiveInt | None = None
    """Rank of the adapter's matrices."""
    lora_alpha: PositiveInt | None = None
    """Strength of the adapter: its output is scaled by lora_alpha / lora_r."""
    lora_dropout: Fraction = 0.0
    """Share of the adapter's inputs that is dropped in training."""
    lora_target_modules: Text | list[Text] | None = None
    """Layers that get an adapter: names, or one regular expression."""
    lora_target_linear: bool = False
    """Give every linear layer but the output head an adapter."""
    lora_target_parameters: Text | list[Text] | None = None
    """Parameters that get an adapter directly, such as stacked expert weights."""
    lora_modules_to_save: list[Text] | None = None
    """Layers trained in full and saved with the adapter, such as embed_tokens and lm_head."""
    lora_exclude_modules: Text | list[Text] | None = None
    """Layers that get no adapter although they match."""
    lora_fan_in_fan_out: bool | None = None
    """The target layers hold their weights transposed, as GPT-2's do."""
    lora_rank_pattern: dict[str, PositiveInt] | None = None
    """Other ranks for layers whose name matches."""
    lora_alpha_pattern: dict[str, PositiveInt] | None = None
    """Other alphas for layers whose name matches."""
    lora_fp32_gradients: bool = idle("an adapter's weights and gradients are float32 already", False)
    """Sum an adapter's gradients in float32."""
    nf4_backend: Text = later("adapters on torchao weights", "bitsandbytes")
    """Package that holds 4-bit weights: bitsandbytes or torchao."""
    lora_on_cpu: bool = idle("merging chooses the device by itself", False)
    """Merge on the CPU."""
    peft_layers_to_transform: list[NonNegativeInt] | None = None
    """Indices of the only layers that get an adapter."""
    peft_layers_pattern: list[Text] | None = None
    """Name of the list that holds the layers, where it is unusual."""
    peft: Peft | None = None
    """Further options of the peft package."""
    peft_use_dora: bool = False
    """Train magnitude and direction apart (DoRA)."""
    peft_use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r), which keeps high ranks stable."""
    peft_layer_replication: list[tuple[NonNegativeInt, NonNegativeInt]] | None = None
    """Ranges of layers to repeat, each copy with an adapter of its own."""
    peft_init_lora_weights: bool | Text | None = None
    """How the adapter starts: true, false, gaussian, pissa, olora, loftq, ..."""
    peft_trainable_token_indices: list[NonNegativeInt] | dict[str, list[NonNegativeInt]] | None = None
    """Ids of the tokens whose embeddings are trained beside the adapter."""
    peft_ensure_weight_tying: bool = False
    """Keep tied embeddings tied when they are trained."""
    peft_autocast_adapter_dtype: bool | None = None
    """Raise adapter weights to float32."""
    loraplus_lr_ratio: Annotated[PositiveFloat | None, ZERO_IS_OFF] = None
    """Learning rate of the B matrices divided by that of the A matrices (LoRA+)."""
    loraplus_lr_embedding: NonNegativeFloat = 1e-6
    """Learning rate of adapted embeddings under LoRA+."""
    merge_lora: bool | None = None
    """Merge the adapter into the base model."""
    merge_method: Literal["legacy", "memory_efficient"] = "memory_efficient"
    """How to merge: shard by shard, or with the whole model in memory."""
    relora: bool = later("ReLoRA", False)
    """Merge and restart the adapter at intervals (ReLoRA)."""
    relora_prune_ratio: Fraction | None = later("ReLoRA")
    """Share of the optimizer's state that a restart clears."""
    relora_prune_method: Literal["magnitude", "random", "reset"] = later("ReLoRA", "magnitude")
    """Which part of the optimizer's state a restart clears."""
    relora_cpu_offload: bool = later("ReLoRA", False)
    """Merge on the CPU at a restart."""
    lisa_n_layers: PositiveInt | None = later("LISA")
    """Number of layers trained at a time (LISA)."""
    lisa_step_interval: PositiveInt | None = later("LISA")
    """Steps after which other layers are drawn."""
    lisa_layers_attribute: Text = later("LISA", "model.layers")
    """Where the model keeps its layers."""
    mora: Mora | None = later("MoRA")
    """Square matrices instead of low-rank pairs (MoRA)."""
    mixlora_num_experts: PositiveInt | None = later(MIXLORA)
    """Adapters among which a router chooses, in each feed-forward layer (MixLoRA)."""
    mixlora_top_k: PositiveInt | None = later(MIXLORA)
    """How many of them a token gets."""
    mixlora_router_aux_loss_coef: NonNegativeFloat | None = later(MIXLORA)
    """Weight of the loss that keeps them evenly used."""
    mixlora_router_init_range: NonNegativeFloat | None = later(MIXLORA)
    """Spread of the router's first weights."""
    mixlora_jitter_noise: NonNegativeFloat | None = later(MIXLORA)
    """Noise on what the router sees."""
    mixlora_expert_lora_r: PositiveInt | None = later(MIXLORA)
    """Rank of these adapters."""
    mixlora_expert_lora_alpha: PositiveInt | None = later(MIXLORA)
    """Their strength."""
    mixlora_expert_lora_dropout: Fraction | None = later(MIXLORA)
    """Share of their inputs that is dropped."""
