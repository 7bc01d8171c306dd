"""The index of all keys: who owns each, what is nested in it, and which one a misspelt key was meant to be."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from axolotl.config.adapter import AdapterSection
from axolotl.config.data import DataSection
from axolotl.config.distributed import DistributedSection
from axolotl.config.kernels import KernelsSection
from axolotl.config.method import MethodSection
from axolotl.config.model import ModelSection
from axolotl.config.optim import OptimSection
from axolotl.config.output import OutputSection
from axolotl.config.section import Block, Section, members
from axolotl.config.tracking import TrackingSection
from axolotl.config.train import TrainSection
from axolotl.config.yaml_file import Path as KeyPath

SECTIONS: MappingProxyType[str, type[Section]] = MappingProxyType(
    {
        "model": ModelSection,
        "adapter": AdapterSection,
        "data": DataSection,
        "optim": OptimSection,
        "train": TrainSection,
        "method": MethodSection,
        "distributed": DistributedSection,
        "kernels": KernelsSection,
        "tracking": TrackingSection,
        "output": OutputSection,
    }
)

# Words that people bring from other tools.
SYNONYMS = {
    "adapter_path": "lora_model_dir",
    "alpha": "lora_alpha",
    "attention": "attn_implementation",
    "base_model_name": "base_model",
    "batch": "micro_batch_size",
    "checkpoint_dir": "output_dir",
    "context_length": "sequence_len",
    "cutoff_len": "sequence_len",
    "dataset": "datasets",
    "do_eval": "eval_strategy",
    "dropout": "lora_dropout",
    "dtype": "bf16",
    "epochs": "num_epochs",
    "eval_data": "test_datasets",
    "eval_dataset": "test_datasets",
    "eval_datasets": "test_datasets",
    "eta_min": "cosine_min_lr_ratio",
    "finetuning_type": "adapter",
    "grad_accum": "gradient_accumulation_steps",
    "grad_accumulation_steps": "gradient_accumulation_steps",
    "hf_token": "hf_use_auth_token",
    "hub_repo": "hub_model_id",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "max_len": "sequence_len",
    "max_length": "sequence_len",
    "max_seq_len": "sequence_len",
    "max_seq_length": "sequence_len",
    "mixed_precision": "bf16",
    "model": "base_model",
    "model_name": "base_model",
    "model_name_or_path": "base_model",
    "modules_to_save": "lora_modules_to_save",
    "num_train_epochs": "num_epochs",
    "optim": "optimizer",
    "output": "output_dir",
    "packing": "sample_packing",
    "per_device_eval_batch_size": "eval_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "precision": "bf16",
    "processing_class": "tokenizer_type",
    "quantization_config": "bnb_config_kwargs",
    "r": "lora_r",
    "rank": "lora_r",
    "rl_config": "trl",
    "save_embedding_layers": "lora_modules_to_save",
    "scheduler": "lr_scheduler",
    "seq_len": "sequence_len",
    "sequence_length": "sequence_len",
    "target_modules": "lora_target_modules",
    "template": "chat_template",
    "tokenizer": "tokenizer_config",
    "tokenizer_name": "tokenizer_config",
    "tokenizer_name_or_path": "tokenizer_config",
    "tokenizer_path": "tokenizer_config",
    "torch_dtype": "bf16",
    "train_batch_size": "micro_batch_size",
    "use_auth_token": "hf_use_auth_token",
    "use_dora": "peft_use_dora",
    "use_lora": "adapter",
    "use_qlora": "adapter",
    "use_rslora": "peft_use_rslora",
    "val_dataset": "test_datasets",
    "val_datasets": "test_datasets",
    "val_size": "val_set_size",
    "validation_dataset": "test_datasets",
    "validation_datasets": "test_datasets",
    "wandb_run": "wandb_name",
    "wandb_run_name": "wandb_name",
    "warmup": "warmup_ratio",
}


@functools.cache
def owners() -> dict[str, str]:
    """Each top-level key and the section that owns it."""
    found: dict[str, str] = {}
    for name, section in SECTIONS.items():
        for key in section.model_fields:
            if key in found:
                raise TypeError(f"{key} is owned by {found[key]} and by {name}")
            found[key] = name
    return found


def owner(key: str) -> type[Section]:
    """The section class of a top-level key."""
    return SECTIONS[owners()[key]]


def blocks_in(annotation: object) -> list[type[Block]]:
    """The nested blocks that a field can hold, directly or as list items."""
    found: list[type[Block]] = []
    for kind in members(annotation):
        if isinstance(kind, type) and issubclass(kind, Block):
            found.append(kind)
        elif get_origin(kind) in (list, tuple):
            found += blocks_in(get_args(kind)[0])
    return found


def field_at(model: type[BaseModel], path: KeyPath) -> tuple[Any, tuple[Any, ...]] | None:
    """Annotation and limits of the value at a path below a model; None for a key that is not one of ours."""
    field = model.model_fields.get(str(path[0]))
    if field is None:
        return None
    annotation, metadata = field.annotation, tuple(field.metadata)
    for index, part in enumerate(path[1:], 1):
        inner = [b for b in blocks_in(annotation) if not isinstance(part, int) and part in b.model_fields]
        if inner:
            return field_at(inner[0], path[index:])
        items = [k for k in members(annotation) if get_origin(k) in (list, dict)]
        if not items:
            return None
        annotation, metadata = get_args(items[0])[-1], ()
    return annotation, metadata


def block_at(model: type[BaseModel], path: KeyPath) -> type[Block] | None:
    """The block whose keys stand at a path, such as DatasetEntry at datasets[0]."""
    found: type[BaseModel] | None = model
    annotation: Any = None
    for part in path:
        if isinstance(part, int):
            continue
        if found is None or part not in found.model_fields:
            return None
        annotation = found.model_fields[part].annotation
        blocks = blocks_in(annotation)
        found = blocks[0] if blocks else None
    return found if found is not None and issubclass(found, Block) else None


def kinds_at(path: KeyPath) -> list[Any]:
    """The types that the value at a path of the flat config can have; empty for an unknown key."""
    known = field_at(owner(str(path[0])), path) if path[0] in owners() else None
    return [kind for kind in members(known[0]) if kind is not type(None)] if known else []


@dataclass(frozen=True, slots=True)
class Nested:
    """A key inside a block: `datasets[].path` is key `path` of block DatasetEntry within `datasets[]`."""

    parent: str
    block: type[Block]
    key: str

    @property
    def dotted(self) -> str:
        return f"{self.parent}.{self.key}"


def _is_list(annotation: object) -> bool:
    return any(get_origin(kind) is list for kind in members(annotation))


@functools.cache
def nested() -> tuple[Nested, ...]:
    """Every key inside a block, with the block's place written `datasets[]`."""
    found: list[Nested] = []

    def walk(parent: str, block: type[Block]) -> None:
        for key, field in block.model_fields.items():
            found.append(Nested(parent, block, key))
            for inner in blocks_in(field.annotation):
                walk(f"{parent}.{key}" + ("[]" if _is_list(field.annotation) else ""), inner)

    for section in SECTIONS.values():
        for key, field in section.model_fields.items():
            for block in blocks_in(field.annotation):
                walk(key + ("[]" if _is_list(field.annotation) else ""), block)
    return tuple(found)


