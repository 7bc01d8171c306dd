"""What the tests of programs need."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Programs run on the CPU, or the test fails."""
    import triton

    assert triton.knobs.runtime.interpret
