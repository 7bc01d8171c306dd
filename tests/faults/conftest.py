"""The bench: one undisturbed run, and a process from which disturbed ones are forked."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from faults.harness import Bench, Warm


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    warm = Warm()
    made = Bench(tmp_path_factory.mktemp("faults"), warm)
    made.reference()
    yield made
    warm.close()


@pytest.fixture
def draw() -> random.Random:
    """Random numbers; the seed is printed, and FAULT_SEED brings one back."""
    seed = int(os.environ.get("FAULT_SEED", random.SystemRandom().randrange(10**6)))
    print(f"FAULT_SEED={seed}")
    return random.Random(seed)
