"""Training methods: values found by name."""

from __future__ import annotations

import importlib

from axolotl.config.method import MethodSection
from axolotl.methods.registry import method_of, methods


def test_supervised_fine_tuning_is_the_method_of_a_config_that_names_none():
    method = method_of(MethodSection())
    assert method.name == "sft"
    assert method.packs
    assert method.own_batches
    assert method is methods.get("sft")


def test_the_classes_that_methods_name_exist():
    for name in methods:
        method = methods.get(name)
        for dotted in (method.trainer, method.arguments):
            module, _, attribute = dotted.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute)
