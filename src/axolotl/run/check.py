"""`axolotl check`: config, files and machine, looked at without running anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from axolotl.config import Config
from axolotl.config.keys import owners
from axolotl.config.plugins import import_plugins, own_plugins
from axolotl.distributed.world import detect_hardware, world
from axolotl.errors import Problem, UserError
from axolotl.model.files import check_base_model
from axolotl.plan.check import component_problems
from axolotl.run.beforehand import problems_beforehand
from axolotl.run.ready import placed
from axolotl.run.rows_beforehand import dataset_problems


def check(cfg: Config, processes: int | None = None) -> Sequence[Problem]:
    """All problems and warnings that can be seen from here, for a run of so many processes; None: one for each GPU."""
    problems = list(cfg.warnings)
    if own_plugins(cfg):
        try:
            # They bring names of their own, so names are looked at once they are there.
            import_plugins(cfg)
            problems += [p for p in component_problems(cfg, complete=True) if p not in problems]
        except UserError as error:
            problems += error.problems
    hardware = detect_hardware()
    if processes is None and not cfg.distributed.use_ray:
        processes = max(1, len(hardware.gpu_names), world().size)
    found = problems_beforehand(cfg, hardware, data=True, processes=processes)
    return [*problems, *map(_for_elsewhere, found)]


def _for_elsewhere(problem: Problem) -> Problem:
    """A config for several devices may be meant for another machine than the one that looks at it."""
    if problem.code != "AX1407":
        return problem
    remedy = (
        f"{problem.remedy} For a run elsewhere: `--num-processes 8` judges it for eight processes, and `--config-only` "
        "looks at no machine."
    )
    return dataclasses.replace(problem, remedy=remedy)


def files_in_spite(cfg: Config, doubted: Collection[str]) -> list[Problem]:
    """What is wrong with the files of a config whose other keys have mistakes, told already: the base model, and the
    datasets, with their rows where no key about data, model or tokenizer is `doubted`. `cfg` has the keys that are right.
    """
    if own_plugins(cfg) or "plugins" in doubted:
        return []
    base = cfg.is_set("base_model") and "base_model" not in doubted
    rendered = base and not any(owners().get(key) in ("data", "model") for key in doubted)
    problems = check_base_model(cfg.model) if base else []
    problems += dataset_problems(cfg, rows=rendered and not problems)
    return [
        placed(cfg, problem)
        for problem in problems
        if not any(key.partition("[")[0].partition(".")[0] in doubted for key in problem.keys)
    ]
