"""How many processes a command of `axolotl` runs in, as options; and training in them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from axolotl.config import Config


def _only_python(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if value != "python":
        raise click.BadParameter(
            f"`{value}`: only `axolotl train` runs in several processes; this command needs one.", ctx, param
        )
    return value


class OwnOptions(click.Command):
    """A command with options for another program behind `--`; they stand in `ctx.meta["own"]`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            args, ctx.meta["own"] = args[:at], args[at + 1 :]
        return super().parse_args(ctx, args)


takes_launcher = click.option(
    "--launcher",
    default="python",
    callback=_only_python,
    expose_value=False,
    help="What starts the processes: `python`, this one.",
)


def takes_processes(function: Callable[..., None]) -> Callable[..., None]:
    """The options of `axolotl train` about its processes."""
    launcher = click.option(
        "--launcher",
        type=click.Choice(["python", "torchrun", "accelerate"]),
        help="What starts the processes: this one alone, or another program, whose own options follow behind `--`. "
        "Without it, each GPU gets a process.",
    )
    number = click.option(
        "--num-processes",
        type=click.IntRange(min=1),
        metavar="N",
        help="Processes on this machine; also on CPUs.",
    )
    return launcher(number(function))


def check_launcher(launcher: str | None, processes: int | None, own: Sequence[str]) -> None:
    """Options that fit no launcher are a mistake, not something to pass over."""
    if own and launcher not in ("torchrun", "accelerate"):
        raise click.UsageError(
            f"`-- {' '.join(own)}`: what stands behind `--` is for another launcher. "
            "Add `--launcher torchrun` or `--launcher accelerate`, or leave it out."
        )
    if launcher == "python" and (processes or 1) > 1:
        raise click.UsageError("`--launcher python` is one process; leave it out to have several.")
    if launcher in ("torchrun", "accelerate") and processes is not None:
        flag = "--nproc-per-node" if launcher == "torchrun" else "--num_processes"
        raise click.UsageError(f"`--num-processes`: {launcher} has its own: `-- {flag} {processes}`.")


def run_training(
    load: Callable[[], Config],
    args: Sequence[str],
    launcher: str | None,
    num_processes: int | None,
    own: Sequence[str],
) -> int:
    """Trains, in this process or in several; returns the exit code."""
    from axolotl.distributed.failure import end_with_parent

    end_with_parent()
    cfg = load()
    from axolotl.run import launch as starting

    code = starting.launch(cfg, args, launcher=launcher, processes=num_processes, own=own)
    if code is not None:
        return code
    from axolotl.distributed.group import leave_group
    from axolotl.run import train as verb

    result = verb.train(cfg)
    leave_group(result.exit_code)
    if result.complete and cfg.method.lm_eval_tasks and not result.stuck:
        from axolotl.distributed.world import world
        from axolotl.run import lm_eval as benchmarks

        if world().is_main:
            benchmarks.after_training(cfg)
    if result.stuck:
        from axolotl.distributed.witness import farewell

        # What a tracker's package has registered for the end of the process may wait for its server for minutes.
        sys.stdout.flush()
        sys.stderr.flush()
        farewell()
        os._exit(result.exit_code)
    return result.exit_code
