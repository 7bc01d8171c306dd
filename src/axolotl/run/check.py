"""`axolotl check`: config, files and machine, looked at without running anything."""

from __future__ import annotations

from collections.abc import Sequence

from axolotl.config import Config
from axolotl.config.plugins import import_plugins, own_plugins
from axolotl.distributed.world import detect_hardware
from axolotl.errors import Problem, UserError
from axolotl.plan.check import component_problems
from axolotl.run.beforehand import problems_beforehand


def check(cfg: Config) -> Sequence[Problem]:
    """All problems and warnings that can be seen from here."""
    problems = list(cfg.warnings)
    if own_plugins(cfg):
        try:
            # They bring names of their own, so names are looked at once they are there.
            import_plugins(cfg)
            problems += [p for p in component_problems(cfg, complete=True) if p not in problems]
        except UserError as error:
            problems += error.problems
    return [*problems, *problems_beforehand(cfg, detect_hardware(), data=True)]
