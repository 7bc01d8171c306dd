"""The whole config: one attribute per section, and where each value came from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from axolotl.config.adapter import AdapterSection
from axolotl.config.data import DataSection
from axolotl.config.distributed import DistributedSection
from axolotl.config.kernels import KernelsSection
from axolotl.config.keys import SECTIONS, owners
from axolotl.config.method import MethodSection
from axolotl.config.model import ModelSection
from axolotl.config.optim import OptimSection
from axolotl.config.output import OutputSection
from axolotl.config.secrets import is_secret, without_secrets
from axolotl.config.section import Section, facts
from axolotl.config.tracking import TrackingSection
from axolotl.config.train import TrainSection
from axolotl.config.yaml_file import Path as KeyPath
from axolotl.config.yaml_file import Spot, excerpt, undotted
from axolotl.errors import Place, Problem


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from: a line of a file, an override, our default, or a resolution with its reason."""

    kind: Literal["file", "override", "default", "resolved"]
    place: Place | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.kind == "resolved":
            return f"resolved: {self.reason}"
        return "default" if self.place is None else str(self.place)


@dataclass(frozen=True)
class Config:
    """Every key of the flat YAML, in typed sections. Nothing can write to it; `with_values` makes another."""

    model: ModelSection = field(default_factory=ModelSection.model_construct)
    adapter: AdapterSection = field(default_factory=AdapterSection.model_construct)
    data: DataSection = field(default_factory=DataSection.model_construct)
    optim: OptimSection = field(default_factory=OptimSection.model_construct)
    train: TrainSection = field(default_factory=TrainSection.model_construct)
    method: MethodSection = field(default_factory=MethodSection.model_construct)
    distributed: DistributedSection = field(default_factory=DistributedSection.model_construct)
    kernels: KernelsSection = field(default_factory=KernelsSection.model_construct)
    tracking: TrackingSection = field(default_factory=TrackingSection.model_construct)
    output: OutputSection = field(default_factory=OutputSection.model_construct)
    sources: tuple[Path, ...] = ()
    """The files that it was read from (a remote file by the name it was given)."""
    overrides: tuple[tuple[str, str], ...] = ()
    """Keys that were given beside the files, with their text."""
    warnings: tuple[Problem, ...] = ()
    """What the user should know; never fatal."""
    spots: Mapping[KeyPath, Spot] = field(default_factory=dict, repr=False)
    lines: Mapping[str, list[str]] = field(default_factory=dict, repr=False)
    resolved: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Keys that were filled in automatically, and why."""

    def words(self, *apart: str, of: Iterable[str] = SECTIONS) -> list[str]:
        """The words of a command line that name this config: its files, then what was given beside them.

        Left out: keys in `apart`, keys of other sections than `of`, secrets.
        """
        found = [str(source) for source in self.sources] or ["config.yml"]
        for key, text in self.overrides:
            top = str(undotted(key)[0])
            owner = owners().get(top)
            if owner is None or owner not in of or top in apart:
                continue
            last = str(undotted(key)[-1])
            if not facts(SECTIONS[owner], top).get("secret") and not is_secret(last):
                found += [f"--{key.replace('_', '-')}", without_secrets(text)]
        return found

    def section(self, key: str) -> Section:
        """The section that owns a key. Raises KeyError for an unknown one."""
        section: Section = getattr(self, owners()[key])
        return section

    def get(self, key: str) -> Any:
        """The value of a top-level key. Raises KeyError for an unknown one."""
        return getattr(self.section(key), key)

    def _spot(self, key: str) -> Spot | None:
        path = undotted(key)
        while path:
            if path in self.spots:
                return self.spots[path]
            path = path[:-1]
        return None

    def place(self, key: str) -> Place:
        """Where a key's value stands (`datasets[0].path` works too); the first source where it is not written."""
        spot = self._spot(key)
        return spot.value if spot else Place(str(self.sources[0]) if self.sources else "config")

    def key_place(self, key: str) -> Place:
        """Where the key itself stands."""
        spot = self._spot(key)
        return spot.key if spot else self.place(key)

    def excerpt(self, place: Place) -> str:
        """The line of a place with a caret below it; empty for an override."""
        return excerpt(self.lines.get(place.file, []), place)

    def is_set(self, key: str) -> bool:
        """Whether the user wrote this top-level key, with a value that is not null."""
        return key in self.section(key).model_fields_set and key not in self.resolved

    def origin(self, key: str) -> Origin:
        """Where the value of a top-level key came from."""
        if key in self.resolved:
            return Origin("resolved", reason=self.resolved[key])
        if not self.is_set(key):
            return Origin("default")
        place = self.place(key)
        return Origin("override" if place.line is None else "file", place)

    def problem(
        self, message: str, remedy: str, *keys: str, kind: Any = "invalid_value", code: str = ""
    ) -> Problem:
        """A Problem with the places of these keys; for checks that need more than the config."""
        places = tuple(self.place(k) for k in keys if self._spot(k))
        if not places and kind == "missing" and self.sources:
            # A key that is nowhere has no line, but a file in which it should stand.
            places = (Place(str(self.sources[0])),)
        return Problem(message, remedy, kind, keys, places, self.excerpt(places[0]) if places else "", code)

    def with_values(self, values: Mapping[str, Any], reasons: Mapping[str, str]) -> Config:
        """A copy with other values, each with the reason for it. The values are not validated again."""
        sections = {}
        for name in SECTIONS:
            mine = {k: v for k, v in values.items() if owners()[k] == name}
            if mine:
                sections[name] = getattr(self, name).model_copy(update=mine)
        return replace(self, **sections, resolved={**self.resolved, **reasons})  # type: ignore[arg-type]

    def effective(self, *, defaults: bool = True) -> dict[str, Any]:
        """Every top-level key with its value as plain data, secrets left out; `defaults=False` leaves those out too."""
        values: dict[str, Any] = {}
        for name, section in SECTIONS.items():
            mine: Section = getattr(self, name)
            written = mine.model_dump(mode="json", exclude_unset=True, warnings=False)
            for key in section.model_fields:
                chosen = key in written or key in self.resolved
                if facts(section, key).get("secret") or not (defaults or chosen):
                    continue
                values[key] = without_secrets(written[key] if key in written else plain(getattr(mine, key)))
        return values

    def resolved_yaml(self) -> str:
        """The config that repeats this run: all that was written or filled in, no default, no secret."""
        return yaml.safe_dump(self.effective(defaults=False), sort_keys=False, allow_unicode=True, width=1000)


def plain(value: Any) -> Any:
    """A value as YAML knows it: blocks become mappings."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def sections_from(values: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """The values of each section, by its name."""
    for name, section in SECTIONS.items():
        yield name, {key: values[key] for key in section.model_fields if key in values}


def as_json(value: Any) -> str:
    """A value on one line."""
    return json.dumps(plain(value), ensure_ascii=False, default=str)
