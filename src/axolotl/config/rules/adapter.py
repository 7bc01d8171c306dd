"""Rules about adapters, quantised weights, freezing and their kernels."""

from __future__ import annotations

import re
from collections.abc import Iterator

from axolotl.config.config import Config
from axolotl.config.rules.rulebook import conflict, rule, warning
from axolotl.errors import Problem

_TRAINS = ("train", "check", "plan", "doctor")
_LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


@rule("load_in_8bit", "load_in_4bit")
def one_width_of_weights(cfg: Config) -> Iterator[Problem]:
    """Weights are held in 8 bits or in 4."""
    if cfg.model.load_in_8bit and cfg.model.load_in_4bit:
        yield conflict(
            "`load_in_8bit` and `load_in_4bit` cannot both be true.",
            "Set one of them to false.",
            "load_in_8bit",
            "load_in_4bit",
        )


@rule("gptq", "model_quantization_config", "load_in_8bit", "load_in_4bit")
def weights_are_quantised_once(cfg: Config) -> Iterator[Problem]:
    """Weights that come quantised are not quantised again."""
    for key in ("gptq", "model_quantization_config"):
        for other in ("load_in_8bit", "load_in_4bit"):
            if getattr(cfg.model, key) and getattr(cfg.model, other):
                yield conflict(
                    f"`{key}` says that the base model comes quantised; `{other}` would quantise it again.",
                    f"Remove `{other}`, or start from the full-precision model without `{key}`.",
                    key,
                    other,
                )


@rule("model_quantization_config", "model_quantization_config_kwargs")
def arguments_of_a_scheme(cfg: Config) -> Iterator[Problem]:
    """Arguments belong to a scheme."""
    if cfg.model.model_quantization_config_kwargs and not cfg.model.model_quantization_config:
        yield conflict(
            "`model_quantization_config_kwargs` are arguments of `model_quantization_config`, which is not set.",
            "Set `model_quantization_config: Mxfp4Config` or `FineGrainedFP8Config`, or remove the arguments.",
            "model_quantization_config_kwargs",
            "model_quantization_config",
        )


@rule("load_in_8bit", "load_in_4bit", "adapter", verbs=_TRAINS)
def quantised_weights_need_an_adapter(cfg: Config) -> Iterator[Problem]:
    """Quantised weights are frozen, so something else has to learn."""
    for key in ("load_in_8bit", "load_in_4bit"):
        if getattr(cfg.model, key) and not cfg.adapter.adapter:
            yield conflict(
                f"`{key}` freezes the weights, and without `adapter` nothing is left to train.",
                f"Add `adapter: {'qlora' if key == 'load_in_4bit' else 'lora'}`, or set `{key}: false`.",
                key,
                "adapter",
            )


@rule("adapter", "load_in_4bit", "load_in_8bit", verbs=_TRAINS)
def qlora_trains_on_4_bits(cfg: Config) -> Iterator[Problem]:
    """QLoRA is LoRA on 4-bit weights."""
    if cfg.adapter.adapter != "qlora":
        return
    if cfg.model.load_in_8bit:
        yield conflict(
            "`adapter: qlora` trains on 4-bit weights, but `load_in_8bit` is true.",
            "Set `load_in_8bit: false` and `load_in_4bit: true`, or `adapter: lora`.",
            "adapter",
            "load_in_8bit",
        )
    elif not cfg.model.load_in_4bit:
        yield conflict(
            "`adapter: qlora` trains on 4-bit weights, but `load_in_4bit` is not true.",
            "Set `load_in_4bit: true`, or `adapter: lora`.",
            "adapter",
            "load_in_4bit",
        )


@rule("adapter", "lora_r", "lora_alpha", "lora_model_dir", verbs=_TRAINS)
def lora_has_a_size(cfg: Config) -> Iterator[Problem]:
    """A new adapter needs its rank and its strength."""
    adapter = cfg.adapter
    if adapter.adapter not in ("lora", "qlora") or adapter.lora_model_dir:
        return
    for key, usual in (("lora_r", 16), ("lora_alpha", 32)):
        if getattr(adapter, key) is None:
            yield conflict(
                f"`adapter: {adapter.adapter}` needs `{key}`.",
                f"Add `{key}: {usual}`.",
                key,
                "adapter",
                kind="missing",
            )


