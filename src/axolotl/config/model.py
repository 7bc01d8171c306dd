"""The model's keys: what is loaded, in which precision, with which tokenizer and attention."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from axolotl.config.section import (
    Also,
    Block,
    Float,
    Int,
    NonNegativeInt,
    PositiveInt,
    Section,
    Text,
    idle,
    later,
    required,
)


def _auto(value: Any) -> Any:
    # bf16 decides; `auto` here means the same as leaving it out.
    return None if value == "auto" else value


_DESCENT = "the model's own configuration says what it is"
KERNELS = "this kernel is not built yet, and the plain path computes the same"


class SpecialTokens(Block):
    """Names of the special tokens."""

    bos_token: Text | None = None
    """Token that opens a text."""
    eos_token: Text | None = None
    """Token that ends a text; generation stops at it."""
    pad_token: Text | None = None
    """Token that fills short rows of a batch; never trained."""
    unk_token: Text | None = None
    """Token that stands for what the vocabulary lacks."""
    additional_special_tokens: list[Text] | None = None
    """More tokens that are never split and that the tokenizer treats as special."""


def _torchao_name(value: Any) -> Any:
    """torchao's number types by the names that configs have used for them."""
    if not isinstance(value, str):
        return value
    name = value.lower().removeprefix("torch.")
    return {"fp8": "float8_e4m3fn", "float8": "float8_e4m3fn", "e4m3": "float8_e4m3fn"}.get(name, name)


class PostTrainingQuantization(Block):
    """How `quantize` compresses the finished weights."""

    weight_dtype: Annotated[Literal["int4", "int8", "float8_e4m3fn"], BeforeValidator(_torchao_name)] = "int8"
    """Number type of the weights: int4, int8 or float8_e4m3fn (fp8)."""
    activation_dtype: Annotated[Literal["int8", "float8_e4m3fn"] | None, BeforeValidator(_torchao_name)] = (
        None
    )
    """Number type of the activations: int8 or float8_e4m3fn; unset leaves them as they are."""
    quantize_embedding: bool | None = None
    """Also compress the token embeddings."""
    group_size: PositiveInt = 32
    """How many weights share one scale."""


class QuantizationAwareTraining(Block):
    """How training simulates the later quantisation."""

    activation_dtype: Text | None = None
    """Number type simulated for the activations."""
    weight_dtype: Text = "int8"
    """Number type simulated for the weights."""
    quantize_embedding: bool = False
    """Also simulate quantised embeddings."""
    group_size: PositiveInt = 32
    """How many weights share one scale."""
    fake_quant_after_n_steps: NonNegativeInt | None = None
    """Step at which the simulation begins."""


TRAINED_ROWS = "_axolotl_trained_rows"
"""Attribute of a parameter of which `unfrozen_parameters` trains a range of rows: which ones."""


