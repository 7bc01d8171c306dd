"""The GPUs that a plan can be made for: data sheets, and how much of them was measured to be reached."""

from __future__ import annotations

import difflib
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl.config.resolve import Hardware
from axolotl.errors import ConfigError

TABLE = Path(__file__).with_name("gpus.json")
GIB = 2**30


@dataclass(frozen=True)
class Efficiency:
    """What is reached of a data sheet: shares of the peak, and microseconds."""

    matmul: float
    attention: float
    packed_attention: float
    """Of packed rows, by the variable-length kernels that come with PyTorch."""
    memory: float
    launch_us: float
    """The shortest that an operation takes on the device."""
    host_us: float
    """Time of the program for each operation, which counts where the device is faster."""
    rest: float
    """What whole steps take beyond the sum of their operations, as a factor."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Peaks in FLOP/s and bytes/s, memory in bytes."""

    name: str
    title: str
    memory: int
    bf16: float
    fp16: float
    fp32: float
    bandwidth: float
    capability: tuple[int, int]
    efficiency: Efficiency
    measured: bool
    """Whether the efficiency was measured on this very card."""

    @property
    def has_bf16(self) -> bool:
        return self.bf16 > 0

    def peak(self, bits16: bool) -> float:
        """FLOP/s of matrix products in 16 bits, or in float32."""
        return (self.bf16 or self.fp16) if bits16 else self.fp32


@functools.cache
def _table() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return read


def gpu_names() -> list[str]:
    """The names that `--gpu` takes."""
    return list(_table()["gpus"])


def gpu(name: str) -> Gpu:
    """A GPU by its short name, such as `h200`. Raises ConfigError for one that is not in the table."""
    key = (
        name.lower()
        .strip()
        .replace(" ", "-")
        .removeprefix("nvidia-")
        .removeprefix("rtx-")
        .removeprefix("rtx")
    )
    gpus = _table()["gpus"]
    if key not in gpus:
        near = difflib.get_close_matches(key, list(gpus), n=1)
        hint = f"Did you mean `{near[0]}`? " if near else ""
        several = re.fullmatch(r"(\d+)-?x-?(.+)", key)
        if several and several[2] in gpus:
            hint = f"Write `--gpu {several[2]} --gpus {several[1]}`. "
        raise ConfigError(
            f"`--gpu {name}` is not a GPU that the plan knows.", f"{hint}Known: {', '.join(gpus)}."
        )
    return _made(key, gpus[key])


def gpu_called(device: str) -> Gpu | None:
    """The GPU whose driver calls it so (`NVIDIA H100 80GB HBM3`); None for one that is not in the table."""
    best, most = "", 0
    for key, row in _table()["gpus"].items():
        for word in row["match"]:
            if word.lower() in device.lower() and len(word) > most:
                best, most = key, len(word)
    return _made(best, _table()["gpus"][best]) if best else None


def _made(key: str, row: dict[str, Any]) -> Gpu:
    own = row.get("measured")
    shares = own or _table()["gpus"][_table()["measured_on"].lower()]["measured"]
    efficiency = Efficiency(**{k: float(v) for k, v in shares.items() if k != "source"})
    return Gpu(
        key,
        row["title"],
        int(row["memory"] * GIB),
        row["bf16"] * 1e12,
        row["fp16"] * 1e12,
        row["fp32"] * 1e12,
        row["bandwidth"] * 1e12,
        tuple(row["capability"]),
        efficiency,
        own is not None,
    )


def present_gpu(hardware: Hardware) -> Gpu | None:
    """The first GPU of this machine, with the memory that it really has; None where there is none or it is unknown."""
    if hardware.device != "cuda" or not hardware.gpu_names:
        return None
    found = gpu_called(hardware.gpu_names[0])
    if found is None or not hardware.gpu_memory_bytes:
        return found
    return Gpu(**{**found.__dict__, "memory": min(hardware.gpu_memory_bytes)})


def hardware_of(gpu: Gpu, count: int, cpus: int) -> Hardware:
    """A machine with so many of these GPUs, for resolving a config that will run there."""
    return Hardware(
        device="cuda",
        gpu_names=(gpu.title,) * count,
        bf16=gpu.has_bf16,
        tf32=gpu.capability >= (8, 0),
        cpus=cpus,
        gpu_memory_bytes=(gpu.memory,) * count,
    )