@rule("adapter", "lora_target_linear", "lora_target_modules", "lora_target_parameters", verbs=_TRAINS)
def lora_has_targets(cfg: Config) -> Iterator[Problem]:
    """A new adapter needs layers to adapt."""
    adapter = cfg.adapter
    if adapter.adapter not in ("lora", "qlora") or adapter.lora_model_dir:
        return
    if not (adapter.lora_target_linear or adapter.lora_target_modules or adapter.lora_target_parameters):
        yield conflict(
            f"`adapter: {adapter.adapter}` does not say which layers it adapts.",
            "Add `lora_target_linear: true`, or `lora_target_modules:` with their names.",
            "lora_target_modules",
            "lora_target_linear",
            "lora_target_parameters",
            "adapter",
            kind="missing",
        )


@rule("lora_target_modules")
def target_patterns_are_valid(cfg: Config) -> Iterator[Problem]:
    """Targets are names or regular expressions."""
    targets = cfg.adapter.lora_target_modules
    for each in [targets] if isinstance(targets, str) else targets or []:
        try:
            re.compile(each)
        except re.error as error:
            yield conflict(
                f"`lora_target_modules` holds `{each}`, which is no valid regular expression: {error}.",
                "Write the names of layers, or a valid expression.",
                "lora_target_modules",
                kind="invalid_value",
            )


@rule("lora_target_parameters", "lora_dropout")
def adapted_parameters_have_no_dropout(cfg: Config) -> Iterator[Problem]:
    """A parameter that is adapted directly has no input to drop."""
    if cfg.adapter.lora_target_parameters and cfg.adapter.lora_dropout:
        yield conflict(
            "`lora_target_parameters` cannot be combined with `lora_dropout`.",
            "Set `lora_dropout: 0`.",
            "lora_dropout",
            "lora_target_parameters",
        )


@rule("lr_groups", "loraplus_lr_ratio")
def one_way_of_grouping_parameters(cfg: Config) -> Iterator[Problem]:
    """LoRA+ makes parameter groups of its own."""
    if cfg.optim.lr_groups and cfg.adapter.loraplus_lr_ratio:
        yield conflict(
            "`lr_groups` and `loraplus_lr_ratio` both group the parameters.",
            "Keep one of them.",
            "lr_groups",
            "loraplus_lr_ratio",
        )


@rule("adapter", "peft_layers_to_transform", "unfrozen_parameters")
def an_adapter_chooses_its_layers_once(cfg: Config) -> Iterator[Problem]:
    """Both keys choose what is trained, in different ways."""
    if cfg.adapter.adapter and cfg.adapter.peft_layers_to_transform and cfg.model.unfrozen_parameters:
        yield conflict(
            "`peft_layers_to_transform` and `unfrozen_parameters` both choose what is trained.",
            "Keep one of them.",
            "peft_layers_to_transform",
            "unfrozen_parameters",
        )


@rule("peft_layers_pattern", "peft_layers_to_transform")
def a_layers_pattern_needs_layers(cfg: Config) -> Iterator[Problem]:
    """The pattern names the list whose indices are chosen."""
    if cfg.adapter.peft_layers_pattern and not cfg.adapter.peft_layers_to_transform:
        yield conflict(
            "`peft_layers_pattern` says where the layers are, but none is chosen.",
            "Add `peft_layers_to_transform`.",
            "peft_layers_pattern",
            "peft_layers_to_transform",
        )


@rule("flash_attn_fuse_mlp", "adapter")
def fused_layers_cannot_be_adapted(cfg: Config) -> Iterator[Problem]:
    """LoRA needs the single layers that fusing removes."""
    if cfg.kernels.flash_attn_fuse_mlp and cfg.adapter.adapter:
        yield conflict(
            "`flash_attn_fuse_mlp` removes the layers that `adapter` adapts.",
            "Set `flash_attn_fuse_mlp: false`; `lora_mlp_kernel: true` is the fused path for LoRA.",
            "flash_attn_fuse_mlp",
            "adapter",
        )


