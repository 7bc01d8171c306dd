"""How much RAM loading a model takes, from the headers of its files; refused in words where that much is not there.

transformers maps safetensors files into memory: weights that stay as they are in the file take none of their own, until
they are trained, and the kernel drops and rereads them as it likes. What has to be made anew on the CPU (another number
type, fewer bits, experts put together) is kept there whole; what is made anew on its way to a GPU, a few tensors at a
time.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch

from axolotl import console
from axolotl.config.host import Ram, bytes_as_gib, ram
from axolotl.distributed.group import end_from_thread
from axolotl.distributed.ram_watch import FOR_WEIGHTS, OFTEN, within_ram
from axolotl.distributed.world import world
from axolotl.errors import EnvironmentProblem, ModelError, Problem
from axolotl.model.files import WEIGHTS, WEIGHTS_INDEX, TensorEntry, local_folder, read_weight_files
from axolotl.model.quantize import wants_quantized_load

if TYPE_CHECKING:
    from axolotl.config.adapter import AdapterSection
    from axolotl.config.model import ModelSection

LOADERS = 4
"""Tensors that transformers has on their way at a time, at most."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_UNPACKED_FROM = {"F8_E4M3": 1, "F8_E5M2": 1, "U8": 2}
"""Numbers in one element of a packed tensor."""
_EXPERT = re.compile(r"\.experts\.\d+\.")
"""Matrices of single experts, which transformers puts together."""
_FOUR_BITS = 0.53
"""Bytes of a weight in nf4, its scales in 8 bits each 64 weights."""


@dataclass(frozen=True)
class Loading:
    """Bytes of RAM for the weights of one process while they are loaded, beside the program's own."""

    kept: int = 0
    """Made anew, and there to stay."""
    mapped: int = 0
    """Read from the file where they are needed: dropped where memory is short, and then read again."""
    passing: int = 0
    """Made anew on the way to a GPU, most at a time."""
    files: frozenset[str] = frozenset()
    """Number types of the files."""

    @property
    def needed(self) -> int:
        return self.kept + self.passing


def loading_need(
    entries: Iterable[tuple[str, TensorEntry]],
    dtype: torch.dtype,
    *,
    device: str,
    device_map: Any = None,
    bits: int = 0,
    unpack: bool = False,
) -> Loading:
    """What loading these tensors takes. `bits`: 4 or 8 where matrices are packed; `unpack`: the files are packed, and the
    model is not.
    """
    item = dtype.itemsize
    kept = mapped = 0
    made: list[int] = []
    found = set()
    for name, entry in entries:
        found.add(entry.dtype)
        count = math.prod(entry.shape)
        packs = bits and len(entry.shape) == 2 and not _stays_whole(name)
        unpacks = unpack and entry.dtype in _UNPACKED_FROM
        anew = packs or unpacks or _EXPERT.search(name) is not None
        anew = anew or (entry.dtype in _DTYPES and _DTYPES[entry.dtype] != dtype)
        size = count * _UNPACKED_FROM[entry.dtype] * item if unpacks else count * item
        if entry.dtype not in _DTYPES and not unpacks:
            size = entry.nbytes  # whole numbers stay what they are
        on_cpu = _on_cpu(name, device, device_map)
        if anew:
            made.append(size)
        if anew and on_cpu:
            kept += int(count * (_FOUR_BITS if bits == 4 else 1)) if packs else size
        elif on_cpu:
            mapped += entry.nbytes
    at_once = 1 if bits else min(LOADERS, os.cpu_count() or 1)
    passing = sum(sorted(made)[-at_once:]) if made and (bits or not kept) else 0
    return Loading(kept, mapped, passing, frozenset(found))


def _stays_whole(name: str) -> bool:
    return any(part in name for part in ("embed", "lm_head", "norm"))


def _on_cpu(name: str, device: str, device_map: Any) -> bool:
    if isinstance(device_map, dict):
        # The longest prefix decides, as in accelerate.
        fitting = [key for key in device_map if not key or name == key or name.startswith(f"{key}.")]
        place = str(device_map[max(fitting, key=len)]) if fitting else device
        return place == "cpu"
    if device_map in (None, "auto", "balanced", "balanced_low_0", "sequential"):
        return device == "cpu"  # with a GPU, these fill it first, and RAM only as far as it is free
    return str(device_map) == "cpu"


