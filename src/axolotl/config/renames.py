"""Old spellings: what a key is called today, why another is gone, and leftovers that do no harm.

Each table maps an old key. Keys renamed quietly are spellings that people still write; the others get a warning.
"""

from __future__ import annotations

import re
from typing import Any

from axolotl.config.yaml_file import Document, Path, Spot, dotted
from axolotl.errors import Kind, Place, Problem

# Another spelling of the same, no word lost about it.
ALIASES = {
    "type_of_model": "model_type",
    "model_revision": "revision_of_model",
    "model_config": "overrides_of_model_config",
    "model_kwargs": "overrides_of_model_kwargs",
}

# Called otherwise today.
RENAMED = {
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "dpo_beta": "rl_beta",
    "evaluation_strategy": "eval_strategy",
    "dataset_processes": "dataset_num_proc",
    "pretrain_multipack_buffer_size": "streaming_multipack_buffer_size",
    "sequence_parallel_degree": "context_parallel_size",
    "liger_swiglu": "liger_glu_activation",
    "flash_attn_cross_entropy_loss": "flash_attn_cross_entropy",
    "push_to_hub_model_id": "hub_model_id",
    "relora_steps": "jagged_restart_steps",
    "relora_warmup_steps": "jagged_restart_warmup_steps",
    "relora_anneal_steps": "jagged_restart_anneal_steps",
}

# Booleans that choose one value of a new key; the first that is true wins.
CHOICES = {
    "xformers_attention": ("attn_implementation", "xformers"),
    "sage_attention": ("attn_implementation", "sage"),
    "flex_attention": ("attn_implementation", "flex_attention"),
    "flash_attention": ("attn_implementation", "flash_attention_2"),
    "sdp_attention": ("attn_implementation", "sdpa"),
    "eager_attention": ("attn_implementation", "eager"),
    "flash_attn_d512": ("large_head_attention", "triton_flash"),
    "gemma4_fp8_nonexpert": ("nonexpert_quantization", "fp8"),
    "gemma4_nf4_nonexpert": ("nonexpert_quantization", "nf4"),
    "use_scattermoe": ("expert_backend", "scattermoe"),
    "use_sonicmoe": ("expert_backend", "sonicmoe"),
}

# Gone: why, and what to write instead.
_TRL_GONE = "TRL has dropped this option. Delete the line."
_UNSLOTH = "These patches were dropped. Delete the line; `lora_mlp_kernel`, `lora_qkv_kernel` and `lora_o_kernel` are faster."
REMOVED = {
    "max_packed_sequence_len": "Set `sample_packing: true`; packed rows have `sequence_len` tokens.",
    "rope_scaling": "Write it under `overrides_of_model_config:` as `rope_scaling:`.",
    "dpo_use_logits_to_keep": _TRL_GONE,
    "dpo_generate_during_eval": _TRL_GONE,
    "dpo_norm_loss": _TRL_GONE,
    "rpo_alpha": "List `sft` among `dpo_loss_type` and give its weight in `dpo_loss_weights`.",
    "s2_attention": "Shifted sparse attention was dropped. Delete the line; `sample_packing` and a longer `sequence_len` serve.",
    "flash_attn_rms_norm": "Set `liger_rms_norm: true` instead.",
    "unsloth_cross_entropy_loss": "These patches were dropped. Set `cut_cross_entropy: true` instead.",
    "unsloth_lora_mlp": _UNSLOTH,
    "unsloth_lora_qkv": _UNSLOTH,
    "unsloth_lora_o": _UNSLOTH,
    "unsloth_rms_norm": "These patches were dropped. Set `liger_rms_norm: true` instead.",
    "unsloth_rope": "These patches were dropped. Set `liger_rope: true` instead.",
    "bnb_4bit_use_double_quant": "Write it under `bnb_config_kwargs:`.",
    "bnb_4bit_quant_type": "Write it under `bnb_config_kwargs:`.",
    "bnb_4bit_compute_dtype": "Write it under `bnb_config_kwargs:`.",
    "peft_adapter": "Adapters of this kind were dropped. Use `adapter: lora`.",
    "landmark_attention": "Landmark attention was dropped. Delete the line.",
    "xpos_rope": "This rotary embedding was dropped. Delete the line.",
    "load_4bit": "Set `load_in_4bit: true` and `adapter: qlora` instead.",
}