@rule(*_LORA_KERNELS, "adapter", "load_in_8bit", "trust_remote_code")
def lora_kernels_have_limits(cfg: Config) -> Iterator[Problem]:
    """Where a fused LoRA kernel cannot work, the plain path computes the same."""
    for key in _LORA_KERNELS:
        if not getattr(cfg.kernels, key):
            continue
        for other, on, why in (
            ("adapter", not cfg.adapter.adapter, "there is no adapter"),
            ("load_in_8bit", cfg.model.load_in_8bit, "8-bit weights have no fused path"),
            ("trust_remote_code", cfg.model.trust_remote_code, "the model's own code cannot be fused"),
        ):
            if on:
                yield warning(f"`{key}` has no effect here: {why}.", f"Delete `{key}`.", key, other)


@rule("fix_untrained_tokens", "peft_trainable_token_indices", "adapter")
def mended_tokens_are_trained(cfg: Config) -> Iterator[Problem]:
    """A token whose embedding is mended should be trained afterwards."""
    fixed, trained = cfg.model.fix_untrained_tokens, cfg.adapter.peft_trainable_token_indices
    if not cfg.adapter.adapter or fixed is None or not isinstance(trained, list):
        return
    missing = [each for each in ([fixed] if isinstance(fixed, int) else fixed) if each not in trained]
    if missing:
        yield warning(
            f"`fix_untrained_tokens` mends token {missing[0]}, which is not trained.",
            "Add it to `peft_trainable_token_indices`.",
            "fix_untrained_tokens",
            "peft_trainable_token_indices",
        )


@rule("bnb_config_kwargs", "load_in_8bit", "load_in_4bit")
def bnb_options_need_bnb(cfg: Config) -> Iterator[Problem]:
    """Options of bitsandbytes do nothing for weights in full precision."""
    if cfg.model.bnb_config_kwargs and not (cfg.model.load_in_4bit or cfg.model.load_in_8bit):
        yield warning(
            "`bnb_config_kwargs` has no effect without `load_in_4bit` or `load_in_8bit`.",
            "Set one of them, or delete it.",
            "bnb_config_kwargs",
        )


@rule("reinit_weights", "adapter")
def random_weights_are_trained_in_full(cfg: Config) -> Iterator[Problem]:
    """An adapter on frozen random weights learns next to nothing."""
    if cfg.model.reinit_weights and cfg.adapter.adapter:
        yield warning(
            "`reinit_weights` makes the weights random, and `adapter` then keeps them so.",
            "Delete `adapter`, or set `reinit_weights: false`.",
            "reinit_weights",
            "adapter",
        )


@rule("unfrozen_parameters", "fsdp_config")
def rows_are_not_known_to_fsdp(cfg: Config) -> Iterator[Problem]:
    """FSDP divides a weight by its rows, and trains all of them."""
    ranged = [each for each in cfg.model.unfrozen_parameters or [] if re.search(r"\[\d*:\d*\]$", each)]
    if ranged and cfg.distributed.fsdp_config:
        yield conflict(
            f"`unfrozen_parameters: {ranged[0]}` is a range of rows, and FSDP would train all of them.",
            "Delete the range, or train without `fsdp_config`.",
            "unfrozen_parameters",
            "fsdp_config",
        )


@rule("unfrozen_parameters", "gradient_checkpointing_kwargs")
def frozen_weights_need_new_checkpointing(cfg: Config) -> Iterator[Problem]:
    """The reentrant kind loses gradients where inputs need none."""
    kwargs = cfg.train.gradient_checkpointing_kwargs or {}
    if cfg.model.unfrozen_parameters and kwargs.get("use_reentrant") is True:
        yield conflict(
            "`unfrozen_parameters` gets no gradients under reentrant checkpointing.",
            "Set `use_reentrant: false`.",
            "gradient_checkpointing_kwargs.use_reentrant",
            "unfrozen_parameters",
        )
