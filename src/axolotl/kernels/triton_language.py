"""Whether Triton can be used here, and how its programs are found without importing Triton where it is missing.

Every op has a plain-torch twin. The Triton programs stand in files of their own (`*_programs.py`), which import Triton
at their top and are imported the first time that a tensor on a GPU asks for them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch


def interpreted() -> bool:
    """Triton's interpreter is asked for (`TRITON_INTERPRET=1`): programs run on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def installed() -> bool:
    """Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def runs_on(x: torch.Tensor) -> bool:
    """Whether Triton programs can work on this tensor; otherwise the twin does."""
    return installed() and (x.is_cuda or interpreted())


def programs(name: str) -> ModuleType:
    """The file of Triton programs of an op, such as `norms` for `norms_programs.py`."""
    return importlib.import_module(f"axolotl.kernels.{name}_programs")


def power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The number type that matrix products of this tensor are made in: autocast's where it is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