def need_of(
    model: ModelSection,
    adapter: AdapterSection,
    dtype: torch.dtype,
    *,
    device: str,
    unpack: bool = False,
) -> Loading | None:
    """What loading the base model takes here; None where its files are not on this machine yet, are pickles, or are not
    read (`reinit_weights`)."""
    folder = None if model.reinit_weights else weights_folder(model)
    if folder is None:
        return None
    try:
        files = read_weight_files(folder)
    except ModelError:
        return None
    entries = [item for shard in files.shards.values() for item in shard.items()]
    return loading_need(
        entries,
        dtype,
        device=device,
        device_map=model.device_map,
        bits=wants_quantized_load(model, adapter),
        unpack=unpack,
    )


def weights_folder(model: ModelSection) -> Path | None:
    """Where the weights lie on this machine: the folder that is named, or the one in the Hub's cache."""
    folder = local_folder(model.base_model)
    if folder is not None:
        return folder
    for name in (WEIGHTS_INDEX, WEIGHTS):
        try:
            found = huggingface_hub.try_to_load_from_cache(
                model.base_model, name, revision=model.revision_of_model
            )
        except ValueError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def check_ram(
    need: Loading, model: ModelSection, dtype: torch.dtype, processes: int = 1, now: Ram | None = None
) -> Problem | None:
    """What is told where RAM has no room for loading: an error, or a warning where it will only be slow; else None.

    `processes` of this machine load at the same time. `now`: the memory that is free, asked for where it is None.
    """
    now = now or ram()
    if not now.total:
        return None
    needed = need.needed * processes
    free = f"{bytes_as_gib(now.free)} of the {now.limit}'s {bytes_as_gib(now.total)} are free"
    if needed > now.free + now.swap:
        several = f", {processes} processes together" if processes > 1 else ""
        what = (
            f"{bytes_as_gib(need.kept)} of weights as {_word(dtype)}" if need.kept else "weights on their way"
        )
        return Problem(
            f"Loading `base_model: {model.base_model}` needs {bytes_as_gib(needed)} of RAM ({what}{several}), and {free}.",
            _remedy(need, model, dtype),
            "environment",
            ("base_model",),
            code="AX1402",
        )
    if needed + need.mapped > now.free:
        return Problem(
            f"`base_model: {model.base_model}` holds {bytes_as_gib(need.mapped)} of weights, and {free}: they are read "
            "from the disk again and again, which is slow.",
            "Give the container more memory, or take a smaller model.",
            "warning",
            ("base_model",),
            code="AX1405",
        )
    return None


@contextmanager
def room_for_weights(
    model: ModelSection,
    adapter: AdapterSection,
    dtype: torch.dtype,
    *,
    device: str,
    unpack: bool = False,
    whole: bool = True,
) -> Iterator[None]:
    """Loading goes on inside. Raises EnvironmentProblem before it where RAM has no room for it, and ends the process in
    words where memory runs out all the same. `whole`: this process loads the model, and not just its part of it.
    """
    place = world()
    need = need_of(model, adapter, dtype, device=device, unpack=unpack) if whole else None
    if need is not None:
        found = check_ram(need, model, dtype, max(1, place.size // place.machines))
        if found is not None and found.fatal:
            raise EnvironmentProblem(found)
        if found is not None and place.is_main:
            console.show_problem(found)
    with within_ram("while the weights are loaded", every=OFTEN, remedy=FOR_WEIGHTS, end=end_from_thread):
        yield


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _remedy(need: Loading, model: ModelSection, dtype: torch.dtype) -> str:
    ways = []
    if dtype == torch.float32 and need.files & {"BF16", "F16"}:
        half = 0 if need.files <= {"BF16"} else need.kept // 2
        ways.append(
            "`bf16: true` reads them as they are in their files"
            if not half
            else f"`bf16: true` takes {bytes_as_gib(half)}"
        )
    if need.kept and not (model.load_in_4bit or model.load_in_8bit):
        numbers = need.kept // dtype.itemsize
        ways.append(
            f"`adapter: qlora` with `load_in_4bit: true` takes about {bytes_as_gib(int(numbers * _FOUR_BITS))}"
        )
    ways.append("else a smaller model, or more memory for the container")
    text = "; ".join(ways)
    return f"{text[0].upper()}{text[1:]}."
