"""The command `axolotl`: one short function per verb. Imports only click; each body imports what it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from axolotl import __version__, console
from axolotl.cli import asking, finishing, looking
from axolotl.cli.arguments import PASS_ON, load, takes_config
from axolotl.cli.processes import OwnOptions, check_launcher, run_training, takes_processes
from axolotl.errors import AxolotlError

LIGHT = ("check", "config-schema", "doctor", "explain", "fetch", "plan", "report")
"""Verbs that neither prepare data nor load weights, so that memory is nothing they die of."""


class Verbs(click.Group):
    """Shows a user's mistake without a traceback (exit 2) and leaves quietly on Ctrl-C (exit 130)."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AxolotlError as error:
            from axolotl.distributed.failure import tell_failure

            ctx.exit(tell_failure(error))
        except KeyboardInterrupt:
            console.note("Interrupted.")
            ctx.exit(130)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except Exception as error:
            from axolotl.distributed.failure import among_several, tell_failure

            if not among_several():
                raise
            ctx.exit(tell_failure(error))


@click.group(cls=Verbs, context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100})
@click.version_option(__version__, prog_name="axolotl")
def cli() -> None:
    """Fine-tune language models from one flat YAML file.

    Any key of the config can be overridden behind it: axolotl train config.yml --learning-rate 1e-4 --no-sample-packing
    """


@cli.command(context_settings=PASS_ON, cls=OwnOptions)
@click.option(
    "--sweep", type=click.Path(path_type=Path), metavar="FILE", help="Train once for each set of values."
)
@takes_processes
@takes_config
@click.pass_context
def train(
    ctx: click.Context,
    args: tuple[str, ...],
    sweep: Path | None,
    launcher: str | None,
    num_processes: int | None,
) -> None:
    """Train, after preparing the data where that has not been done."""
    own = ctx.meta.get("own", [])
    check_launcher(launcher, num_processes, own)
    if sweep is not None:
        if launcher or num_processes:
            raise click.UsageError("`--sweep` takes no `--launcher` and no `--num-processes`.")
        ctx.exit(_sweep(args, sweep))
    ctx.exit(run_training(lambda: load(args, "train"), args, launcher, num_processes, own))


def _sweep(args: tuple[str, ...], file: Path) -> int:
    """Checks every run of the sweep, then trains them. 0 where all ended well."""
    from axolotl.cli.sweep import checked_trials
    from axolotl.run.sweep import Run, sweep

    base = load(args, "train")
    trials = checked_trials(file, base.output.output_dir, lambda flags: load((*args, *flags), "train"))
    runs = [Run(folder, trial.values, [*args, *flags]) for trial, folder, flags in trials]
    outcomes = sweep(runs, Path(base.output.output_dir))
    return 0 if len(outcomes) == len(runs) and all(o.exit_code == 0 for o in outcomes) else 1


@cli.command(context_settings=PASS_ON)
@click.option(
    "--debug", is_flag=True, help="Show rows as the model will see them, with what is trained marked."
)
@click.option("--debug-text-only", is_flag=True, help="The same, without token ids.")
@click.option(
    "--report", is_flag=True, help="Write a page about the dataset: lengths, losses of rows, samples."
)
@takes_config
def preprocess(args: tuple[str, ...], **options: bool) -> None:
    """Tokenize the datasets and save them, so that training starts at once."""
    cfg = load(args, "preprocess")
    from axolotl.run import preprocess as verb

    verb.preprocess(cfg, **options)


for verb in (*asking.VERBS, *finishing.VERBS, *looking.VERBS):
    cli.add_command(verb)


def main(args: Sequence[str] | None = None) -> None:
    """The entry point; leaves by SystemExit."""
    # Threads that wait for others by spinning take the core that those need: on a shared machine ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = sys.argv[1:] if args is None else list(args)
    if not words or words[0] in LIGHT or words[0].startswith("-") or {"-h", "--help"} & set(words):
        cli.main(args=words, prog_name="axolotl")
        return
    from axolotl.distributed.witness import witnessed

    with witnessed(words[0]):
        cli.main(args=words, prog_name="axolotl")


if __name__ == "__main__":
    main(sys.argv[1:])
