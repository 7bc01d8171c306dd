"""The command `axolotl`: one short function per verb. Imports only click; each body imports what it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from axolotl import __version__, console
from axolotl.cli.processes import OwnOptions, check_launcher, run_training, takes_launcher, takes_processes
from axolotl.errors import AxolotlError, ConfigError, Problem

if TYPE_CHECKING:
    from axolotl.config import Config

PASS_ON = {"ignore_unknown_options": True, "max_content_width": 100, "help_option_names": ["--help", "-h"]}
CONFIG_SUFFIXES = (".yml", ".yaml")


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


def split_arguments(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """(config files, overrides) of what stands after a verb: `a.yml b.yml --lora-r 8 --no-sample-packing`.

    Config files come first, or anywhere where no flag can claim them. A word that ends in .yml belongs to the flag
    before it only if a config file has been seen already.
    """
    sources: list[str] = []
    overrides: list[str] = []
    open_flag = False
    for word in args:
        if word.startswith("--"):
            overrides.append(word)
            open_flag = "=" not in word and not word.startswith("--no-")
        elif word[:1] == "-" and word[1:2].isalpha() and not open_flag:
            # Told with the overrides: flags have two dashes.
            overrides.append(word)
            open_flag = "=" not in word
        elif open_flag and (sources or not word.endswith(CONFIG_SUFFIXES)):
            overrides.append(word)
            open_flag = False
        else:
            sources.append(word)
            open_flag = False
    return sources, overrides


def _sources_and_overrides(args: Sequence[str], verb: str) -> tuple[list[str], list[Any]]:
    sources, flags = split_arguments(args)
    if not sources:
        raise ConfigError(
            Problem(
                f"`axolotl {verb}` needs a config file.",
                f"For example: axolotl {verb} config.yml. `axolotl fetch examples` brings some.",
                "missing",
            )
        )
    from axolotl.cli.overrides import parse_overrides

    return sources, parse_overrides(flags)


def _load(args: Sequence[str], verb: str) -> Config:
    sources, overrides = _sources_and_overrides(args, verb)
    from axolotl.plan.check import load_config

    return load_config(sources, overrides, verb=verb)


def _with_key(args: tuple[str, ...], flag: str, value: str | None) -> tuple[str, ...]:
    """A flag of the verb that is also a config key takes the way of every override."""
    return args if value is None else (*args, f"{flag}={value}")


def takes_config(function: Callable[..., None]) -> Callable[..., None]:
    """The arguments of every verb that reads a config: files, then any `--key value`."""
    return click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="CONFIG... [--KEY VALUE]...")(
        function
    )


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
    ctx.exit(run_training(lambda: _load(args, "train"), args, launcher, num_processes, own))


def _sweep(args: tuple[str, ...], file: Path) -> int:
    """Checks every run of the sweep, then trains them. 0 where all ended well."""
    from axolotl.cli.sweep import checked_trials
    from axolotl.run.sweep import Run, sweep

    base = _load(args, "train")
    trials = checked_trials(file, base.output.output_dir, lambda flags: _load((*args, *flags), "train"))
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
    cfg = _load(args, "preprocess")
    from axolotl.run import preprocess as verb

    verb.preprocess(cfg, **options)


@cli.command(context_settings=PASS_ON)
@click.option("--answers", is_flag=True, help="Also let the model answer every row, and count exact matches.")
@click.option(
    "--max-rows", type=click.IntRange(min=1), metavar="N", help="With --answers: only the first N rows."
)
@click.option("--untrained", is_flag=True, help="The base model is meant, without trained weights.")
@click.option("--lora-model-dir", metavar="DIR", help="The adapter to evaluate; output_dir's by default.")
@click.option(
    "--base-model", metavar="MODEL", help="Another model than the config's, a merged one for example."
)
@takes_launcher
@takes_config
def evaluate(
    args: tuple[str, ...], lora_model_dir: str | None, base_model: str | None, **options: Any
) -> None:
    """Loss, perplexity and exact match of the trained model on held-out rows."""
    args = _with_key(_with_key(args, "--lora-model-dir", lora_model_dir), "--base-model", base_model)
    cfg = _load(args, "evaluate")
    from axolotl.run import evaluate as verb

    verb.evaluate(cfg, **options)


@cli.command(context_settings=PASS_ON)
@click.option(
    "--prompt", metavar="TEXT", help="One question; without it, and without a terminal, stdin is read."
)
@click.option(
    "--prompt-file", type=click.Path(path_type=Path), metavar="FILE", help="A file that holds one question."
)
@click.option("--system", metavar="TEXT", help="What the model is told before the question.")
@click.option("--chat", is_flag=True, help="A conversation at the terminal.")
@click.option("--gradio", is_flag=True, help="A page in the browser, on this machine only.")
@click.option(
    "--input", "input_file", type=click.Path(path_type=Path), metavar="ROWS.jsonl", help="Many questions."
)
@click.option(
    "--output", "output_file", type=click.Path(path_type=Path), metavar="OUT.jsonl", help="Their answers."
)
@click.option("--lora-model-dir", metavar="DIR", help="The adapter to use; output_dir's by default.")
@click.option(
    "--base-model", metavar="MODEL", help="Another model than the config's, a merged one for example."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), metavar="N", help="The longest answer, in tokens."
)
@click.option(
    "--temperature", type=click.FloatRange(min=0), metavar="T", help="0: always the likeliest token."
)
@click.option(
    "--top-p", type=click.FloatRange(0, 1), metavar="P", help="Only the likeliest tokens, up to this share."
)
@click.option("--top-k", type=click.IntRange(min=1), metavar="K", help="Only the K likeliest tokens.")
@click.option(
    "--min-p", type=click.FloatRange(0, 1), metavar="P", help="Only tokens this likely, beside the likeliest."
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(min=0, min_open=True),
    metavar="X",
    help="Above 1: repeats less.",
)
@takes_launcher
@takes_config
def inference(
    args: tuple[str, ...], lora_model_dir: str | None, base_model: str | None, **options: Any
) -> None:
    """Ask the model: one prompt, many rows, or a conversation."""
    args = _with_key(_with_key(args, "--lora-model-dir", lora_model_dir), "--base-model", base_model)
    cfg = _load(args, "inference")
    from axolotl.run import inference as verb

    verb.inference(cfg, **options)


@cli.command("merge-lora", context_settings=PASS_ON)
@click.option("--lora-model-dir", metavar="DIR", help="The adapter to merge; output_dir's by default.")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="DIR", help="Default: merged in output_dir."
)
@click.option(
    "--base",
    type=click.Choice(["full", "quantized"]),
    default="full",
    help="For an adapter trained on quantized weights: merge into the full ones, or into what the quantized ones stood for.",
)
@takes_config
def merge_lora(args: tuple[str, ...], lora_model_dir: str | None, output: Path | None, base: str) -> None:
    """Write base model and adapter as one model."""
    cfg = _load(_with_key(args, "--lora-model-dir", lora_model_dir), "merge-lora")
    from axolotl.run import merge as verb

    verb.merge(cfg, destination=output, base=base)


@cli.command(context_settings=PASS_ON)
@click.option(
    "--base-model", metavar="DIR", help="The model to quantize; by default the merged or trained one."
)
@click.option(
    "--weight-dtype", metavar="TYPE", help="int8, int4 or fp8; by default what `quantization` says."
)
@click.option(
    "--activation-dtype", metavar="TYPE", help="int8 or fp8; by default activations stay as they are."
)
@click.option("--group-size", type=click.IntRange(min=1), metavar="N", help="Weights that share one scale.")
@click.option(
    "--quantize-embedding/--no-quantize-embedding", default=None, help="Also quantize the token embeddings."
)
@click.option(
    "--output",
    "destination",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Default: quantized in output_dir.",
)
@takes_config
def quantize(
    args: tuple[str, ...],
    base_model: str | None,
    destination: Path | None,
    quantize_embedding: bool | None,
    **options: Any,
) -> None:
    """Write the finished model in smaller numbers, and compare it with the full one."""
    embedding = None if quantize_embedding is None else str(quantize_embedding).lower()
    for key, value in {**options, "quantize_embedding": embedding}.items():
        args = _with_key(args, f"--quantization.{key}", None if value is None else str(value))
    cfg = _load(args, "quantize")
    from axolotl.run import quantize as verb

    verb.quantize(cfg, base_model=base_model, destination=destination)


@cli.command("vllm-serve", context_settings=PASS_ON)
@click.option("--show", is_flag=True, help="Print vLLM's command and start nothing.")
@takes_config
@click.pass_context
def vllm_serve(ctx: click.Context, args: tuple[str, ...], show: bool) -> None:
    """Serve the trained model with vLLM, on this machine unless `vllm.host` says otherwise."""
    cfg = _load(args, "vllm-serve")
    from axolotl.run import serve as verb

    ctx.exit(verb.serve(cfg, show=show))


@cli.command(context_settings=PASS_ON)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the weights. Default: output_dir.",
)
@takes_config
def publish(args: tuple[str, ...], folder: Path | None) -> None:
    """Upload the finished weights to `hub_model_id`, a private repository of the Hub."""
    cfg = _load(args, "publish")
    from axolotl.run import publish as verb

    verb.publish(cfg, folder=folder)


@cli.command("merge-sharded-fsdp-weights", context_settings=PASS_ON)
@click.option(
    "--sharded-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Default: output_dir's, or that of its last checkpoint.",
)
@click.option(
    "--output",
    "destination",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Default: merged in output_dir.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Number type to write; that of the checkpoint by default.",
)
@takes_config
def merge_sharded(args: tuple[str, ...], **options: Any) -> None:
    """Write what the processes of an FSDP run saved in parts as one model."""
    cfg = _load(args, "merge-sharded-fsdp-weights")
    from axolotl.run import consolidate as verb

    verb.consolidate(cfg, **options)


@cli.command()
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


@cli.command(context_settings=PASS_ON)
@click.option(
    "--config-only", is_flag=True, help="Read nothing but the YAML: no network, no model, no hardware."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@takes_config
@click.pass_context
def check(ctx: click.Context, args: tuple[str, ...], config_only: bool, as_json: bool) -> None:
    """Validate config, data and environment; run nothing."""
    from axolotl.cli.document import report_check

    def find() -> Sequence[Problem]:
        cfg = _load(args, "check")
        if config_only:
            return cfg.warnings
        from axolotl.run.check import check as run_check

        return run_check(cfg)

    ctx.exit(report_check(find, as_json=as_json))


@cli.command(context_settings=PASS_ON)
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
    cfg = _load(args, "plan")
    from axolotl.run import plan as verb

    ctx.exit(0 if verb.plan(cfg, **options).fits else verb.DOES_NOT_FIT)


@cli.command(context_settings=PASS_ON)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@takes_config
@click.pass_context
def doctor(ctx: click.Context, args: tuple[str, ...], as_json: bool) -> None:
    """Look at this machine; with a config also at its rows, masks, and where generation will stop."""
    cfg = _load(args, "doctor") if args else None
    from axolotl.run import doctor as verb

    ctx.exit(verb.doctor(cfg, as_json=as_json))


@cli.command()
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


@cli.command("config-schema")
def config_schema() -> None:
    """Print the JSON Schema of the config, for editors."""
    import json

    from axolotl.cli.document import config_schema as schema

    console.out(json.dumps(schema(), indent=2))


@cli.command(context_settings=PASS_ON)
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

        cfg, _ = resolve(_load(args, "explain"), Hardware(device="cpu"))
        console.out(explain_config(cfg))


def main(args: Sequence[str] | None = None) -> None:
    """The entry point; leaves by SystemExit."""
    # Threads that wait for others by spinning take the core that those need: on a shared machine ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    cli.main(args=None if args is None else list(args), prog_name="axolotl")


if __name__ == "__main__":
    main(sys.argv[1:])