class ModelSection(Section):
    """What is loaded: weights, tokenizer, precision, attention."""

    title: ClassVar[str] = "Model, tokenizer, precision, attention"

    # Weights
    base_model: Text = required("")
    """Folder or Hub name of the model that training starts from."""
    base_model_config: Text | None = None
    """Folder or Hub name of the architecture's configuration, where it is not the base model's own."""
    cls_model_config: Text | None = None
    """Class of transformers that reads the configuration, such as AutoConfig."""
    model_type: Text | None = None
    """Class of transformers that loads the model; AutoModelForCausalLM fits nearly always."""
    revision_of_model: Text | None = None
    """Branch, tag or commit of the base model on the Hub."""
    overrides_of_model_config: dict[str, Any] | None = None
    """Values that replace those of the model's configuration, such as rope parameters."""
    overrides_of_model_kwargs: dict[str, Any] | None = None
    """Extra arguments for loading the model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model or tokenizer. Only for sources that you trust."""
    reinit_weights: bool = False
    """Start from random weights of the model's architecture, as pretraining from nothing does."""
    num_labels: PositiveInt | None = later("reward models")
    """Number of classes of a classification head."""
    low_cpu_mem_usage: bool | None = idle("weights are always loaded piece by piece")
    """Load weights piece by piece, so that the model is never twice in memory."""
    device: Any = None
    """Device to load onto; chosen by itself when unset."""
    device_map: Any = None
    """Where each part of the model goes: a name such as `auto`, or a mapping of module to device."""
    max_memory: dict[int | Text, int | Text] | None = None
    """Memory that loading may use on each device."""
    gpu_memory_limit: int | Text | None = None
    """Memory that loading may use on each GPU, in GiB or with a unit."""
    experimental_skip_move_to_device: bool = idle("the model is loaded where it trains", True)
    """Leave the model where loading put it."""
    llama4_linearized_experts: bool = later("mixture-of-experts kernels", False)
    """Use plain linear layers for the experts of Llama 4, so that they can be quantised."""
    is_falcon_derived_model: bool | None = idle(_DESCENT)
    """Says that the model descends from Falcon, which its own configuration tells too."""
    is_llama_derived_model: bool | None = idle(_DESCENT)
    """Says that the model descends from Llama, which its own configuration tells too."""
    is_mistral_derived_model: bool | None = idle(_DESCENT)
    """Says that the model descends from Mistral, which its own configuration tells too."""
    is_qwen_derived_model: bool | None = idle(_DESCENT)
    """Says that the model descends from Qwen, which its own configuration tells too."""
    unfrozen_parameters: list[Text] | None = None
    """Patterns of the parameters that are trained; all others stay frozen. A pattern may end in a row range."""
    freeze_mm_modules: bool = later("multimodal training", False)
    """Freeze the parts of a multimodal model that see or hear."""

    # Tokenizer
    tokenizer_config: Text | None = None
    """Folder or Hub name of the tokenizer, where it is not the base model's own."""
    tokenizer_type: Text | None = None
    """Class of transformers that loads the tokenizer; AutoTokenizer fits nearly always."""
    tokenizer_use_fast: bool | None = None
    """Ask for the fast tokenizer (the default) or the slow one."""
    tokenizer_legacy: bool | None = None
    """Keep the old treatment of spaces of Llama's tokenizer."""
    tokenizer_use_mistral_common: bool = later("the mistral-common tokenizer", False)
    """Use the tokenizer of the mistral-common package."""
    tokenizer_save_jinja_files: bool = idle("the template is always saved as a file too", True)
    """Save the chat template as a file of its own beside the tokenizer."""
    special_tokens: SpecialTokens | None = None
    """Tokens for beginning, end, padding and the unknown."""
    tokens: list[Text] | None = None
    """New ordinary tokens for the vocabulary."""
    added_tokens_overrides: dict[Int, Text] | None = None
    """New text for reserved tokens, by id."""
    resize_token_embeddings_to_32x: bool = False
    """Round the vocabulary up to a multiple of 32."""
    mean_resizing_embeddings: bool = False
    """Start new token embeddings near the mean of the old ones."""
    shrink_embeddings: bool = False
    """Cut embeddings down to the tokenizer's size where the model has more."""
    embeddings_skip_upcast: bool = idle("embeddings keep the precision in which they were loaded", False)
    """Keep embeddings in the model's precision where training would raise them to float32."""
    fix_untrained_tokens: int | list[Int] | None = None
    """Ids of tokens whose embeddings were never trained and are set to the mean of the others."""

    # Quantised weights
    load_in_8bit: bool = False
    """Hold the frozen weights in 8 bits (bitsandbytes)."""
    load_in_4bit: bool = False
    """Hold the frozen weights in 4 bits (bitsandbytes), as QLoRA does."""
    bnb_config_kwargs: dict[str, Any] | None = None
    """Extra arguments for the bitsandbytes configuration."""
    gptq: bool = False
    """The base model holds GPTQ weights; only checked, since the files say so themselves."""
    qlora_sharded_model_loading: bool = idle("it comes with FSDP", False)
    """Load 4-bit weights shard by shard on every process."""
    quantize_moe_experts: bool = later("mixture-of-experts kernels", False)
    """Also quantise the experts of a mixture-of-experts model."""
    model_quantization_config: Literal["Mxfp4Config", "FineGrainedFP8Config"] | None = None
    """Quantisation scheme in which the base model comes: Mxfp4Config or FineGrainedFP8Config."""
    model_quantization_config_kwargs: dict[str, Any] | None = None
    """Arguments of that scheme; training always unpacks the weights (`dequantize: true`)."""
    use_onebitllms: bool = later("1-bit models", False)
    """Train a 1-bit model with the onebitllms package."""
    quantization: PostTrainingQuantization | None = None
    """How the finished weights are quantised."""
    qat: QuantizationAwareTraining | None = later("quantisation-aware training")
    """Train as if the weights were quantised already."""

    ple_cpu_offload: bool = later("embeddings held in CPU memory", False)
    """Hold a model's largest embeddings in CPU memory."""

    # Precision
    bf16: Literal["auto", "full"] | bool = "auto"
    """Train in bfloat16; `auto` does so where the hardware can."""
    fp16: Annotated[bool | None, BeforeValidator(_auto), Also("`auto`", {"enum": ["auto"]})] = None
    """Train in float16 with loss scaling."""
    fp8: bool = False
    """Do the matrix products in 8-bit floats."""
    fp8_config: dict[str, Any] | None = later("recipes of 8-bit products")
    """How numbers are brought to 8 bits."""
    fp8_enable_fsdp_float8_all_gather: bool = later("gathering FSDP shards in 8-bit floats", False)
    """Gather sharded weights in 8-bit floats."""
    bfloat16: bool = False
    """Load and train purely in bfloat16, without float32 copies."""
    float16: bool = False
    """Load and train purely in float16, without float32 copies."""
    float32: bool = False
    """Load and train purely in float32."""
    tf32: Literal["auto"] | bool = "auto"
    """Let float32 matrix products use TensorFloat-32; `auto` does so where the GPU can."""
    fp32_norms: bool = False
    """Keep the norm layers in float32."""
    fp32_norm_classes: list[Text] | None = None
    """Which norm classes to keep in float32."""

    # Attention
    attn_implementation: Text | None = None
    """Attention to use: eager, sdpa, flash_attention_2, flash_attention_3, flex_attention, xformers, or a Hub kernel."""
    attn_kernel: (
        Literal[
            "auto",
            "flash_attention_2",
            "flash_attention_3",
            "flash_attention_4",
            "torch_varlen",
            "flex",
            "padded",
            "documents",
        ]
        | None
    ) = None
    """What computes packed attention; `auto` measures what is there on the run's shapes, as is done on GPUs anyway."""
    flex_attn_compile_kwargs: dict[str, Any] | None = idle("flex attention is compiled with its defaults")
    """Arguments for compiling flex attention."""
    flash_optimum: bool = idle("PyTorch's attention takes its place", False)
    """Use the attention of the optimum package; today's PyTorch attention takes its place."""
    gemma4_hybrid_attn_impl: bool = later("attention that differs from layer to layer", False)
    """Use another attention in Gemma 4's global layers."""
    large_head_attention: Text | None = later("attention for large heads")
    """Attention for models with very large heads: auto, sdpa or triton_flash."""
    sdpa_varlen: bool | None = idle("packed rows are always kept apart")
    """Give PyTorch's attention the borders of packed rows instead of a mask."""
    fused_attn_kernel: bool | None = idle(KERNELS)
    """Fuse norm and rotary embedding of the attention where a kernel fits."""
    scaling_softmax: bool = later("attention with length-scaled softmax", False)
    """Scale attention scores with the length of the context."""
    scaling_softmax_factor: Float | None = later("attention with length-scaled softmax")
    """Factor of that scaling."""
    scaling_softmax_bias: Float | None = later("attention with length-scaled softmax")
    """Offset of that scaling."""

    @property
    def type_of_model(self) -> str | None:
        """The other spelling of `model_type`."""
        return self.model_type
