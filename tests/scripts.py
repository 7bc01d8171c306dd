"""The benchmarks' modules, for tests that use a part of them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    """A module of benchmarks/ or benchmarks/gpu/. Their folders do not stay on the path: a script there is called as a folder here."""
    before = sys.path[:]
    sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "gpu")]
    try:
        return importlib.import_module(name)
    finally:
        sys.path[:] = before