# Left over in old files, without effect there and here.
LEFTOVER = {
    "gptq_groupsize": "the GPTQ weights say so themselves",
    "gptq_model_v1": "the GPTQ weights say so themselves",
    "gptq_disable_exllama": "the GPTQ weights say so themselves",
    "torchdistx_path": "this package is gone",
    "flash_attn_fuse_qkv": "attention is fused where a kernel fits",
    "data_seed": "`seed` decides the order of the data too",
    "eval_max_new_tokens": "the evaluation generates no answers yet",
    "base_model_ignore_patterns": "only the weights that are needed are downloaded",
    "debug": "use the flag `--debug` of `axolotl preprocess`",
    "is_preprocess": "the command decides that",
    "preprocess_iterable": "`streaming` decides that",
    "axolotl_config_path": "the command line decides that",
}

# Values that are called otherwise today.
VALUES = {"chat_template": ("inst", "mistral_v1")}

# Old sub-keys of fsdp_config.
FSDP_LEFTOVER = (
    "limit_all_gathers",
    "backward_prefetch",
    "backward_prefetch_policy",
    "forward_prefetch",
    "sharding_strategy",
    "xla",
    "xla_fsdp_v2",
    "xla_fsdp_grad_ckpt",
)

OLD_KEYS = frozenset(
    {*ALIASES, *RENAMED, *CHOICES, *REMOVED, *LEFTOVER, "fsdp", "gc_steps", "save_safetensors"}
)


def is_off(value: Any) -> bool:
    """Whether a value says "not this": null, false, empty."""
    return value is None or value is False or value in ("", [], {})


