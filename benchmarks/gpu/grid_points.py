"""Which runs the memory grid has, in which order, and which of them are held out."""

from __future__ import annotations

import hashlib
from typing import Any

SMALL = ("llama-1b", "qwen3-1.7b", "gemma-2b", "llama-3b", "qwen3-4b")
LARGE = ("llama-8b", "qwen3-8b", "gemma-7b")
TURNS = 6
"""Runs of each model."""

SALT = 43
"""Chosen before anything was measured, as the first with which each model, each adapter and each way is among those held out."""

FUSED = {"fused_kernels": True}
LORA_KERNELS = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True}
LOSS = {"cut_cross_entropy": True}
ELEMENTWISE = {"liger_rms_norm": True, "liger_rope": True, "liger_glu_activation": True}
TWICE = {"gradient_accumulation_steps": 2}

Kind = tuple[str | None, int, int, bool, bool, dict[str, Any]]
"""Adapter, rows, tokens of a row, recompute, packed, further keys."""

_OF_SMALL: tuple[Kind, ...] = (
    (None, 2, 2048, False, False, {}),
    ("lora", 1, 32768, True, False, FUSED),
    ("qlora", 1, 16384, True, True, {}),
    ("lora", 4, 2048, False, False, {}),
    (None, 1, 8192, True, False, LOSS | TWICE),
    ("lora", 2, 4096, False, False, FUSED),
    ("qlora", 2, 4096, False, False, LORA_KERNELS),
    (None, 4, 1024, False, False, FUSED),
    ("lora", 1, 16384, True, False, {}),
    ("lora", 1, 8192, False, True, ELEMENTWISE | LOSS),
)
_OF_LARGE: tuple[Kind, ...] = (
    ("lora", 1, 4096, False, False, {}),
    (None, 1, 2048, True, False, FUSED),
    ("qlora", 1, 16384, True, True, LOSS),
    ("lora", 1, 8192, False, True, FUSED),
    ("qlora", 4, 1024, False, False, {}),
    ("lora", 1, 32768, True, False, FUSED),
    ("lora", 2, 2048, False, False, LORA_KERNELS),
    ("lora", 2, 4096, True, False, TWICE),
    ("qlora", 1, 4096, False, False, FUSED),
    ("lora", 1, 16384, True, False, {}),
)


def grid() -> list[dict[str, Any]]:
    """All runs, in the order in which they are made.

    Each model takes its next kind in turn, so that whatever has been measured when it is broken off holds all models.
    Of three runs that follow each other one is held out; a hash of its name decides which.
    """
    found = []
    for turn in range(TURNS):
        for models, kinds in ((SMALL, _OF_SMALL), (LARGE, _OF_LARGE)):
            for place, model in enumerate(models):
                # Six of the ten kinds for each model; the small ones take every kind equally often.
                found.append(_point(model, *kinds[(TURNS * place + turn) % len(kinds)]))
    for first in range(0, len(found), 3):
        group = found[first : first + 3]
        group[_number(group[0]["name"]) % len(group)]["held_out"] = True
    return found


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{SALT} {text}".encode()).digest()[:4], "big")


def _point(
    model: str,
    adapter: str | None,
    rows: int,
    length: int,
    recompute: bool,
    packed: bool,
    keys: dict[str, Any],
) -> dict[str, Any]:
    rest = {k: v for k, v in keys.items() if k != "gradient_accumulation_steps"}
    words = [model, adapter or "full", f"{rows}x{length}", "recompute" if recompute else "keep"]
    words += ["packed"] * packed + (["fused"] if rest == FUSED else [*rest] and [_short(rest)])
    return {
        "name": " ".join(words),
        "model": model,
        "adapter": adapter,
        "rows": rows,
        "length": length,
        "recompute": recompute,
        "packed": packed,
        "accumulation": keys.get("gradient_accumulation_steps", 1),
        "keys": rest,
        "held_out": False,
    }


def _short(keys: dict[str, Any]) -> str:
    names = {"lora_mlp_kernel": "lora-kernels", "liger_rms_norm": "elementwise", "cut_cross_entropy": "cce"}
    return "+".join(short for key, short in names.items() if key in keys)
