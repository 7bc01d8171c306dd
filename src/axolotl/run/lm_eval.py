"""`axolotl lm-eval`: benchmarks of lm-evaluation-harness on what was trained."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch

from axolotl import console
from axolotl.config import Config
from axolotl.distributed.world import detect_hardware
from axolotl.errors import ConfigError, UserError
from axolotl.inference.benchmarks import load_tasks, run_benchmarks, scores, table
from axolotl.inference.loading import Loaded, load_trained
from axolotl.model.files import ADAPTER_CONFIG
from axolotl.run.preprocess import carry_template
from axolotl.run.ready import named_on_purpose, ready, refuse_untrained_adapter, told_with_places

RESULT = "lm_eval.json"


@told_with_places
def lm_eval(
    cfg: Config,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool | None = None,
    system: str | None = None,
    untrained: bool = False,
) -> dict[str, Any]:
    """Runs `lm_eval_tasks` on `lm_eval_model`, else on what was trained. Returns the figures.

    They are shown as a table, printed as one JSON line, and written with all that the harness says to
    `{output_dir}/lm_eval.json`. Tasks and their rows are looked for before the model is loaded. Raises a UserError for
    whatever the user can mend.
    """
    if not cfg.method.lm_eval_tasks:
        raise ConfigError(
            cfg.problem(
                "`lm_eval_tasks` names no task.",
                "For example: `lm_eval_tasks: [arc_easy, hellaswag]`, or --lm-eval-tasks '[arc_easy]'",
                "lm_eval_tasks",
                kind="missing",
            )
        )
    if untrained and cfg.method.lm_eval_model:
        raise ConfigError(
            cfg.problem(
                "`--untrained` asks for the base model, `lm_eval_model` for another.",
                "Leave one of them out.",
                "lm_eval_model",
                kind="conflict",
            )
        )
    refuse_untrained_adapter(cfg, untrained)
    hardware = detect_hardware()
    cfg = ready(cfg, hardware)
    manager, tasks = load_tasks(cfg.method.lm_eval_tasks or ())
    loaded = _model(cfg, untrained)
    chat = loaded.prompter.kind == "chat" if apply_chat_template is None else apply_chat_template
    if chat:
        carry_template(cfg, loaded.tokenizer)
    if chat and not loaded.tokenizer.chat_template:
        raise ConfigError("`--apply-chat-template`, but there is no chat template.", "Set `chat_template`.")
    console.note(
        f"{loaded.source}: rows are asked {'through the chat template' if chat else 'as plain text'}."
    )
    result = run_benchmarks(
        loaded,
        manager,
        tasks,
        batch_size=cfg.method.lm_eval_batch_size or 8,
        limit=limit,
        shots=num_fewshot,
        chat=chat,
        system=system,
    )
    found = scores(result)
    for line in table(found):
        console.note(line)
    figures: dict[str, Any] = {"model": loaded.source, "chat_template": chat, "limit": limit, "scores": {}}
    for score in found:
        name = f"{score.metric},{score.filter}" if score.filter else score.metric
        figures["scores"].setdefault(score.task, {})[name] = round(score.value, 6)
    folder = Path(cfg.output.output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    whole = json.dumps({**figures, "harness": result}, indent=2, default=str) + "\n"
    (folder / RESULT).write_text(whole, encoding="utf-8")
    console.out(json.dumps(figures))
    return figures


def after_training(cfg: Config) -> None:
    """The benchmarks at the end of a run, where the config asks for them. What fails is told, and costs no run."""
    if not (cfg.method.lm_eval_tasks and cfg.method.lm_eval_post_train):
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        lm_eval(cfg.with_values({"lm_eval_model": None}, {"lm_eval_model": "what was just trained"}))
    except Exception as error:
        text = (
            error.problems[0].message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        )
        config = cfg.sources[0] if cfg.sources else "config.yml"
        console.warn(f"The benchmarks did not run: {text} Later: axolotl lm-eval {config}")


def _model(cfg: Config, untrained: bool) -> Loaded:
    named = cfg.method.lm_eval_model
    model, adapter = cfg.model, cfg.adapter
    if named and (Path(named).expanduser() / ADAPTER_CONFIG).is_file():
        adapter = adapter.model_copy(update={"lora_model_dir": named})
    elif named:
        other = {
            "base_model": named,
            "base_model_config": None,
            "tokenizer_config": None,
            "revision_of_model": None,
        }
        model = model.model_copy(update=other)
        untrained = True
    return load_trained(
        model,
        adapter,
        cfg.data,
        detect_hardware(),
        cfg.output.output_dir,
        require_training=not named_on_purpose(cfg),
        untrained=untrained,
    )
