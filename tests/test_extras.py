"""The environment of the optional packages: every one imports beside the exact set of the other tests."""

from __future__ import annotations

import importlib
from importlib.metadata import version

import pytest

pytestmark = pytest.mark.extras


@pytest.mark.parametrize(
    "module",
    [
        "bitsandbytes",
        "came_pytorch",
        "deepspeed",
        "gradio",
        "grokadamw",
        "liger_kernel",
        "mlflow",
        "optimi",
        "ray",
        "schedulefree",
        "torchao",
        "trackio",
        "triton",
        "trl",
        "wandb",
    ],
)
def test_optional_package_imports(module: str) -> None:
    importlib.import_module(module)


def test_the_ground_is_the_same() -> None:
    assert version("torch").startswith("2.13.0")
    assert version("transformers") == "5.23.0"
