"""Triton's interpreter for the tests of kernels in models."""

from __future__ import annotations

import os

import pytest

# Triton decides when it is first imported, for the whole process.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def kernels_run() -> None:
    """Triton programs run on the CPU, or the test fails."""
    import triton

    assert triton.knobs.runtime.interpret
