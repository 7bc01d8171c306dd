"""merge-sharded-fsdp-weights: what every process of a sharded run saved of its part, as one model or adapter.

Tensors are read one at a time, so that memory follows the largest tensor, not the model.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from axolotl.console import note, success
from axolotl.errors import CheckpointError, ModelError, Problem
from axolotl.model.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS, WEIGHTS_INDEX, local_folder
from axolotl.model.load import load_model_config
from axolotl.weights.beside import save_beside
from axolotl.weights.card import CARD, consolidated_card
from axolotl.weights.folder import gigabytes, need_space, refuse_destination, written_whole
from axolotl.weights.tensors import NAMES, ShardWriter, Spec, make_index

if TYPE_CHECKING:
    from axolotl.config.model import ModelSection

SHARDED = "pytorch_model_fsdp_0"
METADATA = ".metadata"
MAX_SHARD_BYTES = 5 * 10**9
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
# What wrappers of the training process put into the names.
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_ADAPTER = re.compile(r"\.(lora_|ia3_|hada_|lokr_|oft_|vera_|modules_to_save\.|token_adapter\.)")
_PEFT = "base_model.model."


@dataclass(frozen=True)
class Consolidated:
    """What was written."""

    destination: Path
    kind: str
    """"model" or "adapter"."""
    tensors: int
    bytes: int


@dataclass(frozen=True)
class _Stored:
    """A tensor of the sharded checkpoint: its name there, shape and number type."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def find_sharded(output_dir: str | Path) -> Path:
    """The newest sharded checkpoint of a run: in its folder, or in its last checkpoint. Raises CheckpointError."""
    output = Path(output_dir).expanduser()
    checkpoints = sorted(
        (p for p in output.glob("checkpoint-*") if _CHECKPOINT.search(p.name)),
        key=lambda p: int(_CHECKPOINT.search(p.name).group(1)),  # type: ignore[union-attr]
        reverse=True,
    )
    for folder in (output / SHARDED, output, *(c / SHARDED for c in checkpoints)):
        if (folder / METADATA).is_file():
            return folder
    for folder in (output / SHARDED, *(c / SHARDED for c in checkpoints)):
        if folder.is_dir():
            raise CheckpointError(
                f"`{folder}` has no `{METADATA}`: the checkpoint was not saved to its end.",
                "Use an earlier checkpoint: --sharded-dir DIR.",
            )
    raise CheckpointError(
        f"`{output}` holds no sharded checkpoint: neither it nor its checkpoints have a folder `{SHARDED}`.",
        "Name the folder with --sharded-dir DIR. Weights that were saved whole need no merging.",
    )


