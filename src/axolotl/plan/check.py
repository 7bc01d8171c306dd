"""Config against components: names of optimizers, schedules, adapters, dataset types and chat templates.

Imports no torch: registries know their names from the source.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from axolotl import config
from axolotl.config import Config
from axolotl.config.keys import did_you_mean, nearest
from axolotl.config.load import Overrides, Source
from axolotl.config.plugins import own_plugins
from axolotl.data.formats import check_type
from axolotl.errors import Problem
from axolotl.optim.registry import optimizers, schedules
from axolotl.registry import PACKAGE_ROOT, Registry

# The others go through PEFT by name; each of them was trained and merged.
ADAPTERS = (
    "lora", "qlora", "fourierft", "hra", "ia3", "loha", "lokr", "miss", "oft", "randlora", "road", "shira", "vera",
)  # fmt: skip
# Kinds of adapters that files carry, and what serves instead.
ADAPTERS_LATER = {
    "llama-adapter": "Use `adapter: lora`.",
    "mora": "Use `adapter: lora`.",
}
ADAPTER_FLAGS = {
    "dora": "Write `adapter: lora` and `peft_use_dora: true`.",
    "rslora": "Write `adapter: lora` and `peft_use_rslora: true`.",
    "full": "Delete the line: without `adapter` the whole model is trained.",
    "none": "Delete the line: without `adapter` the whole model is trained.",
}
# Names that people bring from other tools.
MEANT = {
    "adam": "adamw_torch_fused",
    "adamw": "adamw_torch_fused",
    "adamw8bit": "adamw_8bit",
    "adam8bit": "adamw_8bit",
    "adam_8bit": "adamw_8bit",
    "paged_adamw8bit": "paged_adamw_8bit",
    "cosine_annealing": "cosine",
    "cosineannealinglr": "cosine",
    "linear_with_warmup": "linear",
    "cosine_with_warmup": "cosine",
}
# Schedules that files carry and that are gone.
SCHEDULES_GONE = ("log_sweep",)
# Keys that some optimizers or schedules read; which ones do stands at their registration.
_OF_OPTIMIZERS = ("adam_beta1", "adam_beta2", "adam_beta3", "adam_epsilon", "adam_epsilon2")
_OF_SCHEDULES = ("cosine_min_lr_ratio", "cosine_constant_lr_ratio", "lr_quadratic_warmup", "lr_div_factor")
TEMPLATES = PACKAGE_ROOT / "data" / "templates"
_FALLBACK = "tokenizer_default_fallback_"


def load_config(
    sources: Source | Sequence[Source], overrides: Overrides | None = None, *, verb: str = "train"
) -> Config:
    """`axolotl.config.load_config`, and every name checked against the components; all problems in one go.

    Raises ConfigError.
    """
    return config.load_config(sources, overrides, verb=verb, checks=(component_problems,))


def component_problems(cfg: Config, *, complete: bool = False) -> list[Problem]:
    """Names in the config that no component answers to, or that one is known for but not built yet.

    A name that nobody knows may be one of the config's own plugins, unless these are imported: `complete`.
    """
    all_known = complete or not own_plugins(cfg)
    return [
        *_named(cfg, "optimizer", optimizers, all_known),
        *_named(cfg, "lr_scheduler", schedules, all_known),
        *_unread(cfg, "optimizer", optimizers, _OF_OPTIMIZERS),
        *_unread(cfg, "lr_scheduler", schedules, _OF_SCHEDULES),
        *_schedule_arguments(cfg),
        *_adapter(cfg, all_known),
        *_formats(cfg, all_known),
        *_templates(cfg),
    ]


def _named(cfg: Config, key: str, registry: Registry[Any], all_known: bool) -> Iterator[Problem]:
    name = cfg.get(key)
    if name in registry:
        reason = registry.describe(name).facts.get("unavailable")
        if reason:
            yield cfg.problem(
                f"`{key}: {name}` is known, but not available yet: {reason}.",
                f"Choose another, such as `{key}: {type(cfg.section(key)).model_fields[key].default}`.",
                key,
                kind="unavailable",
            )
    elif key == "lr_scheduler" and name in SCHEDULES_GONE:
        yield cfg.problem(
            f"`{key}: {name}` is gone.", f"Choose another, such as `{key}: cosine`.", key, kind="removed"
        )
    elif all_known:
        usable = [each for each in registry if "unavailable" not in registry.describe(each).facts]
        yield _unknown(cfg, key, name, usable)


def _unread(cfg: Config, key: str, registry: Registry[Any], keys: Sequence[str]) -> Iterator[Problem]:
    """Keys that are written and that the chosen optimizer or schedule does not read."""
    name = cfg.get(key)
    read = registry.describe(name).facts.get("keys") if name in registry else None
    if read is None:
        return  # a plugin's, which does not say
    for each in keys:
        if cfg.is_set(each) and cfg.get(each) and each not in read:
            yield cfg.problem(
                f"`{each}` has no effect on `{key}: {name}`.", f"Delete `{each}`.", each, key, kind="warning"
            )


def _schedule_arguments(cfg: Config) -> Iterator[Problem]:
    name = cfg.optim.lr_scheduler
    takes = schedules.describe(name).facts.get("kwargs") if name in schedules else None
    if takes is None:
        return  # it refuses what it does not take
    for each in cfg.optim.lr_scheduler_kwargs or ():
        if each not in takes:
            near = did_you_mean(nearest(each, takes))
            yield cfg.problem(
                f"`lr_scheduler_kwargs.{each}` has no effect on `lr_scheduler: {name}`.",
                near or f"Delete `{each}`.",
                f"lr_scheduler_kwargs.{each}",
                "lr_scheduler",
                kind="warning",
            )


def _unknown(cfg: Config, key: str, name: str, known: Sequence[str]) -> Problem:
    meant = MEANT.get(name.lower().replace("-", "_"), "")
    close = nearest(name, known) or difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.6)
    near = did_you_mean([meant] if meant in known else close)
    listed = ", ".join(f"`{each}`" for each in known)
    message = f"`{key}` is `{name}`; it takes one of {listed}."
    if len(known) > 20:
        message = f"`{key}` is `{name}`, which is not known."
    return cfg.problem(message, near or f"Write one of {listed}.", key)


def _adapter(cfg: Config, all_known: bool) -> Iterator[Problem]:
    name = cfg.adapter.adapter
    if name is None or name in ADAPTERS:
        return
    if name in ADAPTERS_LATER:
        message = f"`adapter: {name}` is known, but not available yet."
        yield cfg.problem(message, ADAPTERS_LATER[name], "adapter", kind="unavailable")
    elif name in ADAPTER_FLAGS:
        known = " or ".join(f"`{each}`" for each in ADAPTERS[:2])
        yield cfg.problem(f"`adapter` is `{name}`; it takes {known}.", ADAPTER_FLAGS[name], "adapter")
    elif all_known:
        yield _unknown(cfg, "adapter", name, ADAPTERS)


def _formats(cfg: Config, all_known: bool) -> Iterator[Problem]:
    if cfg.is_set("rl") or cfg.is_set("reward_model") or cfg.is_set("process_reward_model"):
        # Their types are another family's; the method itself is told about already.
        return
    for name in ("datasets", "test_datasets", "pretraining_dataset"):
        for index, entry in enumerate(getattr(cfg.data, name)):
            key = f"{name}[{index}].type"
            if entry.type == "pretrain" and name == "pretraining_dataset":
                continue
            if entry.type == "pretrain":
                yield cfg.problem(
                    f"`{key}` is `pretrain`, a format of `pretraining_dataset`.",
                    "Write `type: completion`, or move the entry to `pretraining_dataset:`.",
                    key,
                )
                continue
            found = check_type(entry, cfg.place(key))
            if found is not None and (all_known or found.kind != "invalid_value"):
                message = found.message[:1].upper() + found.message[1:]
                yield cfg.problem(message, found.remedy, key, kind=found.kind)


def _templates(cfg: Config) -> Iterator[Problem]:
    bundled = template_names()
    at = [("chat_template", cfg.data.chat_template)]
    for name in ("datasets", "test_datasets"):
        for index, entry in enumerate(getattr(cfg.data, name)):
            at.append((f"{name}[{index}].chat_template", entry.chat_template))
    for key, template in at:
        if template is None or template in ("tokenizer_default", "jinja"):
            continue
        if template.removeprefix(_FALLBACK) not in bundled:
            near = nearest(template, [*bundled, "tokenizer_default", "jinja"])
            remedy = did_you_mean(near) or f"Known: {', '.join(f'`{n}`' for n in bundled)}."
            if "{" in template or Path(template).suffix == ".jinja":
                remedy = (
                    "Write `chat_template: jinja`, and the template or its file under `chat_template_jinja:`."
                )
            yield cfg.problem(
                f"`{key}` is `{template}`; it takes the name of a template, `tokenizer_default` or `jinja`.",
                remedy,
                key,
            )


def template_names() -> list[str]:
    """The chat templates that come with this package."""
    return sorted(file.stem for file in TEMPLATES.glob("*.jinja"))
