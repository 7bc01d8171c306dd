"""Triton's interpreter for the tests of programs."""

from __future__ import annotations

import os

import pytest


def pytest_configure() -> None:
    # Triton decides when it is first imported, for the whole process.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Programs run on the CPU, or the test fails."""
    import triton

    assert triton.knobs.runtime.interpret
