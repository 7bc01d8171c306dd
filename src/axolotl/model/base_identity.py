"""Which base model an adapter was trained on, told by its contents: names and relative paths mean little elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from axolotl.errors import ModelError
from axolotl.model.files import local_folder, read_json, read_weight_files

RECORD = "trained_on.json"
# Values of a config.json that say nothing about the weights.
_BESIDE_THE_WEIGHTS = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
_TENSORS, _BYTES = 24, 4096


@dataclass(frozen=True)
class BaseIdentity:
    """A base model on this machine: the name that the run had for it, and digests that go with it anywhere."""

    name: str
    model_type: str
    architecture: str
    """SHA-256 of its `config.json`, without values that do not shape the weights."""
    weights: str | None
    """SHA-256 of names, shapes and first bytes of tensors drawn evenly from all; the same however they are divided into
    files. None where there are no safetensors files."""


def identify(name: str) -> BaseIdentity | None:
    """The identity of a base model in a folder; None for a name of the Hub, or a folder without a readable config."""
    folder = local_folder(name)
    if folder is None:
        return None
    try:
        config = read_json(folder / "config.json")
    except ModelError:
        return None
    shaping = {
        key: value
        for key, value in config.items()
        if key not in _BESIDE_THE_WEIGHTS and not key.endswith("_token_id")
    }
    text = json.dumps(shaping, sort_keys=True)
    return BaseIdentity(
        name, str(config.get("model_type")), hashlib.sha256(text.encode()).hexdigest(), _of_weights(folder)
    )


def record_base(output_dir: Path, base_model: str, adapter_config: Any) -> None:
    """Writes into output_dir what the base model is that an adapter is trained on, under PEFT's name for it."""
    found = identify(base_model)
    if found is None:
        return
    found = replace(found, name=adapter_config.base_model_name_or_path or base_model)
    output_dir.mkdir(parents=True, exist_ok=True)
    aside = output_dir / f".{RECORD}.new"
    aside.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    os.replace(aside, output_dir / RECORD)


def _of_weights(folder: Path) -> str | None:
    try:
        files = read_weight_files(folder)
    except ModelError:
        return None
    found = sorted((name, file) for file, entries in files.shards.items() for name in entries)
    digest = hashlib.sha256()
    for name, file in found[:: max(1, len(found) // _TENSORS)]:
        entry = files.shards[file][name]
        digest.update(f"{name} {entry.dtype} {entry.shape} ".encode())
        with (folder / file).open("rb") as handle:
            handle.seek(entry.start)
            digest.update(handle.read(min(_BYTES, entry.nbytes)))
    return digest.hexdigest()


def recorded_identity(adapter_dir: Path, name: Any) -> BaseIdentity | None:
    """What the run wrote about the base of an adapter whose configuration calls it `name`.

    A checkpoint's is that of its run. None where there is none, or where it speaks of another run.
    """
    for folder in (adapter_dir, adapter_dir.resolve().parent):
        if not (folder / RECORD).is_file():
            continue
        try:
            found = BaseIdentity(**read_json(folder / RECORD))
        except (ModelError, TypeError):
            return None
        return found if found.name == name else None
    return None
