"""From files and overrides to a Config: read, merge, rename, validate, apply the rules, and tell all problems at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from axolotl.config.complaints import Complaints
from axolotl.config.config import Config, as_json, sections_from
from axolotl.config.keys import SECTIONS, blocks_in, owner, owners
from axolotl.config.merge import Merged, Overrides, Source, override_parts
from axolotl.config.old_keys import is_off
from axolotl.config.renames import Renaming
from axolotl.config.rules import broken_rules
from axolotl.config.section import Section, default_of, facts, members
from axolotl.config.unbuilt import idle_keys, way_without
from axolotl.config.yaml_file import Path as KeyPath
from axolotl.config.yaml_file import dotted, undotted
from axolotl.errors import ConfigError, Place, Problem

# Keys in which `${NAME}` stands for an environment variable: paths, names and tracking, never templates or code.
_ENVIRONMENT = re.compile(
    r"(base_model|base_model_config|tokenizer_config|revision_of_model|model_revision|lora_model_dir|output_dir"
    r"|dataset_prepared_path|resume_from_checkpoint|push_dataset_to_hub|hub_\w+|deepspeed|(wandb|mlflow|comet|trackio"
    r"|swanlab)_\w+|(test_|pretraining_)?datasets?\[\d+\]\.(path|name|split|revision|data_files(\[\d+\])?))$"
)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
HOLDERS = ("x-", ".")
"""How keys begin that only hold pieces of YAML for use elsewhere in the file."""
# Text for a tracker that people also write as true.
_SWITCHES = {"wandb_log_model", "wandb_watch"}
_EMPTY_COUNTS = {"default_system_message", "chat_template_jinja"}


class Loading(Merged):
    """One load in progress: from the merged document to validated sections."""

    def __init__(self) -> None:
        super().__init__()
        self.complaints = Complaints(self.document, self.excerpt)
        self.not_there: dict[str, str] = {}
        """Features that are not built, and the first key of each that the file sets."""

    def expand(self) -> None:
        """Replaces `${NAME}` in keys that hold paths and names."""

        def walk(path: KeyPath, value: Any) -> Any:
            if isinstance(value, dict):
                return {k: walk((*path, k), v) for k, v in value.items()}
            if isinstance(value, list):
                return [walk((*path, i), v) for i, v in enumerate(value)]
            if isinstance(value, str) and "${" in value and _ENVIRONMENT.match(dotted(path)):
                return _VARIABLE.sub(lambda found: self.variable(path, found), value)
            return value

        for key, value in self.document.values.items():
            if not str(key).startswith("chat_template"):
                filled = self.document.values[key] = walk((key,), value)
                if value and filled == "" and key in owners() and default_of(owner(key), key):
                    self.empty(key, value)

    def empty(self, key: str, value: str) -> None:
        """Tells that nothing is left of a value, so that the default holds."""
        self.add(
            self.complaints.problem(
                "warning",
                f"`{key}: {value}` is empty here, so the default holds: `{default_of(owner(key), key)}`.",
                "Set the variable, or write what is meant behind `:-`.",
                (key,),
            )
        )

    def variable(self, path: KeyPath, found: re.Match[str]) -> str:
        name, fallback = found.groups()
        if name in os.environ or fallback is not None:
            return os.environ.get(name) or fallback or ""
        self.add(
            self.complaints.problem(
                "invalid_value",
                f"`{dotted(path)}` names the environment variable `{name}`, which is not set.",
                f"Set it, or write a fallback: `${{{name}:-fallback}}`.",
                path,
            )
        )
        return ""

    def known_keys(self) -> dict[str, Any]:
        """The values of known keys that are set; unknown keys become problems."""
        values: dict[str, Any] = {}
        for key, value in self.document.values.items():
            if str(key).startswith(HOLDERS):
                # Anchors that are used elsewhere in the file; nothing is meant by the key itself.
                continue
            if key not in owners():
                problem = self.complaints.unknown((key,))
                if value is None:
                    problem = Problem(
                        problem.message + " It is empty, so nothing is lost.",
                        problem.remedy,
                        "warning",
                        problem.keys,
                        problem.places,
                        problem.excerpt,
                    )
                self.add(problem)
            elif value is not None and (value != "" or key in _EMPTY_COUNTS):
                values[key] = value
        return values

    def unavailable(self, values: dict[str, Any]) -> None:
        """Tells every key of a feature that is not built yet, unless its value means off."""
        for key in list(values):
            section = owner(key)
            if self.not_built(section, (key,), values[key]):
                continue
            if facts(section, key).get("state") == "unavailable":
                # Off, in whichever way: the field's own default says the same.
                del values[key]

    def not_built(self, model: type[BaseModel], path: KeyPath, value: Any) -> bool:
        key = str(path[-1])
        if key not in model.model_fields:
            return False
        field, said = model.model_fields[key], facts(model, key)
        choices = [a for k in members(field.annotation) if get_origin(k) is Literal for a in get_args(k)]
        if choices and isinstance(value, str) and value and value not in choices:
            # Not known to us, and told so where values are checked.
            return True
        off = is_off(value) or (value == 0 and not isinstance(value, str)) or value == default_of(model, key)
        off = off or any(
            isinstance(value, dict)
            and block.options_only
            and all(
                k in block.model_fields and (is_off(v) or v == default_of(block, k)) for k, v in value.items()
            )
            for block in blocks_in(field.annotation)
        )
        if said.get("state") == "unavailable" and not off:
            feature = said["by_value"].get(str(value), said["feature"])
            first = self.not_there.setdefault(feature, dotted(path))
            self.add(
                self.complaints.problem(
                    "unavailable",
                    f"`{dotted(path)}` belongs to {feature}, which is not available yet.",
                    way_without(feature, "" if first == dotted(path) else first),
                    path,
                    at_key=True,
                )
            )
            return True
        found = False
        for block in blocks_in(field.annotation):
            items = value if isinstance(value, list) else [value]
            for index, item in enumerate(items):
                at = (*path, index) if isinstance(value, list) else path
                for inner, each in item.items() if isinstance(item, dict) else ():
                    found = self.not_built(block, (*at, inner), each) or found
        return found

    def sections(self, values: dict[str, Any]) -> dict[str, Section]:
        """Every section, validated. A section with errors is built from its other keys."""
        built: dict[str, Section] = {}
        for name, mine in sections_from(values):
            kind = SECTIONS[name]
            while True:
                if not mine:
                    built[name] = kind.model_construct()
                    break
                try:
                    built[name] = kind.model_validate(mine)
                    break
                except ValidationError as error:
                    if self.as_text(mine, error):
                        continue
                    problems = list(self.complaints.translate(kind, mine, error))
                    for problem in problems:
                        if not self.of_no_interest(kind, problem):
                            self.add(problem)
                    wrong = {str(undotted(p.keys[0])[0]) for p in problems}
                    mine = {k: v for k, v in mine.items() if k not in wrong}
        return built

    @staticmethod
    def of_no_interest(section: type[Section], problem: Problem) -> bool:
        """Keys that old files have inside a block of a feature that is not built: the block as a whole is told."""
        key = str(undotted(problem.keys[0])[0])
        guessed = problem.remedy.startswith("Did you mean")
        nested = problem.kind == "unknown_key" and key != problem.keys[0]
        return nested and not guessed and facts(section, key).get("state") == "unavailable"

    def as_text(self, values: dict[str, Any], error: ValidationError) -> bool:
        """Where text is expected and the file has a number, takes the number as it was written. True when it did."""
        changed = False
        for each in error.errors(include_url=False, include_input=False):
            if each["type"] != "string_type":
                continue
            path = Complaints.data_path(values, each["loc"], each["type"])
            here: Any = values
            for part in path[:-1]:
                here = here[part]
            value = here[path[-1]]
            if isinstance(value, int | float) and (not isinstance(value, bool) or path[0] in _SWITCHES):
                spot = self.document.spots.get(path)
                here[path[-1]] = spot.written if spot and spot.written is not None else str(value)
                changed = True
        return changed


Check = Callable[[Config], Iterable[Problem]]


def load_config(
    sources: Source | Sequence[Source],
    overrides: Overrides | None = None,
    *,
    verb: str = "train",
    checks: Sequence[Check] = (),
) -> Config:
    """Reads one or several config files (merged left to right) and overrides into a validated Config.

    `sources` are paths, https:// addresses, or hf://owner/repo/file.yml. `overrides` are (key, YAML text) pairs as the
    command line has them, or a mapping of keys to Python values. `verb` is the command that will use the config:
    inference and merging need no datasets. `checks` are asked for further problems. Opens nothing but the config files.

    Raises ConfigError with every problem found, each with its place.
    """
    loading = Loading()
    many = [sources] if isinstance(sources, str | Path) else list(sources)
    for layer, source in enumerate(many):
        loading.read(source, layer)
    if loading.problems and not loading.sources:
        raise ConfigError(loading.problems)
    for layer, (key, text, flag, fault) in enumerate(override_parts(overrides)):
        if fault:
            loading.add(Problem(fault, "Write `--key value`.", "syntax", (key,), (Place(flag),)))
        else:
            loading.override(key, text, flag, len(many) + layer)
    given = tuple(
        (key, text if isinstance(text, str) else as_json(text))
        for key, text, _, _ in override_parts(overrides)
    )
    return replace(_finish(loading, verb, checks), overrides=given)


def _finish(loading: Loading, verb: str, checks: Sequence[Check]) -> Config:
    renaming = Renaming(loading.document, loading.layers)
    for problem in renaming.run():
        loading.add(problem)
    loading.typed = renaming.typed
    loading.expand()
    values = loading.known_keys()
    loading.unavailable(values)
    sections = loading.sections(values)
    config = Config(
        **sections,  # type: ignore[arg-type]
        sources=tuple(loading.sources),
        spots=loading.document.spots,
        lines=loading.lines,
    )
    for problem in idle_keys(config):
        loading.add(problem)
    # A key whose value is wrong in itself says nothing about its neighbours.
    wrong = frozenset(loading.bad)
    for problem in [*broken_rules(config, verb), *(p for check in checks for p in check(config))]:
        told = problem.kind == "missing" and problem.keys[0] in loading.complaints.meant
        if not told and not wrong.intersection(str(undotted(key)[0]) for key in problem.keys):
            loading.add(problem)
    order = sorted(loading.problems, key=lambda p: (not p.fatal, *_order(p)))
    if any(p.fatal for p in order):
        error = ConfigError(order)
        error.config, error.doubted = config, wrong | frozenset(loading.complaints.meant)
        raise error
    return Config(**{**vars(config), "warnings": tuple(order)})


def _order(problem: Problem) -> tuple[int, str, int, int]:
    if not problem.places or (problem.kind == "missing" and problem.places[0].line is None):
        return (1, "", 0, 0)
    place = problem.places[0]
    return (0, place.file, place.line or 0, place.column or 0)
