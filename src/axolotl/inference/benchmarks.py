"""Benchmarks of lm-evaluation-harness on a model of ours: its tasks, the run, and a table of what came out."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.config.keys import did_you_mean, nearest
from axolotl.errors import ConfigError, DataError, Problem, UserError
from axolotl.registry import missing_extra, require_extra

if TYPE_CHECKING:
    from axolotl.inference.loading import Loaded

_PURPOSE, _EXTRA, _KEY = "`axolotl lm-eval`", "lm-eval", "lm_eval_tasks"
_OWN = (".yaml", ".yml")


@dataclass(frozen=True)
class Score:
    """One figure of one task. `filter`: how the answer was read from the text, where a task has several ways."""

    task: str
    shots: int | None
    filter: str
    metric: str
    value: float
    error: float | None
    """Standard error of `value`; None where there is none."""


def check_tasks(names: Sequence[str] | None) -> list[Problem]:
    """What is wrong with the tasks, without loading any: the package, files that are missing, names nobody knows."""
    if not names:
        return []
    missing = missing_extra("lm_eval", _EXTRA, "`lm_eval_tasks`", _KEY)
    if missing:
        return missing
    try:
        _find(names)
    except UserError as error:
        return list(error.problems)
    return []


def load_tasks(names: Sequence[str]) -> tuple[Any, list[Any]]:
    """(the harness' manager, tasks and groups with their rows) of task names, patterns or own task files.

    Raises EnvironmentProblem where the harness is not installed, ConfigError for unknown names and DataError for tasks
    whose rows cannot be had, all at once.
    """
    require_extra("lm_eval", _EXTRA, _PURPOSE, _KEY)
    manager, found = _find(names)
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    problems = []
    for name in found:
        try:
            loaded = manager.load([name])
        except Exception as error:
            problems.append(_unreadable(name, error))
            continue
        tasks |= loaded["tasks"]
        groups |= loaded["groups"]
    if problems:
        raise DataError(problems)
    inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    below = {inner.name for group in groups.values() for inner in group.get_all_groups()}
    chosen = [g for name, g in groups.items() if name not in below]
    return manager, [*chosen, *(t for name, t in tasks.items() if name not in inside)]


def _unreadable(name: str, error: Exception) -> Problem:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return Problem(
        f"the rows of the task `{name}` cannot be had: {reason[:300]}",
        "Most tasks come from the Hub: is it reachable? `datasets` may be an own task file with rows on this disk.",
        "data",
        (_KEY,),
    )


def _find(names: Sequence[str]) -> tuple[Any, list[str]]:
    """(manager, names that it knows). Raises ConfigError for names and files that are not there."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    wanted = list(dict.fromkeys(part.strip() for name in names for part in name.split(",") if part.strip()))
    files = {name: Path(name).expanduser().resolve() for name in wanted if name.endswith(_OWN)}
    problems = [
        Problem(f"`{name}` does not exist.", "Check the path of the task file.", "path", (_KEY,))
        for name, file in files.items()
        if not file.is_file()
    ]
    if problems:
        raise ConfigError(problems)
    # Own tasks alone need no index of the harness' thousands.
    manager = importlib.import_module("lm_eval.tasks").TaskManager(
        include_path=list(dict.fromkeys(str(file.parent) for file in files.values())) or None,
        include_defaults=len(files) < len(wanted),
    )
    found: list[str] = []
    for name in wanted:
        if name in files:
            own = [
                n
                for n, e in manager.task_index.items()
                if e.yaml_path and Path(e.yaml_path).resolve() == files[name]
            ]
            matched = own[:1]
            remedy = "A task file names itself with `task:`."
        else:
            matched = list(manager.match_tasks([name]))
            remedy = did_you_mean(nearest(name, manager.all_tasks)) or "`lm-eval ls tasks` lists them."
        if not matched:
            problems.append(
                Problem(f"`{name}` is no task of lm-evaluation-harness.", remedy, "invalid_value", (_KEY,))
            )
        found += matched
    if problems:
        raise ConfigError(problems)
    return manager, list(dict.fromkeys(found))


def run_benchmarks(
    loaded: Loaded,
    manager: Any,
    tasks: Sequence[Any],
    *,
    batch_size: int,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    system: str | None = None,
) -> dict[str, Any]:
    """What the harness finds: its own result, without samples. `limit`: rows of each task; `shots`: examples before each.

    `chat`: rows are asked through the tokenizer's chat template.
    """
    model = importlib.import_module("lm_eval.models.huggingface").HFLM(
        pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", batch_size=batch_size
    )
    result = importlib.import_module("lm_eval.evaluator").simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=shots,
        limit=limit,
        log_samples=False,
        apply_chat_template=chat,
        system_instruction=system,
        bootstrap_iters=1000,
    )
    return dict(result)


def scores(result: dict[str, Any]) -> list[Score]:
    """Every figure of a result."""
    found = []
    for task, values in result["results"].items():
        for name, value in values.items():
            metric, _, way = name.partition(",")
            if (
                not isinstance(value, int | float)
                or isinstance(value, bool)
                or metric.endswith("_stderr")
                or not way
            ):
                continue
            error = values.get(f"{metric}_stderr,{way}")
            found.append(
                Score(
                    task=str(values.get("alias", task)).strip(" -"),
                    shots=result.get("n-shot", {}).get(task),
                    filter="" if way == "none" else way,
                    metric=metric,
                    value=float(value),
                    error=float(error) if isinstance(error, int | float) else None,
                )
            )
    return found


def table(found: Sequence[Score]) -> list[str]:
    """The figures as lines of text."""
    rows = [("task", "shots", "metric", "value", "±")]
    rows += [
        (
            s.task,
            "" if s.shots is None else str(s.shots),
            f"{s.metric} ({s.filter})" if s.filter else s.metric,
            f"{s.value:.4f}",
            "" if s.error is None else f"{s.error:.4f}",
        )
        for s in found
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