def distance(a: str, b: str, limit: int) -> int:
    """Edits (insert, delete, replace, swap of neighbours) from one word to the other; limit + 1 where it is more."""
    if abs(len(a) - len(b)) > limit or len(set(a) ^ set(b)) > 2 * limit:
        return limit + 1
    two: list[int] = []
    one = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            best = min(one[j] + 1, row[-1] + 1, one[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, two[j - 2] + 1)
            row.append(best)
        if min(row) > limit:
            return limit + 1
        two, one = one, row
    return one[-1]


def nearest(word: str, known: Iterable[str], taken: Collection[str] = ()) -> list[str]:
    """The known words that `word` was probably meant to be, at most three, best first. `taken` are less likely."""
    lowered = word.lower().replace("-", "_").replace(" ", "_")
    known = list(known)
    limit = 1 if len(word) <= 4 else 2 if len(word) <= 11 else 3
    scored = [(distance(lowered, each, limit), each) for each in known]
    best = min((d for d, _ in scored), default=limit + 1)
    if best <= limit:
        near = [each for d, each in scored if d == best]
        fresh = [each for each in near if each not in taken] or near
        return sorted(fresh, key=lambda each: (each[:1] != lowered[:1], abs(len(each) - len(lowered)), each))[
            :3
        ]
    # Long words that end alike are no misspellings of each other: `ple_cpu_offload` is not `relora_cpu_offload`.
    return difflib.get_close_matches(
        lowered, [each for each in known if each[:1] == lowered[:1]], n=1, cutoff=0.7
    )


def did_you_mean(words: Collection[str]) -> str:
    """The question, or nothing."""
    return f"Did you mean {' or '.join(f'`{w}`' for w in words)}?" if words else ""
