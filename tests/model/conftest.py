"""Triton's interpreter for the tests of kernels in models."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def kernels_run() -> None:
    """Triton programs run on the CPU, or the test fails."""
    import triton

    assert triton.knobs.runtime.interpret
