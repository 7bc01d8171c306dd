"""Trains only the named parameters (`unfrozen_parameters`), whole ones or a range of their rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from axolotl.config.model import TRAINED_ROWS
from axolotl.console import note
from axolotl.distributed.deepspeed import shape_of
from axolotl.errors import ModelError, Problem

_RANGE = re.compile(r"\[(\d*)(:?)(\d*)\]$")


@dataclass(frozen=True, slots=True)
class Unfrozen:
    """One entry of `unfrozen_parameters`: a pattern for names, and rows start..end-1 (None: open, or all)."""

    text: str
    pattern: re.Pattern[str]
    start: int | None
    end: int | None

    @property
    def whole(self) -> bool:
        return self.start is None and self.end is None


def parse_unfrozen(text: str) -> Unfrozen:
    """Reads `lm_head.weight[32000:]` and the like; the pattern is searched from the beginning of a name.

    A bracket is a row range only if digits and one colon are all it holds and it ends the entry, so that
    `layers.2[0-9]+.mlp` stays a pattern. Raises ModelError for a broken pattern and an empty range.
    """
    match = _RANGE.search(text)
    start = end = None
    body = text
    if match and match.group(2):
        body = text[: match.start()]
        start = int(match.group(1)) if match.group(1) else 0
        end = int(match.group(3)) if match.group(3) else None
        if end is not None and end <= start:
            raise ModelError(
                _problem(f"`unfrozen_parameters: {text}` is an empty range.", "Write [first:last + 1].")
            )
    try:
        return Unfrozen(text, re.compile(body), start, end)
    except re.error as error:
        raise ModelError(
            _problem(f"`unfrozen_parameters: {text}` is not a regular expression: {error}.", "Correct it.")
        ) from None


def _problem(message: str, remedy: str) -> Problem:
    return Problem(message, remedy, keys=("unfrozen_parameters",))


def freeze_except(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freezes every parameter but those that a pattern matches; returns the names left trainable.

    Of a parameter with row ranges only those rows receive a gradient (the others' is set to zero, so use no weight
    decay on them). Raises ModelError for patterns that match nothing, all at once, with names that exist.
    """
    entries = [parse_unfrozen(p) for p in patterns]
    rows: dict[str, list[Unfrozen]] = {}
    matched: set[str] = set()
    for name, parameter in model.named_parameters():
        hits = [e for e in entries if e.pattern.match(name)]
        matched.update(e.text for e in hits)
        parameter.requires_grad_(bool(hits))
        if hits and not any(e.whole for e in hits):
            rows[name] = hits
    lost = [e.text for e in entries if e.text not in matched]
    if lost:
        names = ", ".join(f"`{n}`" for n in _examples(model))
        raise ModelError(
            _problem(
                f"`unfrozen_parameters: {text}` matches no parameter of the model.", f"Names there: {names}."
            )
            for text in lost
        )
    parameters = dict(model.named_parameters())
    for name, hits in rows.items():
        _keep_rows(name, parameters[name], hits)
    trainable = [n for n, p in parameters.items() if p.requires_grad]
    count = sum(shape_of(parameters[n]).numel() for n in trainable)
    note(
        f"{len(trainable)} of {len(parameters)} parameters are trained ({count:,} numbers); the others are frozen."
    )
    return trainable


def _keep_rows(name: str, parameter: nn.Parameter, hits: Sequence[Unfrozen]) -> None:
    rows = shape_of(parameter)[0]
    keep = torch.zeros(rows, dtype=torch.bool)
    for entry in hits:
        if entry.start is not None and entry.start >= rows:
            raise ModelError(
                _problem(
                    f"`unfrozen_parameters: {entry.text}` begins behind the last row of `{name}` "
                    f"({rows:,} rows).",
                    "Correct the range.",
                )
            )
        keep[entry.start : entry.end] = True

    def mask(grad: torch.Tensor) -> torch.Tensor:
        shape = (-1,) + (1,) * (grad.dim() - 1)
        return grad * keep.to(grad.device).view(shape).to(grad.dtype)

    parameter.register_hook(mask)
    setattr(parameter, TRAINED_ROWS, keep)


def _examples(model: nn.Module) -> list[str]:
    """Names of parameters, layer numbers folded, at most a dozen."""
    seen: dict[str, str] = {}
    for name, _ in model.named_parameters():
        seen.setdefault(re.sub(r"\.\d+\.", ".*.", name), name)
    return list(seen.values())[:12]
