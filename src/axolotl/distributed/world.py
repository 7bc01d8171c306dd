"""The world a process lives in: the hardware of this machine, and its place among the processes of the run."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

import torch

from axolotl.config.resolve import Hardware

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class World:
    """This process among those of the run, as the launcher told it through the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    machine: int = 0
    """Number of this machine among those of the run, where the launcher says it."""
    machines: int = 1

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files and speaks."""
        return self.rank == 0


def world() -> World:
    """This process's place; a single process where no launcher set one."""
    rank = _number("RANK", 0)
    return World(
        rank,
        _number("WORLD_SIZE", 1),
        _number("LOCAL_RANK", rank),
        _number("GROUP_RANK", 0),
        _number("GROUP_WORLD_SIZE", 1),
    )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default


def detect_hardware() -> Hardware:
    """What this process may use: all visible GPUs, else Apple's, else the CPU.

    bfloat16 counts as present on GPUs that compute in it. On a CPU it does not: there it is emulated on most machines
    and slower than float32, so `bf16: auto` stays off (and `bf16: true` is still obeyed).
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        properties = [torch.cuda.get_device_properties(i) for i in range(count)]
        return Hardware(
            device="cuda",
            gpu_names=tuple(p.name for p in properties),
            bf16=torch.cuda.is_bf16_supported(including_emulation=False),
            tf32=torch.version.hip is None and all(p.major >= 8 for p in properties),
            cpus=cpus,
            gpu_memory_bytes=tuple(p.total_memory for p in properties),
        )
    if torch.backends.mps.is_available():
        return Hardware(device="mps", gpu_names=(), bf16=False, tf32=False, cpus=cpus, gpu_memory_bytes=())
    return Hardware(device="cpu", gpu_names=(), bf16=False, tf32=False, cpus=cpus, gpu_memory_bytes=())


def peak_memory_bytes() -> int:
    """Most memory this process has held: on the GPU where it uses one, else in RAM."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> bool:
    """Lets this process keep memory that it frees, for training on the CPU; False where the platform cannot.

    By default glibc hands large blocks back to the system and asks for them again at every step; clearing them anew
    each time takes a tenth of a small model's step. The peak stays as it was.
    """
    if not sys.platform.startswith("linux"):
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_threshold, 32 << 20)) and bool(mallopt(trim_threshold, 2**31 - 1))


def only_repeatable_kernels() -> None:
    """Makes this process compute the same bits each time, where its kernels can. To be called before the GPU is used.

    A kernel that cannot raises RuntimeError when it is asked for.
    """
    # cuBLAS and FlashAttention read these when they begin.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
