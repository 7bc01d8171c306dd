"""The verbs that ask a finished model: evaluate, inference, lm-eval, vllm-serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from axolotl.cli.arguments import PASS_ON, load, takes_config, with_key
from axolotl.cli.processes import takes_launcher


@click.command(context_settings=PASS_ON)
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
    args = with_key(with_key(args, "--lora-model-dir", lora_model_dir), "--base-model", base_model)
    cfg = load(args, "evaluate")
    from axolotl.run import evaluate as verb

    verb.evaluate(cfg, **options)


@click.command(context_settings=PASS_ON)
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
@click.option("--untrained", is_flag=True, help="The base model is meant, without trained weights.")
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
    args = with_key(with_key(args, "--lora-model-dir", lora_model_dir), "--base-model", base_model)
    cfg = load(args, "inference")
    from axolotl.run import inference as verb

    verb.inference(cfg, **options)


@click.command("lm-eval", context_settings=PASS_ON)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N rows of each task.")
@click.option("--num-fewshot", type=click.IntRange(min=0), metavar="N", help="Examples before each question.")
@click.option(
    "--apply-chat-template/--no-apply-chat-template",
    default=None,
    help="Ask through the chat template; by default where the training data did.",
)
@click.option("--system", metavar="TEXT", help="What the model is told before each question.")
@click.option("--untrained", is_flag=True, help="The base model is meant, without trained weights.")
@click.option("--lora-model-dir", metavar="DIR", help="The adapter to take; output_dir's by default.")
@click.option(
    "--base-model", metavar="MODEL", help="Another model than the config's, a merged one for example."
)
@takes_launcher
@takes_config
def lm_eval(
    args: tuple[str, ...], lora_model_dir: str | None, base_model: str | None, **options: Any
) -> None:
    """Benchmarks of lm-evaluation-harness (`lm_eval_tasks`) on the trained model."""
    args = with_key(with_key(args, "--lora-model-dir", lora_model_dir), "--base-model", base_model)
    cfg = load(args, "lm-eval")
    from axolotl.run import lm_eval as verb

    verb.lm_eval(cfg, **options)


@click.command("vllm-serve", context_settings=PASS_ON)
@click.option("--show", is_flag=True, help="Print vLLM's command and start nothing.")
@takes_config
@click.pass_context
def vllm_serve(ctx: click.Context, args: tuple[str, ...], show: bool) -> None:
    """Serve the trained model with vLLM, on this machine unless `vllm.host` says otherwise."""
    cfg = load(args, "vllm-serve")
    from axolotl.run import serve as verb

    ctx.exit(verb.serve(cfg, show=show))


VERBS = (evaluate, inference, lm_eval, vllm_serve)
