"""The `plugins:` key: names that old files carry are features of ours; other names are the user's own modules."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

from axolotl.config.config import Config
from axolotl.config.keys import did_you_mean, nearest
from axolotl.config.unbuilt import way_without
from axolotl.errors import ConfigError, EnvironmentProblem

GROUP = "axolotl.plugins"

# The part of `axolotl.integrations.<name>...` that names the plugin, and the feature of ours that it stands for.
# None: built in, its keys work without it. A text: a feature that is not built yet.
INTEGRATIONS: dict[str, str | None] = {
    "liger": None,
    "cut_cross_entropy": None,
    "kernels": None,
    "context_parallel": "ring and Ulysses attention",
    "coreweave": "handing weights to CoreWeave while training",
    "densemixer": "DenseMixer",
    "diffusion": "diffusion language models",
    "diffusion_decision": "diffusion language models",
    "expert_parallel": "expert parallelism",
    "grokfast": "Grokfast",
    "hatchery": "training on a remote service",
    "kd": "distillation",
    "llm_compressor": "sparse training with llm-compressor",
    "lm_eval": None,
    "mixlora": "mixtures of adapters (MixLoRA)",
    "mora": "MoRA",
    "nemo_gym": "NeMo Gym",
    "spectrum": "Spectrum",
    "swanlab": "SwanLab",
}
_INTEGRATION = re.compile(r"axolotl\.integrations\.(\w+)(\.\w+)*$")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")


def integration(name: str) -> str | None:
    """The short name of a plugin that old files carry; None for any other name."""
    found = _INTEGRATION.match(name)
    return found.group(1) if found else name if name in INTEGRATIONS else None


def has_plugin(cfg: Config, short: str) -> bool:
    """Whether `plugins:` lists this one of the names that old files carry."""
    return any(integration(name) == short for name in cfg.method.plugins or ())


def own_plugins(cfg: Config) -> list[str]:
    """The names that stand for the user's own modules or for installed entry points."""
    return [name for name in cfg.method.plugins or () if integration(name) is None]


def entry_points() -> dict[str, str]:
    """The plugins that installed packages announce: name and module."""
    return {each.name: each.value for each in importlib.metadata.entry_points(group=GROUP)}


def complaint(name: str) -> tuple[str, str, str] | None:
    """What is wrong with one plugin name, as (kind, message, remedy); None when it can be used. Imports nothing."""
    short = integration(name)
    if short is not None:
        if short not in INTEGRATIONS:
            return (
                "invalid_value",
                f"`{name}` is not a known plugin.",
                did_you_mean(nearest(short, INTEGRATIONS)) or f"Known: {', '.join(INTEGRATIONS)}.",
            )
        feature = INTEGRATIONS[short]
        if feature is not None:
            return (
                "unavailable",
                f"The plugin `{name}` stands for {feature}, which is not available yet.",
                way_without(feature),
            )
        return None
    if name in entry_points():
        return None
    if not _DOTTED.match(name):
        return (
            "invalid_value",
            f"`{name}` is not a plugin: it is no dotted name of a module.",
            "Write it as `package.module` or `package.module.Class`.",
        )
    first = name.partition(".")[0]
    here = Path(first)
    if first in sys.modules or here.with_suffix(".py").is_file() or here.is_dir():
        return None
    if importlib.util.find_spec(first) is None:
        known = [*INTEGRATIONS, *entry_points()]
        return (
            "invalid_value",
            f"The plugin `{name}` is not installed: there is no module `{first}`.",
            did_you_mean(nearest(name, known)) or "Install its package, or delete the line.",
        )
    return None


def import_plugins(cfg: Config) -> None:
    """Imports the user's own plugins, which register what they bring. Raises ConfigError for one that is not there.

    An error inside a plugin's module is told as an EnvironmentProblem with its cause.
    """
    named = entry_points()
    if own_plugins(cfg):  # the console script, unlike `python -m`, does not look in the working folder
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.insert(0, here)
    for index, name in enumerate(cfg.method.plugins or ()):
        if integration(name) is not None:
            continue
        target = named.get(name, name).replace(":", ".")
        module, _, attribute = target.rpartition(".")
        key = f"plugins[{index}]"
        try:
            try:
                importlib.import_module(target)
            except ModuleNotFoundError as error:
                if not module or error.name not in (target, None):
                    raise
                if not hasattr(importlib.import_module(module), attribute):
                    raise
        except ModuleNotFoundError as error:
            missing = error.name or target
            if f"{target}.".startswith(f"{missing}."):
                message = f"The plugin `{name}` cannot be imported: there is no module `{missing}`."
                remedy = "Install its package, or delete the line."
            else:
                message = f"The plugin `{name}` cannot be imported: it imports `{missing}`, and there is no such module."
                remedy = f"Install what brings `{missing}`, or correct the plugin."
            raise ConfigError(cfg.problem(message, remedy, key)) from None
        except Exception as error:
            message = f"The plugin `{name}` fails while it is imported: {type(error).__name__}: {error}"
            raise EnvironmentProblem(
                cfg.problem(message, "Mend the plugin, or delete the line.", key, kind="environment")
            ) from error
