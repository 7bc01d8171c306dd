"""Brings a document with old spellings to today's keys, by the tables of `old_keys`."""

from __future__ import annotations

from typing import Any

from axolotl.config.keys import owner
from axolotl.config.old_blocks import datasets_of_old, fsdp_of_old, tokens_of_old
from axolotl.config.old_keys import (
    ALIASES,
    BITSANDBYTES,
    CHOICES,
    LEFTOVER,
    OFFLOADING,
    REMOVED,
    RENAMED,
    VALUES,
    is_off,
)
from axolotl.config.section import off
from axolotl.config.yaml_file import Document, Path, dotted
from axolotl.errors import Kind, Problem


class Renaming:
    """Brings one merged document to today's keys, in place; `problems` holds what there is to say about it.

    `layer(key)` numbers the source (file or override) that a top-level key came from: two spellings of one thing are a
    conflict within a source, while a later source simply wins.
    """

    def __init__(self, document: Document, layers: dict[str, int]) -> None:
        self.document, self.layers = document, layers
        self.values, self.spots = document.values, document.spots
        self.problems: list[Problem] = []
        self.typed: dict[str, str] = {}
        """Today's keys that the user wrote in another way, and how (both dotted)."""

    def tell(self, kind: Kind, message: str, remedy: str, *paths: Path) -> None:
        places = tuple(self.spots[p].key for p in paths if p in self.spots)
        self.problems.append(Problem(message, remedy, kind, tuple(dotted(p) for p in paths), places))

    def warn(self, old: Path, message: str, remedy: str = "") -> None:
        self.tell("warning", f"`{dotted(old)}` {message}", remedy, old)

    def drop(self, key: str) -> Any:
        return self.values.pop(key)

    def move(self, old: str, new: str, value: Any) -> bool:
        """Puts the value under the new key, unless the new key is written too. False where it is not moved."""
        if self.values.get(new) is not None and off(owner(new), new, value):
            return False
        if new in self.values and self.values[new] is not None:
            newer, older = self.layers.get(new, 0), self.layers.get(old, 0)
            if newer == older:
                self.tell(
                    "conflict",
                    f"`{old}` and `{new}` say the same thing twice.",
                    f"Keep `{new}` alone.",
                    (old,),
                    (new,),
                )
                return False
            if newer > older:
                return False
        for path in [p for p in self.spots if p[0] == new]:
            del self.spots[path]
        for path in [p for p in self.spots if p[0] == old]:
            self.spots[(new, *path[1:])] = self.spots[path]
        self.values[new] = value
        self.layers[new] = self.layers.get(old, 0)
        return True

    def rename(self, old: str, new: str, value: Any) -> bool:
        """The same for two names of one key: problems are told with the name that the user wrote."""
        moved = self.move(old, new, value)
        if moved:
            self.typed[new] = old
        return moved

    def run(self) -> list[Problem]:
        """Applies every table. Returns the problems, warnings among them."""
        for old, new in ALIASES.items():
            if old in self.values:
                self.rename(old, new, self.drop(old))
        for old, new in RENAMED.items():
            if old in self.values:
                value = self.drop(old)
                if not is_off(value) and self.rename(old, new, value):
                    self.warn((old,), f"is called `{new}` today.", f"Write `{new}:` instead.")
        self.choices()
        for old, remedy in REMOVED.items():
            if old in self.values and not is_off(self.drop(old)):
                self.tell("removed", f"`{old}` is gone.", remedy, (old,))
        for old, reason in LEFTOVER.items():
            if old in self.values and not is_off(self.drop(old)):
                self.warn((old,), f"has no effect: {reason}.", "Delete the line.")
        if "save_safetensors" in self.values and self.drop("save_safetensors") is False:
            self.tell(
                "removed",
                "`save_safetensors: false` is gone: weights are always saved as safetensors.",
                "Delete the line.",
                ("save_safetensors",),
            )
        for key, (old_value, value) in VALUES.items():
            if self.values.get(key) == old_value:
                self.values[key] = value
                self.warn(
                    (key,), f"`{old_value}` is called `{value}` today.", f"Write `{key}: {value}` instead."
                )
        self.gc_steps()
        self.gradient_checkpointing()
        if self.values.get("bfloat16") == "auto":
            self.drop("bfloat16")
            self.warn(
                ("bfloat16",),
                "takes true or false; `bf16` is what takes `auto`, and does so when it is not set.",
                "Delete the line, or write `bf16: auto` instead.",
            )
        self.bitsandbytes()
        tokens_of_old(self)
        fsdp_of_old(self)
        datasets_of_old(self)
        return self.problems

    def choices(self) -> None:
        """Booleans of old, each of which chose one value of a new key."""
        chosen: dict[str, str] = {}
        for old, (new, value) in CHOICES.items():
            if old not in self.values:
                continue
            wanted = self.drop(old)
            if wanted not in (True, "true", 1):
                if not is_off(wanted) and wanted not in ("false", 0):
                    self.tell(
                        "invalid_value",
                        f"`{old}` is `{wanted}`; it takes true or false.",
                        f"Write `{new}: {value}` instead.",
                        (old,),
                    )
                continue
            if new in chosen:
                earlier = chosen[new]
                if self.layers.get(earlier, 0) >= self.layers.get(old, 0):
                    self.warn(
                        (old,), f"has no effect beside `{earlier}`.", f"Write `{new}:` instead of both."
                    )
                    continue
            named = self.values.get(new)
            if isinstance(named, str) and "/" in named and value.split("_")[0] in named:
                # A kernel on the Hub of the same kind: the more exact of the two is meant.
                self.warn((old,), f"has no effect beside `{new}: {named}`.", "Delete the line.")
                continue
            if self.rename(old, new, value):
                chosen[new] = old

    def bitsandbytes(self) -> None:
        """Options of its configuration that stand at the top level go into `bnb_config_kwargs`."""
        block = self.values.get("bnb_config_kwargs")
        for old in BITSANDBYTES:
            if old not in self.values:
                continue
            value = self.drop(old)
            if value is None:
                continue
            if not isinstance(block, dict):
                if block is not None:
                    return
                self.values["bnb_config_kwargs"] = block = {}
                self.spots[("bnb_config_kwargs",)] = self.spots[(old,)]
                self.layers["bnb_config_kwargs"] = self.layers.get(old, 0)
                self.typed["bnb_config_kwargs"] = old
            if block.setdefault(old, value) != value:
                self.tell(
                    "conflict",
                    f"`{old}` and `bnb_config_kwargs.{old}` contradict each other.",
                    f"Delete `{old}`.",
                    (old,),
                    ("bnb_config_kwargs", old),
                )
                continue
            self.spots[("bnb_config_kwargs", old)] = self.spots[(old,)]
            self.warn((old,), "stands under `bnb_config_kwargs` today.", "Write it there.")

    def gc_steps(self) -> None:
        steps = self.values.pop("gc_steps", None)
        if steps is not None:
            for new in ("torch_empty_cache_steps", "gc_collect_steps"):
                if self.values.get(new) is None and not (new == "torch_empty_cache_steps" and steps == -1):
                    self.move("gc_steps", new, steps)
            self.warn(("gc_steps",), "is two keys today: `torch_empty_cache_steps` and `gc_collect_steps`.")

    def gradient_checkpointing(self) -> None:
        """`selective` and `offload` are short for another key; `offload_disk` and `unsloth` are old names."""
        way = self.values.get("gradient_checkpointing")
        if way == "selective":
            self.values["gradient_checkpointing"] = True
            if not self.values.get("selective_checkpointing"):
                self.move("gradient_checkpointing", "selective_checkpointing", True)
        elif way in OFFLOADING:
            self.values["gradient_checkpointing"] = True
            if self.values.get("activation_offloading") is None:
                self.move(
                    "gradient_checkpointing",
                    "activation_offloading",
                    "disk" if way == "offload_disk" else True,
                )
            if way != "offload":
                to = "disk" if way == "offload_disk" else "true"
                self.warn(
                    ("gradient_checkpointing",),
                    f"`{way}` is called `activation_offloading: {to}` today.",
                    f"Write `gradient_checkpointing: true` and `activation_offloading: {to}` instead.",
                )