class Renaming:
    """Brings one merged document to today's keys, in place; `problems` holds what there is to say about it.

    `layer(key)` numbers the source (file or override) that a top-level key came from: two spellings of one thing are a
    conflict within a source, while a later source simply wins.
    """

    def __init__(self, document: Document, layers: dict[str, int]) -> None:
        self.document, self.layers = document, layers
        self.values, self.spots = document.values, document.spots
        self.problems: list[Problem] = []

    def tell(self, kind: Kind, message: str, remedy: str, *paths: Path) -> None:
        places = tuple(self.spots[p].key for p in paths if p in self.spots)
        self.problems.append(Problem(message, remedy, kind, tuple(dotted(p) for p in paths), places))

    def warn(self, old: Path, message: str, remedy: str = "") -> None:
        self.tell("warning", f"`{dotted(old)}` {message}", remedy, old)

    def drop(self, key: str) -> Any:
        return self.values.pop(key)

    def move(self, old: str, new: str, value: Any) -> bool:
        """Puts the value under the new key, unless the new key is written too. False where it is not moved."""
        if new in self.values and self.values[new] is not None:
            newer, older = self.layers.get(new, 0), self.layers.get(old, 0)
            if newer == older:
                self.tell(
                    "conflict",
                    f"`{old}` and `{new}` say the same thing twice.",
                    f"Keep `{new}` alone.",
                    (old,),
                    (new,),
                )
                return False
            if newer > older:
                return False
        for path in [p for p in self.spots if p[0] == new]:
            del self.spots[path]
        for path in [p for p in self.spots if p[0] == old]:
            self.spots[(new, *path[1:])] = self.spots[path]
        self.values[new] = value
        self.layers[new] = self.layers.get(old, 0)
        return True

    def run(self) -> list[Problem]:
        """Applies every table. Returns the problems, warnings among them."""
        for old, new in ALIASES.items():
            if old in self.values:
                self.move(old, new, self.drop(old))
        for old, new in RENAMED.items():
            if old in self.values:
                value = self.drop(old)
                if not is_off(value) and self.move(old, new, value):
                    self.warn((old,), f"is called `{new}` today.", f"Write `{new}:` instead.")
        self.choices()
        for old, remedy in REMOVED.items():
            if old in self.values and not is_off(self.drop(old)):
                self.tell("removed", f"`{old}` is gone.", remedy, (old,))
        for old, reason in LEFTOVER.items():
            if old in self.values and not is_off(self.drop(old)):
                self.warn((old,), f"has no effect: {reason}.", "Delete the line.")
        if "save_safetensors" in self.values and self.drop("save_safetensors") is False:
            self.tell(
                "removed",
                "`save_safetensors: false` is gone: weights are always saved as safetensors.",
                "Delete the line.",
                ("save_safetensors",),
            )
        for key, (old_value, value) in VALUES.items():
            if self.values.get(key) == old_value:
                self.values[key] = value
                self.warn(
                    (key,), f"`{old_value}` is called `{value}` today.", f"Write `{key}: {value}` instead."
                )
        self.gc_steps()
        self.gradient_checkpointing()
        self.fsdp()
        for key in ("datasets", "test_datasets", "pretraining_dataset"):
            entries = self.values.get(key)
            for index, entry in enumerate(entries if isinstance(entries, list) else []):
                if isinstance(entry, dict):
                    self.dataset((key, index), entry)
        return self.problems

    def choices(self) -> None:
        """Booleans of old, each of which chose one value of a new key."""
        chosen: dict[str, str] = {}
        for old, (new, value) in CHOICES.items():
            if old not in self.values:
                continue
            wanted = self.drop(old)
            if wanted not in (True, "true", 1):
                if not is_off(wanted) and wanted not in ("false", 0):
                    self.tell(
                        "invalid_value",
                        f"`{old}` is `{wanted}`; it takes true or false.",
                        f"Write `{new}: {value}` instead.",
                        (old,),
                    )
                continue
            if new in chosen:
                earlier = chosen[new]
                if self.layers.get(earlier, 0) >= self.layers.get(old, 0):
                    self.warn(
                        (old,), f"has no effect beside `{earlier}`.", f"Write `{new}:` instead of both."
                    )
                    continue
            if self.move(old, new, value):
                chosen[new] = old

    def gc_steps(self) -> None:
        steps = self.values.pop("gc_steps", None)
        if steps is not None:
            for new in ("torch_empty_cache_steps", "gc_collect_steps"):
                if self.values.get(new) is None and not (new == "torch_empty_cache_steps" and steps == -1):
                    self.move("gc_steps", new, steps)
            self.warn(("gc_steps",), "is two keys today: `torch_empty_cache_steps` and `gc_collect_steps`.")

    def gradient_checkpointing(self) -> None:
        """`offload`, `offload_disk` and `unsloth` are what activation_offloading does."""
        way = self.values.get("gradient_checkpointing")
        if way in ("offload", "offload_disk", "unsloth"):
            self.values["gradient_checkpointing"] = True
            if self.values.get("activation_offloading") is None:
                self.move(
                    "gradient_checkpointing",
                    "activation_offloading",
                    "disk" if way == "offload_disk" else True,
                )
            self.warn(
                ("gradient_checkpointing",),
                f"`{way}` is called `activation_offloading` today.",
                "Write `gradient_checkpointing: true` and `activation_offloading: true` instead.",
            )

    def fsdp(self) -> None:
        """The list `fsdp:` and the prefixes `fsdp_` inside `fsdp_config` belong to older versions."""
        config = self.values.get("fsdp_config")
        if isinstance(config, dict):
            self.fsdp_prefixes(config)
        listed = self.values.pop("fsdp", None)
        if is_off(listed):
            return
        words = listed.split() if isinstance(listed, str) else listed
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            self.tell(
                "invalid_value",
                "`fsdp` is a list of words such as `[full_shard, auto_wrap]`.",
                "Write `fsdp_config:` instead.",
                ("fsdp",),
            )
            return
        known = {
            "full_shard": ("reshard_after_forward", True),
            "shard_grad_op": ("reshard_after_forward", False),
            "hybrid_shard": ("reshard_after_forward", True),
            "auto_wrap": ("auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
            "offload": ("offload_params", True),
        }
        unknown = [word for word in words if word not in known]
        if unknown:
            self.tell(
                "invalid_value",
                f"`fsdp` holds `{unknown[0]}`, which is not one of {', '.join(known)}.",
                "Write `fsdp_config:` instead.",
                ("fsdp",),
            )
            return
        if not isinstance(config, dict):
            self.values["fsdp_config"] = config = {}
            self.spots[("fsdp_config",)] = self.spots.get(("fsdp",), _nowhere())
        for word in words:
            key, value = known[word]
            config.setdefault(key, value)
        self.warn(
            ("fsdp",),
            "belongs to an older version; `fsdp_config` says it all.",
            "Write `fsdp_config:` alone, and `fsdp_version: 2` beside it.",
        )

    def fsdp_prefixes(self, config: dict[Any, Any]) -> None:
        for old in list(config):
            new = {"version": "fsdp_version", "fsdp_version": "fsdp_version"}.get(str(old))
            new = new or str(old).removeprefix("fsdp_")
            if new == old:
                continue
            at, path = ("fsdp_config", new), ("fsdp_config", old)
            if new in config:
                self.tell(
                    "conflict",
                    f"`{dotted(path)}` and `{dotted(at)}` say the same thing twice.",
                    f"Keep `{new}` alone.",
                    path,
                    at,
                )
                config.pop(old)
                continue
            config[new] = config.pop(old)
            if path in self.spots:
                self.spots[at] = self.spots[path]
        if "cpu_offload" in config:
            config.setdefault("offload_params", config.pop("cpu_offload"))
        strategy = config.get("sharding_strategy")
        if strategy in ("FULL_SHARD", "SHARD_GRAD_OP") and "reshard_after_forward" not in config:
            config["reshard_after_forward"] = strategy == "FULL_SHARD"
        for old in FSDP_LEFTOVER:
            if old in config and not is_off(config.pop(old)) and old != "sharding_strategy":
                self.warn(("fsdp_config", old), "has no effect on today's FSDP.", "Delete the line.")

    def dataset(self, at: Path, entry: dict[Any, Any]) -> None:
        """One entry of a list of datasets."""
        for old, target in (("message_field_role", "role"), ("message_field_content", "content")):
            if old in entry:
                name = entry.pop(old)
                if is_off(name):
                    continue
                mappings = entry.setdefault("message_property_mappings", {})
                if not isinstance(mappings, dict):
                    continue
                if mappings.get(target) not in (None, name):
                    self.tell(
                        "conflict",
                        f"`{old}: {name}` and `message_property_mappings.{target}: "
                        f"{mappings[target]}` contradict each other.",
                        f"Delete `{old}`.",
                        (*at, old),
                        (*at, "message_property_mappings", target),
                    )
                mappings.setdefault(target, name)
                self.spots.setdefault(
                    (*at, "message_property_mappings"), self.spots.get((*at, old), _nowhere())
                )
        if "train_on_split" in entry:
            split = entry.pop("train_on_split")
            if not is_off(split):
                entry.setdefault("split", split)
                self.warn((*at, "train_on_split"), "is called `split` today.", "Write `split:` instead.")
        kind = entry.get("type")
        if isinstance(kind, str) and re.match(r"sharegpt(_\w+)?([.:].*)?$", kind):
            self.tell(
                "removed",
                f"`type: {kind}` is gone: `chat_template` reads such data.",
                "Write `type: chat_template`, `field_messages: conversations` and `message_property_mappings: "
                "{role: from, content: value}` instead.",
                (*at, "type"),
            )
            del entry["type"]
        elif isinstance(kind, str) and kind.startswith("chat_template."):
            entry["type"] = (
                "chat_template" if kind in ("chat_template.default", "chat_template.load") else kind
            )


def _nowhere() -> Spot:
    return Spot(Place(""), Place(""))
