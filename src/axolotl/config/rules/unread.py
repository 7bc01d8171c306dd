"""Rules about keys that nothing reads because of another key."""

from __future__ import annotations

from collections.abc import Iterator

from axolotl.config.config import Config
from axolotl.config.rules.rulebook import TRAINING, rule, warning
from axolotl.errors import Problem

_SYNTHETIC = ("length", "sequence_length", "min_input_id", "max_input_id", "seed")
# What stands in the file of an adapter that is continued.
_SAVED_WITH_IT = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_linear",
    "lora_target_parameters",
    "lora_modules_to_save",
    "lora_exclude_modules",
    "lora_rank_pattern",
    "lora_alpha_pattern",
    "peft_layers_to_transform",
    "peft_layer_replication",
    "peft_trainable_token_indices",
    "peft_use_dora",
    "peft_use_rslora",
    "peft_init_lora_weights",
)
_OF_AN_ADAPTER = (
    *_SAVED_WITH_IT,
    "lora_fan_in_fan_out",
    "lora_model_dir",
    "loraplus_lr_ratio",
    "merge_lora",
    "peft",
    "peft_ensure_weight_tying",
    "peft_layers_pattern",
)


def _written(cfg: Config, keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if cfg.is_set(key) and cfg.get(key)]


@rule("adapter", *_OF_AN_ADAPTER, verbs=TRAINING)
def lora_keys_need_an_adapter(cfg: Config) -> Iterator[Problem]:
    """Without `adapter` the whole model is trained."""
    written = [] if cfg.adapter.adapter else _written(cfg, _OF_AN_ADAPTER)
    if written:
        more = f" (nor have {', '.join(f'`{k}`' for k in written[1:])})" if written[1:] else ""
        yield warning(
            f"`{written[0]}` has no effect without `adapter`: the whole model is trained{more}.",
            "Add `adapter: lora` if you mean to train an adapter.",
            *written,
            "adapter",
        )


@rule("lora_model_dir", *_SAVED_WITH_IT, verbs=TRAINING)
def a_saved_adapter_keeps_its_shape(cfg: Config) -> Iterator[Problem]:
    """What an adapter is stands in its own file."""
    written = _written(cfg, _SAVED_WITH_IT) if cfg.adapter.adapter and cfg.adapter.lora_model_dir else []
    if written:
        more = f", and so do {', '.join(f'`{k}`' for k in written[1:])}" if written[1:] else ""
        yield warning(
            f"`lora_model_dir` continues a saved adapter, which keeps its own `{written[0]}`{more}: what is written "
            "here has no effect.",
            "Delete them, or delete `lora_model_dir` to begin a new adapter.",
            *written,
            "lora_model_dir",
        )


@rule("loraplus_lr_embedding", "loraplus_lr_ratio", verbs=TRAINING)
def the_rate_of_adapted_embeddings_needs_its_ratio(cfg: Config) -> Iterator[Problem]:
    """LoRA+ begins with its ratio."""
    if cfg.is_set("loraplus_lr_embedding") and not cfg.adapter.loraplus_lr_ratio:
        yield warning(
            "`loraplus_lr_embedding` has no effect without `loraplus_lr_ratio`.",
            "Add `loraplus_lr_ratio: 16`, or delete it.",
            "loraplus_lr_embedding",
            "loraplus_lr_ratio",
        )


@rule("adapter", "unfrozen_parameters", "peft_layers_to_transform", verbs=TRAINING)
def an_adapter_freezes_the_rest(cfg: Config) -> Iterator[Problem]:
    """Under an adapter every weight of the base model is frozen."""
    adapter = cfg.adapter
    if adapter.adapter and cfg.model.unfrozen_parameters and not adapter.peft_layers_to_transform:
        yield warning(
            f"`unfrozen_parameters` has no effect beside `adapter: {adapter.adapter}`, which freezes the whole model.",
            "List whole layers under `lora_modules_to_save`, or delete one of them.",
            "unfrozen_parameters",
            "adapter",
        )


@rule("max_memory", "gpu_memory_limit", "device_map")
def limits_of_memory_need_a_map(cfg: Config) -> Iterator[Problem]:
    """Only where parts of the model are placed does their memory count."""
    if cfg.model.device_map is not None:
        return
    for key in ("max_memory", "gpu_memory_limit"):
        if cfg.get(key) is not None:
            yield warning(
                f"`{key}` has no effect without `device_map`: the model is loaded whole.",
                "Add `device_map: auto`, or delete it.",
                key,
                "device_map",
            )


@rule("datasets", "test_datasets")
def synthetic_keys_need_synthetic_rows(cfg: Config) -> Iterator[Problem]:
    """Rows that are read have their own length and tokens."""
    for name in ("datasets", "test_datasets"):
        for index, entry in enumerate(getattr(cfg.data, name)):
            for key in _SYNTHETIC if entry.type != "_synthetic" else ():
                if getattr(entry, key) is not None:
                    yield warning(
                        f"`{name}[{index}].{key}` has no effect: it belongs to `type: _synthetic`.",
                        "Delete it.",
                        f"{name}[{index}].{key}",
                    )
