"""Which layers get an adapter: the names, patterns and shorthands of the config against the layers of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from axolotl.errors import ModelError, Problem

if TYPE_CHECKING:
    from axolotl.config.adapter import AdapterSection


def target_modules(model: PreTrainedModel, adapter: AdapterSection) -> str | list[str] | None:
    """The layers that get an adapter: the names written, `lora_target_linear`'s, or one regular expression.

    Raises ModelError for names that match no layer, with the names that exist.
    """
    wanted = adapter.lora_target_modules
    linear = adapter.lora_target_linear or wanted == "all-linear" or wanted == ["all-linear"]
    if wanted in ("all-linear", ["all-linear"]):
        wanted = None
    if wanted is None and not linear:
        if adapter.lora_target_parameters or adapter.adapter not in ("lora", "qlora"):
            return None
        raise ModelError(
            Problem(
                f"`adapter: {adapter.adapter}` has no layers to work on.",
                f"Set `lora_target_linear: true`, or name layers in `lora_target_modules`: {_names(linear_names(model))}.",
                keys=("lora_target_modules", "lora_target_linear"),
            )
        )
    names = [n for n, _ in model.named_modules() if n]
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise ModelError(
                Problem(
                    f"`lora_target_modules: {wanted}` is not a regular expression: {error}.",
                    "Correct it.",
                    keys=("lora_target_modules",),
                )
            ) from None
        if any(pattern.fullmatch(n) for n in names):
            return wanted
        wanted = [wanted]
    # PEFT itself takes a list of which only one entry matches; a misspelt layer would go untrained in silence.
    lost = [w for w in wanted or [] if not any(_ends(w, n) for n in names)]
    if lost:
        raise ModelError(
            Problem(
                f"`lora_target_modules: {w}` matches no layer of this model.",
                f"Linear layers there: {_names(linear_names(model))}.",
                keys=("lora_target_modules",),
            )
            for w in lost
        )
    found = set(wanted or [])
    if linear:
        saved = set(adapter.lora_modules_to_save or ())
        found |= set(linear_names(model)) - saved
    return sorted(found)


def linear_names(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of all linear layers but the output head, sorted; a list's members by their full name."""
    head = model.get_output_embeddings()
    found = set()
    for name, module in model.named_modules():
        kind = isinstance(module, (nn.Linear, Conv1D)) or "Linear" in type(module).__name__
        if not kind or module is head or list(module.children()):
            continue
        last = name.rsplit(".", 1)[-1]
        found.add(name if last.isdigit() else last)
    head_name = next((n.rsplit(".", 1)[-1] for n, m in model.named_modules() if m is head), None)
    return sorted(found - {head_name})


def _names(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")


def check_names(model: PreTrainedModel, adapter: AdapterSection) -> None:
    """Raises ModelError for every name beside the targets that matches no layer or weight; PEFT passes over them."""
    layers = [n for n, _ in model.named_modules() if n]
    weights = [n for n, _ in model.named_parameters()]
    patterns = {
        "lora_rank_pattern": adapter.lora_rank_pattern,
        "lora_alpha_pattern": adapter.lora_alpha_pattern,
    }
    asked = [
        ("lora_modules_to_save", adapter.lora_modules_to_save, layers, _ends),
        ("lora_target_parameters", adapter.lora_target_parameters, weights, _ends),
        (
            "lora_exclude_modules",
            adapter.lora_exclude_modules,
            layers,
            _whole if isinstance(adapter.lora_exclude_modules, str) else _ends,
        ),
        *((key, list(value or ()), layers, _end_by_pattern) for key, value in patterns.items()),
    ]
    problems = [
        _lost(key, wanted, names)
        for key, value, names, fits in asked
        for wanted in ([value] if isinstance(value, str) else value or ())
        if not any(fits(wanted, name) for name in names)
    ]
    if problems:
        raise ModelError(problems)


def _ends(wanted: str, name: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _end_by_pattern(wanted: str, name: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({wanted})$", name) is not None
    except re.error:
        return False


def _whole(wanted: str, name: str) -> bool:
    try:
        return re.fullmatch(wanted, name) is not None
    except re.error:
        return False


def _lost(key: str, wanted: str, names: list[str]) -> Problem:
    of_weights = key == "lora_target_parameters"
    parts = 2 if of_weights else 1
    last = sorted({".".join(n.split(".")[-parts:]) for n in names if not n.rsplit(".", 1)[-1].isdigit()})
    what = "weight" if of_weights else "layer"
    return Problem(
        f"`{key}: {wanted}` matches no {what} of this model.",
        f"{what.title()}s there: {_names(last)}.",
        keys=(key,),
    )
