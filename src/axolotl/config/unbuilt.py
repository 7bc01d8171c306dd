"""Keys that are accepted although something about them is missing: features that cannot run yet, and keys without effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from axolotl.config.config import Config
from axolotl.config.keys import SECTIONS
from axolotl.config.old_keys import is_off
from axolotl.config.section import Block, default_of, facts
from axolotl.errors import Problem

_WITHOUT = {
    "preference tuning": "Nothing here learns from pairs yet. To train on the preferred answers alone, delete `rl` and the "
    "keys of pairs, and choose a `type` that reads these answers.",
    "reinforcement learning": "Nothing here learns from rewards yet. What trains are given answers: without `rl`, and with a "
    "`type` such as `chat_template`.",
    "reward models": "Nothing here trains models that score yet; deleting the line would train one that writes.",
    "NeMo Gym": "Nothing here learns from rewards yet; deleting the line leaves nothing to learn from.",
    "training on a remote service": "Delete the line, and the `rl` beside it, to train supervised on this machine.",
    "diffusion language models": "Nothing takes its place: deleting the line would train a model that writes from left to "
    "right.",
    "multimodal training": "Delete the line to train on the text alone, with rows that hold no images or sound.",
    "training on unprepared rows": "Delete the line: rows are prepared before they are trained.",
    "ring and Ulysses attention": "Write `context_parallel_size:` with the number of devices that share a row.",
    "export by a key": "Delete the line; `axolotl export config.yml` writes the finished model as GGUF.",
    "distillation": "Nothing takes its place: without it the rows alone are learned, not the teacher.",
}


def way_without(feature: str, first: str = "") -> str:
    """What to do about a key of a feature that is not built. `first`: the key of it for which that has been said."""
    if first and feature in _WITHOUT:
        return f"It goes with `{first}`: delete it too if you do without that."
    return _WITHOUT.get(feature, "Delete the line to train without it.")


def _in_use(cfg: Config, state: str) -> Iterator[tuple[str, Any, str]]:
    """Keys of a state that the user set to something else than off or the default: key, value, feature or reason."""
    for section in SECTIONS.values():
        for key in section.model_fields:
            if cfg.is_set(key):
                yield from _used(section, key, key, cfg.get(key), state)


def _used(
    model: type[BaseModel], name: str, key: str, value: Any, state: str
) -> Iterator[tuple[str, Any, str]]:
    said = facts(model, name)
    if said.get("state") == state and not is_off(value) and value != default_of(model, name):
        yield key, value, said["feature"]
    for index, block in enumerate(value if isinstance(value, list) else [value]):
        if isinstance(block, Block):
            at = f"{key}[{index}]" if isinstance(value, list) else key
            for inner in type(block).model_fields:
                if inner in block.model_fields_set:
                    yield from _used(type(block), inner, f"{at}.{inner}", getattr(block, inner), state)


def unbuilt(cfg: Config) -> list[Problem]:
    """One `unavailable` problem for each key in use that is checked, but whose feature `train` cannot run yet."""
    return [
        cfg.problem(
            f"`{key}` is valid, but {feature} is not available yet.",
            way_without(feature),
            key,
            kind="unavailable",
        )
        for key, value, feature in _in_use(cfg, "validated")
        # One device on an axis is no axis.
        if value is True or value not in (0, 1)
    ]


def idle_keys(cfg: Config) -> list[Problem]:
    """A warning for each key in use that does nothing."""
    return [
        cfg.problem(f"`{key}` has no effect: {reason}.", "", key, kind="warning")
        for key, _, reason in _in_use(cfg, "idle")
    ]
