"""Whether a model on this machine can be divided as the config asks, told before it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from axolotl.config import Config
from axolotl.distributed.tensor import plan_problem, uneven_problem
from axolotl.errors import ModelError, Problem
from axolotl.model.context import heads_problem
from axolotl.model.files import local_folder, read_json


def check_heads(cfg: Config) -> Iterator[Problem]:
    """The attention heads of a model on this machine, against the processes that would share them."""
    facts = facts_of(cfg)
    context, tensor = cfg.distributed.context_parallel_size or 1, cfg.distributed.tensor_parallel_size or 1
    if tensor > 1 and facts:
        yield from filter(None, [uneven_problem(facts, tensor), _without_plan(cfg, facts)])
    heads = facts.get("num_attention_heads")
    if context < 2 or not isinstance(heads, int):
        return
    if heads % tensor == 0 and (heads // tensor) % context:
        yield heads_problem(heads // tensor, context)


def _without_plan(cfg: Config, facts: dict[str, Any]) -> Problem | None:
    """A kind of model whose matrices nothing says how to divide, as far as transformers itself has its code."""
    kind = facts.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING or cfg.model.trust_remote_code:
        return None  # told when it is loaded
    return plan_problem(CONFIG_MAPPING[kind].base_model_tp_plan, f"a model of type `{kind}`")


def facts_of(cfg: Config) -> dict[str, Any]:
    """What `config.json` of a text model on this machine says; empty where it is elsewhere or damaged."""
    folder = local_folder(cfg.model.base_model_config or cfg.model.base_model)
    if folder is None or not (folder / "config.json").is_file():
        return {}
    try:
        whole = read_json(folder / "config.json")
    except ModelError:
        return {}  # told with the model
    inner = whole.get("text_config")
    return {
        **whole,
        **(inner if isinstance(inner, dict) else {}),
        **(cfg.model.overrides_of_model_config or {}),
    }
