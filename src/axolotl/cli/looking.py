"""The verbs that train nothing: fetch, check, plan, doctor, report, config-schema, explain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from axolotl import console
from axolotl.cli.arguments import CONFIG_SUFFIXES, PASS_ON, load, split_arguments, takes_config
from axolotl.errors import ConfigError, Problem


@click.command()
@click.argument("what", metavar="[examples|deepspeed_configs]")
@click.option(
    "--dest",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where to; a folder of that name by default.",
)
@click.option("--force", is_flag=True, help="Overwrite files that differ.")
def fetch(what: str, dest: Path | None, force: bool) -> None:
    """Copy the example configs or DeepSpeed configs that came with this package. Needs no network."""
    from axolotl.cli.fetch import fetch as copy

    copy(what, dest, force=force)


@click.command(context_settings=PASS_ON)
@click.option(
    "--config-only", is_flag=True, help="Read nothing but the YAML: no network, no model, no hardware."
)
@click.option(
    "--num-processes",
    type=click.IntRange(min=1),
    metavar="N",
    help="As for a run of so many processes; by default, one for each GPU here.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@takes_config
@click.pass_context
def check(
    ctx: click.Context, args: tuple[str, ...], config_only: bool, num_processes: int | None, as_json: bool
) -> None:
    """Validate config, data (the first 256 rows of each dataset) and environment; run nothing."""
    from axolotl.cli.document import report_check

    def find() -> Sequence[Problem]:
        try:
            cfg = load(args, "check")
        except ConfigError as error:
            if config_only or error.config is None:
                raise
            from axolotl.run.check import files_in_spite

            raise ConfigError([*error.problems, *files_in_spite(error.config, error.doubted)]) from None
        if config_only:
            return cfg.warnings
        from axolotl.run.check import check as run_check

        return run_check(cfg, num_processes)

    looked = (
        ""
        if config_only
        else "Of each dataset the first rows were looked at; `axolotl preprocess` reads all."
    )
    ctx.exit(report_check(find, as_json=as_json, looked=looked))


@click.command(context_settings=PASS_ON)
@click.option(
    "--gpu", metavar="NAME", help="For this GPU (h200, h100, a100, 4090, ...) instead of the one here."
)
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="For so many of them.")
@click.option("--fit", is_flag=True, help="Also look for faster settings where memory is left.")
@click.option("--write", is_flag=True, help="Put the first proposal into the config file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@takes_config
@click.pass_context
def plan(ctx: click.Context, args: tuple[str, ...], **options: Any) -> None:
    """What a run will need and take: memory, steps, time; and what would make it fit."""
    cfg = load(args, "plan")
    from axolotl.run import plan as verb

    ctx.exit(0 if verb.plan(cfg, **options).fits else verb.DOES_NOT_FIT)


@click.command(context_settings=PASS_ON)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option(
    "--distributed", is_flag=True, help="Several processes: environment, shared memory, speed of each link."
)
@click.option(
    "--num-processes",
    type=click.IntRange(min=2),
    metavar="N",
    help="With --distributed: one per GPU by default.",
)
@click.option(
    "--timeout",
    type=click.IntRange(min=5),
    metavar="S",
    default=60,
    help="With --distributed: seconds at most.",
)
@takes_config
@click.pass_context
def doctor(
    ctx: click.Context,
    args: tuple[str, ...],
    as_json: bool,
    distributed: bool,
    num_processes: int | None,
    timeout: int,
) -> None:
    """Look at this machine; with a config also at its rows, masks, and where generation will stop."""
    if distributed:
        if args:
            raise click.UsageError("`--distributed` looks at machines and links, and takes no config.")
        from axolotl.distributed.group import leave_group
        from axolotl.run.doctor_distributed import doctor_distributed

        code = doctor_distributed(num_processes, seconds=timeout, as_json=as_json)
        leave_group(code)
        ctx.exit(code)
    if num_processes or ctx.get_parameter_source("timeout") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("`--num-processes` and `--timeout` go with `--distributed`.")
    cfg = load(args, "doctor") if args else None
    from axolotl.run import doctor as verb

    ctx.exit(verb.doctor(cfg, as_json=as_json))


@click.command()
@click.argument("output_dir", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Default: run_report.html in OUTPUT_DIR.",
)
def report(output_dir: Path, output: Path | None) -> None:
    """Write a page about a training run, finished or still going on."""
    from axolotl.report.run import write_run_report

    console.out(str(write_run_report(output_dir, output)))


@click.command("config-schema")
def config_schema() -> None:
    """Print the JSON Schema of the config, for editors."""
    import json

    from axolotl.cli.document import config_schema as schema

    console.out(json.dumps(schema(), indent=2))


@click.command(context_settings=PASS_ON)
@takes_config
def explain(args: tuple[str, ...]) -> None:
    """What a key means (`explain lora_r`), or every effective value of a config (`explain config.yml`)."""
    from axolotl.cli.document import explain_config, explain_key

    sources, _ = split_arguments(args)
    if sources and not any(s.endswith(CONFIG_SUFFIXES) or "/" in s for s in sources):
        for key in sources:
            console.out(explain_key(key))
    else:
        from axolotl.config import Hardware, resolve

        cfg, _ = resolve(load(args, "explain"), Hardware(device="cpu"))
        console.out(explain_config(cfg))


VERBS = (fetch, check, plan, doctor, report, config_schema, explain)
