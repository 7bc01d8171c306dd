"""What a model folder on disk holds, read without torch: is it all there, and does it fit together?"""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.errors import ModelError, Place, Problem

if TYPE_CHECKING:
    from axolotl.config.adapter import AdapterSection
    from axolotl.config.model import ModelSection

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ITEM_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
}
_ITEM_BITS |= {"I16": 16, "U16": 16, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


def local_folder(name: str) -> Path | None:
    """The folder that `name` means on this machine, or None where it can only be a name on the Hub."""
    path = Path(os.path.expanduser(name))
    return path if path.is_dir() else None


def could_be_hub_id(name: str) -> bool:
    """Whether `name` has the form of a repository on the Hub (`owner/name`, or the old one-word form)."""
    return _HUB_ID.fullmatch(name) is not None and not name.endswith(".git")


def missing_folder(key: str, name: str, place: Place | None = None) -> Problem:
    """The mistake of naming a folder that does not exist, said of `key`."""
    parent = Path(os.path.expanduser(name)).parent
    near = ""
    if parent.is_dir():
        names = sorted(p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))
        near = f" Folders there: {', '.join(names[:8])}." if names else ""
    return _problem(
        key, f"`{key}: {name}` is not a folder on this machine.", f"Check the path.{near}", "path", place
    )


def _problem(key: str, message: str, remedy: str, kind: Any, place: Place | None) -> Problem:
    return Problem(message, remedy, kind, (key,), (place,) if place else ())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(
            f"`{path}` cannot be read as JSON: {error}", "Copy or download the file again."
        ) from None
    if not isinstance(value, dict):
        raise ModelError(
            f"`{path}` holds {type(value).__name__}, not a JSON object.", "Copy or download it again."
        )
    return value


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in a safetensors file: `start` and `end` are byte offsets from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensors and metadata of a safetensors file, from its header. Raises ModelError where the file is damaged."""
    remedy = "The file is damaged or was not copied to its end: copy or download it again."
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
            if not 2 <= length <= min(size - 8, 512 * 2**20):
                raise ValueError("its header has an impossible length")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        entries = {
            name: TensorEntry(
                info["dtype"],
                tuple(info["shape"]),
                8 + length + info["data_offsets"][0],
                8 + length + info["data_offsets"][1],
            )
            for name, info in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ModelError(f"`{path}` is not a readable safetensors file: {error}.", remedy) from None
    for name, entry in entries.items():
        count = 1
        for n in entry.shape:
            count *= n
        expected = (count * _ITEM_BITS.get(entry.dtype, 8) + 7) // 8
        if entry.nbytes != expected:
            raise ModelError(f"`{path}`: tensor `{name}` has a size that does not fit its shape.", remedy)
    end = max((e.end for e in entries.values()), default=8 + length)
    if end > size:
        raise ModelError(f"`{path}` holds {size:,} bytes where its header promises {end:,}.", remedy)
    return entries, metadata


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The safetensors files of a model, in order, and where each tensor is. `index` is None for a single file."""

    folder: Path
    shards: dict[str, dict[str, TensorEntry]]
    metadata: dict[str, dict[str, str]]
    index: dict[str, Any] | None

    @property
    def total_bytes(self) -> int:
        return sum(e.nbytes for shard in self.shards.values() for e in shard.values())

    def find(self, tensor: str) -> tuple[Path, TensorEntry] | None:
        """File and place of a tensor, or None."""
        for name, entries in self.shards.items():
            if tensor in entries:
                return self.folder / name, entries[tensor]
        return None


def read_weight_files(folder: Path) -> WeightFiles:
    """Headers of all weight files of a folder. Raises ModelError for missing or damaged ones and a wrong index."""
    index_file, single = folder / WEIGHTS_INDEX, folder / WEIGHTS
    if single.is_file() and not index_file.is_file():
        entries, said = read_header(single)
        return WeightFiles(folder, {WEIGHTS: entries}, {WEIGHTS: said}, None)
    if not index_file.is_file():
        raise ModelError(no_weights(folder))
    index = read_json(index_file)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"`{index_file}` has no `weight_map`.", "Copy or download the file again.")
    shards: dict[str, dict[str, TensorEntry]] = {}
    metadata: dict[str, dict[str, str]] = {}
    problems = []
    for name in dict.fromkeys(weight_map.values()):
        if not (folder / name).is_file():
            problems.append(
                _problem(
                    "base_model",
                    f"`{folder / name}` is missing, though the index names it.",
                    "Copy or download the model again.",
                    "model",
                    None,
                )
            )
            continue
        shards[name], metadata[name] = read_header(folder / name)
    if problems:
        raise ModelError(problems)
    wrong = [t for t, name in weight_map.items() if t not in shards[name]]
    if wrong:
        raise ModelError(
            f"`{index_file}` is wrong: {len(wrong)} tensors are not in the file it names, such as `{wrong[0]}` "
            f"in `{weight_map[wrong[0]]}`.",
            "Copy or download the model again.",
        )
    return WeightFiles(folder, shards, metadata, index)