def consolidate(
    model: ModelSection,
    sharded: Path,
    destination: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype | None = None,
    stop_tokens: Sequence[str] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Consolidated:
    """Writes the model, or the adapter, whose parts lie in `sharded`, a folder of torch.distributed.checkpoint.

    `dtype` changes the number type of floating-point tensors; None keeps it. Raises CheckpointError for a folder that
    is damaged, ModelError where its tensors are not those of the base model's architecture, EnvironmentProblem for a
    disk that is too small.
    """
    stored = _read_metadata(sharded)
    refuse_destination(destination, sharded)
    whole = sum(math.prod(s.shape) * (dtype or s.dtype).itemsize for s in stored.values())
    adapter = {n: s for n, s in stored.items() if _ADAPTER.search(n)}
    if adapter:
        return _write_adapter(sharded, adapter, destination, dtype, model.base_model)
    need_space(destination, int(whole * 1.02) + 2**25, "The whole model")
    config = load_model_config(model)
    rows = next((s.shape[0] for n, s in stored.items() if n.endswith("embed_tokens.weight")), None)
    rows = rows or int(config.get_text_config().vocab_size)
    shapes, tied_name = _expected(config, rows)
    tied = tied_name is not None
    if tied_name and tied_name in stored:
        tied = _is_same(sharded, stored, tied_name, shapes)
        if tied:
            del stored[tied_name]
    _refuse_other_model(stored, shapes, tied_name if tied else None, sharded)
    note(f"`{sharded}`: {len(stored)} tensors, {gigabytes(whole)}, are written to `{destination}`.")
    with written_whole(destination) as part:
        total = _write_files(sharded, stored, part, dtype, max_shard_bytes)
        source = local_folder(model.base_model)
        save_beside(
            part,
            config,
            tokenizer,
            source if source is not None else sharded,
            rows=rows,
            tied=tied,
            dtype=dtype
            or max((s.dtype for s in stored.values()), key=[s.dtype for s in stored.values()].count),
            stop_tokens=stop_tokens,
        )
        (part / CARD).write_text(consolidated_card(model.base_model, "model", len(stored)), encoding="utf-8")
    success(f"Wrote {len(stored)} tensors ({gigabytes(total)}): {destination}")
    return Consolidated(destination, "model", len(stored), total)


def _read_metadata(sharded: Path) -> dict[str, _Stored]:
    """The tensors of a sharded checkpoint by the names that the model has for them."""
    if not (sharded / METADATA).is_file():
        raise CheckpointError(
            f"`{sharded}` has no `{METADATA}`: it is no sharded checkpoint, or was not saved to its end.",
            f"Name a folder like `checkpoint-100/{SHARDED}`.",
        )
    try:
        read = dcp.FileSystemReader(sharded).read_metadata()
    except Exception as error:
        raise CheckpointError(
            f"`{sharded / METADATA}` cannot be read: {str(error).splitlines()[0] or type(error).__name__}.",
            "The checkpoint is damaged: use an earlier one.",
        ) from None
    files = {info.relative_path for info in (read.storage_data or {}).values()}
    missing = sorted(f for f in files if not (sharded / f).is_file())
    if missing:
        raise CheckpointError(
            Problem(
                f"`{sharded / name}` is missing, though `{METADATA}` names it.",
                "Every process wrote a file of its own: copy them all into this folder.",
                "checkpoint",
            )
            for name in missing
        )
    short = [
        info.relative_path
        for info in (read.storage_data or {}).values()
        if info.offset + info.length > (sharded / info.relative_path).stat().st_size
    ]
    if short:
        raise CheckpointError(
            f"`{sharded / short[0]}` is shorter than `{METADATA}` says.",
            "It was not copied to its end: copy it again.",
        )
    tensors = {k: v for k, v in read.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    prefix = "model." if tensors and all(k.startswith("model.") for k in tensors) else ""
    bare = {k.removeprefix(prefix) for k in tensors}
    if prefix and not any(n.startswith(("model.", _PEFT, "lm_head")) for n in bare):
        prefix = ""  # the architecture's own first word, not that of a wrapping dictionary
    return {
        _WRAPPERS.sub("", key.removeprefix(prefix)): _Stored(key, tuple(v.size), v.properties.dtype)
        for key, v in tensors.items()
    }


def _read(sharded: Path, stored: _Stored) -> torch.Tensor:
    """One tensor, put together from the parts of all processes."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load({stored.key: tensor}, storage_reader=dcp.FileSystemReader(sharded), no_dist=True)
    except (Exception, CheckpointException) as error:
        cause = error.failures.get(0, (error,))[0] if isinstance(error, CheckpointException) else error
        reason = str(cause).strip().splitlines()
        raise CheckpointError(
            f"`{sharded}`: tensor `{stored.key}` cannot be read: {reason[0] if reason else type(cause).__name__}",
            "The checkpoint is damaged: use an earlier one.",
        ) from None
    return tensor


def _expected(config: Any, rows: int) -> tuple[dict[str, tuple[int, ...]], str | None]:
    """Shapes of the architecture's tensors, and the output head's name where it is tied to the input embedding."""
    text = config.get_text_config()
    before, text.vocab_size = text.vocab_size, rows
    try:
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config)
    finally:
        text.vocab_size = before
    shapes = {n: tuple(t.shape) for n, t in shell.state_dict().items()}
    head = shell.get_output_embeddings()
    names = {id(m): f"{n}.weight" for n, m in shell.named_modules()}
    tied = head is not None and head.weight is shell.get_input_embeddings().weight
    return shapes, names[id(head)] if tied else None


def _is_same(
    sharded: Path, stored: Mapping[str, _Stored], head: str, shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    first = next((n for n in stored if n != head and n.endswith(("embed_tokens.weight", "wte.weight"))), None)
    if first is None or stored[first].shape != stored[head].shape:
        return False
    return torch.equal(_read(sharded, stored[first]), _read(sharded, stored[head]))


def _refuse_other_model(
    stored: Mapping[str, _Stored], shapes: Mapping[str, tuple[int, ...]], tied: str | None, sharded: Path
) -> None:
    lacking = [n for n in shapes if n not in stored and n != tied]
    foreign = [n for n in stored if n not in shapes]
    other = [n for n, s in stored.items() if n in shapes and s.shape != shapes[n]]
    said = [
        f"{len(names)} {what}, such as `{names[0]}`"
        for names, what in (
            (lacking, "tensors of the model are not in it"),
            (foreign, "of its tensors are not the model's"),
            (other, "have another shape"),
        )
        if names
    ]
    if said:
        raise ModelError(
            Problem(
                f"`{sharded}` is not a checkpoint of `base_model`'s architecture: {'; '.join(said)}.",
                "Use the config that the run was started with.",
                "model",
                ("base_model",),
            )
        )


def _planned(stored: Mapping[str, _Stored], dtype: torch.dtype | None) -> dict[str, Spec]:
    kinds = {
        n: dtype if dtype is not None and s.dtype.is_floating_point else s.dtype for n, s in stored.items()
    }
    return {n: Spec(NAMES[kinds[n]], s.shape) for n, s in stored.items()}


def _write_files(
    sharded: Path, stored: Mapping[str, _Stored], part: Path, dtype: torch.dtype | None, limit: int
) -> int:
    """Writes safetensors files of at most `limit` bytes (a larger tensor has a file of its own); returns all bytes."""
    specs = _planned(stored, dtype)
    groups: list[dict[str, Spec]] = [{}]
    for name, spec in specs.items():
        if groups[-1] and sum(s.nbytes for s in groups[-1].values()) + spec.nbytes > limit:
            groups.append({})
        groups[-1][name] = spec
    names = [WEIGHTS]
    if len(groups) > 1:
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    for file, group in zip(names, groups, strict=True):
        with ShardWriter(part / file, group, {"format": "pt"}) as writer:
            for name in group:
                value = _read(sharded, stored[name])
                writer.write(name, value.to(dtype) if dtype and value.is_floating_point() else value)
    total = sum(s.nbytes for s in specs.values())
    if len(groups) > 1:
        layout = {file: list(group) for file, group in zip(names, groups, strict=True)}
        index = make_index(layout, total, sum(math.prod(s.shape) for s in stored.values()))
        (part / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _write_adapter(
    sharded: Path, stored: Mapping[str, _Stored], destination: Path, dtype: torch.dtype | None, base: str
) -> Consolidated:
    """The adapter of a run that trained one, under the names that PEFT gives its files."""
    known = next((f for f in (sharded, *sharded.parents[:2]) if (f / ADAPTER_CONFIG).is_file()), None)
    if known is None:
        raise CheckpointError(
            f"`{sharded}` holds an adapter, but there is no `{ADAPTER_CONFIG}` beside it.",
            "Copy it from the run's output_dir into the checkpoint's folder.",
        )
    named = {}
    for name, entry in stored.items():
        short = name if name.startswith(_PEFT) else f"{_PEFT}{name}"
        short = short.replace(".modules_to_save.default.", ".").replace(".default.", ".")
        named[short.removesuffix(".default")] = entry
    specs = _planned(named, dtype)
    with written_whole(destination) as part:
        with ShardWriter(part / ADAPTER_WEIGHTS, specs, {"format": "pt"}) as writer:
            for name, entry in named.items():
                value = _read(sharded, entry)
                writer.write(name, value.to(dtype) if dtype and value.is_floating_point() else value)
        shutil.copy2(known / ADAPTER_CONFIG, part / ADAPTER_CONFIG)
        (part / CARD).write_text(consolidated_card(base, "adapter", len(named)), encoding="utf-8")
    total = sum(s.nbytes for s in specs.values())
    success(f"Wrote an adapter of {len(named)} tensors ({gigabytes(total)}): {destination}")
    note(f"Next: axolotl merge-lora config.yml --lora-model-dir {destination}")
    return Consolidated(destination, "adapter", len(named), total)
