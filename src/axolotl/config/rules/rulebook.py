"""What a rule is, and the list of all rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from axolotl.config.config import Config
from axolotl.errors import Kind, Problem

TRAINING = ("train", "preprocess", "evaluate", "check", "plan", "doctor")


@dataclass(frozen=True)
class Rule:
    """One rule: its check, the keys it looks at, and the commands it holds for."""

    name: str
    keys: tuple[str, ...]
    check: Callable[[Config], Iterator[Problem]]
    verbs: tuple[str, ...]

    @property
    def doc(self) -> str:
        return (self.check.__doc__ or "").strip()


RULES: list[Rule] = []


def rule(*keys: str, verbs: tuple[str, ...] = ()) -> Callable[[Callable[[Config], Iterator[Problem]]], Rule]:
    """Decorator: registers a rule about these keys; with `verbs`, for these commands alone."""

    def enter(check: Callable[[Config], Iterator[Problem]]) -> Rule:
        entered = Rule(check.__name__, keys, check, verbs)
        RULES.append(entered)
        return entered

    return enter


def broken_rules(cfg: Config, verb: str = "train") -> list[Problem]:
    """Every problem that the rules find, with the places of its keys."""
    return [
        cfg.problem(p.message, p.remedy, *p.keys, kind=p.kind, code=p.code)
        for each in RULES
        if not each.verbs or verb in each.verbs
        for p in each.check(cfg)
    ]


def conflict(message: str, remedy: str, *keys: str, kind: Kind = "conflict", code: str = "") -> Problem:
    """A problem about these keys; places are filled in by `broken_rules`."""
    return Problem(message, remedy, kind, keys, code=code)


def warning(message: str, remedy: str, *keys: str) -> Problem:
    """Something the user may not have meant; never fatal."""
    return Problem(message, remedy, "warning", keys)