def no_weights(folder: Path, key: str = "base_model", place: Place | None = None) -> Problem:
    """What is wrong with a folder that has no safetensors weights."""
    if (folder / ADAPTER_CONFIG).is_file():
        message = f"`{folder}` holds an adapter, not a base model."
        remedy = "Give the adapter as `lora_model_dir`, and its base model as `base_model`."
    elif sorted(folder.glob("pytorch_model*.bin")):
        message = (
            f"`{folder}` has its weights only as pickle files (`pytorch_model*.bin`), which can run any code."
        )
        remedy = (
            "Convert them to safetensors, or set `trust_remote_code: true` if you trust where they come from."
        )
    else:
        message = f"`{folder}` has no weights: neither `{WEIGHTS}` nor `{WEIGHTS_INDEX}` is there."
        remedy = "Check the path, or finish the copy or download. `reinit_weights: true` starts from random weights."
    return _problem(key, message, remedy, "model", place)


def check_base_model(model: ModelSection, place: Place | None = None) -> list[Problem]:
    """Everything wrong with `base_model` that can be seen in well under a second; a Hub name is taken at its word."""
    name = model.base_model
    folder = local_folder(name)
    if folder is None:
        # A name on the Hub, or a file of one's own: only the first can still come right.
        return [] if could_be_hub_id(name) else [missing_folder("base_model", name, place)]
    problems: list[Problem] = []
    config_name = model.base_model_config or name
    config_folder = local_folder(config_name)
    if config_folder is None and not could_be_hub_id(config_name):
        problems.append(missing_folder("base_model_config", config_name, place))
    config_file = (config_folder or folder) / "config.json"
    if config_folder is not None and not config_file.is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            problems.append(no_weights(folder, place=place))
        else:
            problems.append(
                _problem(
                    "base_model",
                    f"`{config_folder}` has no `config.json`.",
                    "`base_model` names a folder that holds a whole model.",
                    "model",
                    place,
                )
            )
        return problems
    try:
        if config_folder is not None:
            config = read_json(config_file)
            if not config.get("model_type") and not config.get("auto_map"):
                problems.append(
                    _problem(
                        "base_model",
                        f"`{config_file}` names no `model_type`.",
                        "Copy or download the file again.",
                        "model",
                        place,
                    )
                )
        if not model.reinit_weights and not _pickles_allowed(model, folder):
            read_weight_files(folder)
    except ModelError as error:
        problems += [
            replace(p, keys=p.keys or ("base_model",), places=(place,) if place else p.places)
            for p in error.problems
        ]
    return problems


def _pickles_allowed(model: ModelSection, folder: Path) -> bool:
    return bool(model.trust_remote_code) and any(folder.glob("pytorch_model*.bin"))


def check_adapter_dir(adapter: AdapterSection, place: Place | None = None) -> list[Problem]:
    """Everything wrong with `lora_model_dir` that can be seen without loading it."""
    name = adapter.lora_model_dir
    if not name:
        return []
    folder = local_folder(name)
    if folder is None:
        return [] if could_be_hub_id(name) else [missing_folder("lora_model_dir", name, place)]
    if not (folder / ADAPTER_CONFIG).is_file():
        what = "a whole model" if (folder / "config.json").is_file() else "no adapter"
        remedy = "Name the folder that training wrote: it holds `adapter_config.json` and `adapter_model.safetensors`."
        if what == "a whole model":
            remedy = "A merged or fully trained model is given as `base_model`, without an adapter."
        return [_problem("lora_model_dir", f"`{name}` holds {what}, not an adapter.", remedy, "model", place)]
    try:
        read_json(folder / ADAPTER_CONFIG)
        if (folder / ADAPTER_WEIGHTS).is_file():
            read_header(folder / ADAPTER_WEIGHTS)
        elif not (folder / "adapter_model.bin").is_file():
            return [
                _problem(
                    "lora_model_dir",
                    f"`{name}` has no `{ADAPTER_WEIGHTS}`.",
                    "The adapter was not saved to its end: use an earlier checkpoint.",
                    "model",
                    place,
                )
            ]
    except ModelError as error:
        return [
            replace(p, keys=("lora_model_dir",), places=(place,) if place else p.places)
            for p in error.problems
        ]
    return []
