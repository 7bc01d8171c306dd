"""The verbs that turn finished weights into something else: merge-lora, quantize, export, merge-sharded-fsdp-weights, publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from axolotl.cli.arguments import PASS_ON, load, takes_config, with_key


@click.command("merge-lora", context_settings=PASS_ON)
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
    cfg = load(with_key(args, "--lora-model-dir", lora_model_dir), "merge-lora")
    from axolotl.run import merge as verb

    verb.merge(cfg, destination=output, base=base)


@click.command(context_settings=PASS_ON)
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
        args = with_key(args, f"--quantization.{key}", None if value is None else str(value))
    cfg = load(args, "quantize")
    from axolotl.run import quantize as verb

    verb.quantize(cfg, base_model=base_model, destination=destination)


@click.command(context_settings=PASS_ON)
@click.option(
    "--to", type=click.Choice(["gguf"]), default="gguf", help="The kind of file: gguf, llama.cpp's."
)
@click.option(
    "--outtype",
    type=click.Choice(["auto", "f32", "f16", "bf16", "q8_0"]),
    default="auto",
    help="Number type to write; auto: the 16-bit one that is nearest to the model's.",
)
@click.option(
    "--base-model", metavar="DIR", help="The model to export; by default the merged or trained one."
)
@click.option(
    "--output",
    "destination",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Default: model-OUTTYPE.gguf in output_dir.",
)
@click.option(
    "--converter",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A checkout of llama.cpp, instead of the converter of axolotl[gguf].",
)
@click.option("--show", is_flag=True, help="Print the command for another machine and run nothing.")
@takes_config
def export(args: tuple[str, ...], to: str, **options: Any) -> None:
    """Write the finished model as one GGUF file, and compare it with its source."""
    cfg = load(args, "export")
    from axolotl.run import export as verb

    verb.export(cfg, **options)


@click.command(context_settings=PASS_ON)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the weights. Default: output_dir.",
)
@takes_config
def publish(args: tuple[str, ...], folder: Path | None) -> None:
    """Upload the finished weights to `hub_model_id`, a private repository of the Hub."""
    cfg = load(args, "publish")
    from axolotl.run import publish as verb

    verb.publish(cfg, folder=folder)


@click.command("merge-sharded-fsdp-weights", context_settings=PASS_ON)
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
    cfg = load(args, "merge-sharded-fsdp-weights")
    from axolotl.run import consolidate as verb

    verb.consolidate(cfg, **options)


VERBS = (merge_lora, quantize, export, publish, merge_sharded)
