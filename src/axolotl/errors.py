"""Everything that can go wrong, as one exception tree, and the value that describes one mistake.

AxolotlError                  any error that this package raises on purpose
└── UserError                 the user can mend it: shown without a traceback, exit code 2
    ├── ConfigError           the YAML file or a command-line override
    ├── DataError             a dataset, a row, a chat template
    ├── ModelError            base model, tokenizer, adapter, merged weights
    ├── CheckpointError       a checkpoint that cannot be written, read or resumed
    └── EnvironmentProblem    this machine: missing extra, GPU, disk space, permissions
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Kind = Literal[
    "syntax",  # the file is not YAML
    "unknown_key",
    "duplicate_key",
    "invalid_value",
    "missing",  # a key that has to be there
    "conflict",  # two keys that contradict each other
    "removed",  # an old key that is gone
    "unavailable",  # known to us, not built yet
    "warning",  # shown, never fatal
    "path",  # a file or folder
    "data",
    "model",
    "checkpoint",
    "environment",
]


CODES: Mapping[str, str] = MappingProxyType(
    {
        "AX1001": "the file is not YAML",
        "AX1002": "unknown key",
        "AX1003": "key written twice",
        "AX1004": "value that the key does not take",
        "AX1005": "key or argument missing",
        "AX1006": "keys that contradict each other",
        "AX1007": "key that is gone",
        "AX1008": "known, but not available yet",
        "AX1009": "file or folder",
        "AX1101": "data that cannot be used",
        "AX1102": "dataset and `type` do not match",
        "AX1103": "hardly anything is trained",
        "AX1201": "model that cannot be used",
        "AX1202": "weights and adapter of different sizes",
        "AX1203": "generation does not stop where a turn ends",
        "AX1204": "the stop token is never trained",
        "AX1205": "first loss far from what it should be",
        "AX1206": "the loss does not fall",
        "AX1207": "the loss jumps",
        "AX1208": "the loss is no number",
        "AX1301": "checkpoint",
        "AX1401": "this machine",
        "AX1402": "does not fit into memory",
        "AX1403": "the GPU's memory ran out",
        "AX1404": "optional package missing",
        "AX1405": "killed for want of memory (exit code -9)",
        "AX1406": "attention that this machine does not have",
        "AX1407": "one device, but a config for several",
        "AX1408": "a run that hangs (NCCL time-outs)",
        "AX1409": "versions that do not work together",
        "AX1410": "another machine of the run is lost",
    }
)
"""Every code that a message can carry, and its title. Codes are stable: docs/troubleshooting.md has an entry for each."""

_CODE_OF_KIND: Mapping[str, str] = MappingProxyType(
    {
        "syntax": "AX1001",
        "unknown_key": "AX1002",
        "duplicate_key": "AX1003",
        "invalid_value": "AX1004",
        "missing": "AX1005",
        "conflict": "AX1006",
        "removed": "AX1007",
        "unavailable": "AX1008",
        "path": "AX1009",
        "data": "AX1101",
        "model": "AX1201",
        "checkpoint": "AX1301",
        "environment": "AX1401",
    }
)


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a mistake stands: a file, with its line and column (both counted from 1) where they are known."""

    file: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        parts = [self.file] + [str(n) for n in (self.line, self.column) if n is not None]
        return ":".join(parts)


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: what is wrong (the user's word in backticks), where, and what to do about it."""

    message: str
    remedy: str = ""
    kind: Kind = "invalid_value"
    keys: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()
    excerpt: str = field(default="", compare=False)
    """The offending line with a caret below it, where there is one."""
    code: str = ""
    """One of `CODES` where a kind is too wide a word for it."""

    @property
    def fatal(self) -> bool:
        return self.kind != "warning"

    @property
    def shown_code(self) -> str:
        """The code by which docs/troubleshooting.md explains it; empty for most warnings."""
        return self.code or _CODE_OF_KIND.get(self.kind, "")

    def as_dict(self) -> dict[str, object]:
        """The form that `axolotl check --json` prints."""
        place = self.places[0] if self.places else Place("")
        return {
            "kind": self.kind,
            "code": self.shown_code or None,
            "key": self.keys[0] if self.keys else None,
            "keys": list(self.keys),
            "file": place.file or None,
            "line": place.line,
            "column": place.column,
            "places": [str(p) for p in self.places],
            "message": self.message,
            "remedy": self.remedy,
        }

    def __str__(self) -> str:
        where = f"{', '.join(map(str, self.places))}: " if self.places else ""
        remedy = f"\n  {self.remedy}" if self.remedy else ""
        return f"{where}{self.message}{remedy}"


class AxolotlError(Exception):
    """The root of the tree."""

    exit_code = 1


class UserError(AxolotlError):
    """One or more mistakes that the user can mend, all told at once."""

    exit_code = 2
    default_kind: Kind = "invalid_value"

    def __init__(
        self, problems: Problem | str | Iterable[Problem], remedy: str = "", *places: Place, code: str = ""
    ) -> None:
        if isinstance(problems, str):
            problems = (Problem(problems, remedy, self.default_kind, (), places, code=code),)
        elif isinstance(problems, Problem):
            problems = (problems,)
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class ConfigError(UserError):
    """The config file, or an override on the command line."""

    config: Any = None
    """The config of the keys that are right, where it could be made; for looking at files in spite of it all."""
    doubted: frozenset[str] = frozenset()
    """Keys whose values are not known because of the mistakes."""


class DataError(UserError):
    """A dataset, a row of it, or the template that renders it."""

    default_kind = "data"


class ModelError(UserError):
    """A base model, tokenizer, adapter or merged model."""

    default_kind = "model"


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or resumed."""

    default_kind = "checkpoint"


class EnvironmentProblem(UserError):
    """This machine lacks something: an optional package, a GPU, disk space, a permission."""

    default_kind = "environment"
