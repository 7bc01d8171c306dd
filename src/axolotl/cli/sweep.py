"""A sweep file expanded: every combination of the values that it lists, each as a set of overrides.

learning_rate: [1e-4, 2e-4]     # every value ...
lora_r: [8, 16]                 # ... with every value
paired:                         # and each of these together (`_` is the older name)
  - {micro_batch_size: 1, gradient_accumulation_steps: 8}
  - {micro_batch_size: 2, gradient_accumulation_steps: 4}
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from axolotl.config.examples import in_yaml
from axolotl.config.fetch import read_source
from axolotl.config.keys import did_you_mean, kinds_at, nearest, owners
from axolotl.config.old_keys import OLD_KEYS
from axolotl.config.yaml_file import Document, undotted
from axolotl.config.yaml_file import Path as KeyPath
from axolotl.errors import ConfigError, Problem

PAIRED = ("paired", "_")
MOST = 1000


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: a name for its folder, and its values by key (nested keys with dots)."""

    name: str
    values: dict[str, Any]

    def overrides(self, output_dir: str) -> dict[str, Any]:
        """What load_config takes for this run: its values, and an output_dir of its own below the given one."""
        return {**self.values, "output_dir": str(Path(output_dir) / self.name)}


def expand_sweep(file: str | Path) -> list[Trial]:
    """Every trial of a sweep file, in a fixed order. Raises ConfigError with all problems of the file."""
    document = read_source(file)
    problems = list(document.problems)
    axes: list[list[dict[str, Any]]] = []
    for key, value in document.values.items():
        if key in PAIRED:
            axes.append(_paired(document, key, value, problems))
        elif _known(document, (key,), problems):
            values = value if isinstance(value, list) else [value]
            if not values:
                problems.append(
                    _problem(document, (key,), f"`{key}` lists no value.", "List one value or more.")
                )
            axes.append([{key: each} for each in values])
    count = 1
    for axis in axes:
        count *= max(1, len(axis))
    if count > MOST:
        problems.append(
            _problem(
                document,
                (),
                f"This sweep has {count} runs; at most {MOST} are allowed.",
                "List fewer values.",
            )
        )
    if problems:
        raise ConfigError(problems)
    trials: list[Trial] = []
    for number, chosen in enumerate(itertools.product(*axes)):
        together = {key: value for part in chosen for key, value in part.items()}
        trials.append(Trial(f"sweep-{number:03d}{_slug(together)}", together))
    return trials


def checked_trials(
    file: str | Path, output_dir: str, load: Callable[[list[str]], object]
) -> list[tuple[Trial, Path, list[str]]]:
    """Every trial with its folder and its flags, each of them loaded once. Raises ConfigError with all their problems."""
    trials = []
    problems: dict[str, Problem] = {}
    for trial in expand_sweep(file):
        values = trial.overrides(output_dir)
        flags = [
            f"--{k.replace('_', '-')}={v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items()
        ]
        try:
            load(flags)
        except ConfigError as error:
            problems.update((problem.message, in_sweep(problem, file)) for problem in error.problems)
        trials.append((trial, Path(values["output_dir"]), flags))
    if problems:
        raise ConfigError(problems.values())
    return trials


def in_sweep(problem: Problem, file: str | Path) -> Problem:
    """A problem of one of the runs, told with the key and the line of the sweep file instead of the run's override."""
    flags = [place.file for place in problem.places if place.file.startswith("--")]
    if not flags:
        return problem
    document = read_source(file)
    message, places = problem.message, []
    for key in problem.keys:
        path = undotted(key)
        for flag in flags:
            if flag == "--" + key.replace("_", "-"):
                message = message.replace(f"`{flag}`", f"`{key}`")
        spots = [path[:1], *((paired, i, *path[:1]) for paired in PAIRED for i in range(MOST))]
        places += [document.spots[spot].value for spot in spots if spot in document.spots][:1]
    excerpt = document.excerpt(places[0]) if places else ""
    return replace(problem, message=message, places=tuple(places) or problem.places, excerpt=excerpt)


def _paired(document: Document, key: str, value: Any, problems: list[Problem]) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        problems.append(
            _problem(
                document,
                (key,),
                f"`{key}` is a list of mappings, each of values that go together.",
                "Write `- {key: value, other: value}`.",
            )
        )
        return []
    for index, each in enumerate(value):
        for inner in each:
            if inner in document.values:
                problems.append(
                    _problem(
                        document,
                        (key, index, inner),
                        f"`{inner}` is listed twice: under `{key}` and by itself.",
                        "Keep one.",
                    )
                )
            _known(document, (key, index, inner), problems)
    return value


def _known(document: Document, path: KeyPath, problems: list[Problem]) -> bool:
    key = str(path[-1])
    if kinds_at(undotted(key)) or key in OLD_KEYS:
        return True
    remedy = did_you_mean(nearest(key, owners())) or "Name a key of the config."
    problems.append(_problem(document, path, f"`{key}` is not a known key.", remedy, "unknown_key"))
    return False


def _problem(
    document: Document, path: KeyPath, message: str, remedy: str, kind: Any = "invalid_value"
) -> Problem:
    spot = document.spots.get(path)
    places = (spot.key,) if spot else ()
    excerpt = document.excerpt(spot.key) if spot else ""
    return Problem(message, remedy, kind, (str(path[-1]),) if path else (), places, excerpt)


def _slug(values: dict[str, Any]) -> str:
    """The values in a form that a folder can bear."""
    parts = [f"{key.rpartition('.')[2]}-{in_yaml(value)}" for key, value in values.items()]
    text = re.sub(r"[^A-Za-z0-9.=-]+", "-", "_".join(parts)).strip("-")
    return f"-{text[:60].rstrip('-')}" if text else ""
