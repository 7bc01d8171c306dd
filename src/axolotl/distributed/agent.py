"""torchrun or accelerate, as `axolotl train --launcher` starts them: their own program, and a word where the system ended a
process that could not speak any more.

    python -m axolotl.distributed.agent torch.distributed.run --nproc-per-node=2 -m axolotl.cli.train config.yml
"""

from __future__ import annotations

import dataclasses
import runpy
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from axolotl import console
from axolotl.config.host import oom_kills
from axolotl.distributed.exits import explain_exit
from axolotl.errors import Problem


def last_words(error: ChildFailedError, kernel_kills: int) -> Problem | None:
    """What the exit code of the first process that failed says; None for one that spoke for itself."""
    rank, failure = error.get_first_failure()
    told = explain_exit(failure.exitcode, f"the process of rank {rank}", kernel_kills)
    if told is None:
        return None
    message = told.message[0].upper() + told.message[1:]
    return dataclasses.replace(told, message=f"{message} All others were ended.")


def main() -> int:
    """Runs the launcher's module with its arguments; returns the exit code."""
    module, kills = sys.argv[1], oom_kills()
    sys.argv = sys.argv[1:]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ChildFailedError as error:
        told = last_words(error, oom_kills() - kills)
        if told is None:
            raise
        console.stderr().print(str(error), markup=False, highlight=False)
        console.show_problem(told)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
