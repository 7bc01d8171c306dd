"""`axolotl doctor config.yml`: where generation will stop, and whether tokenizer, template and configs agree on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from axolotl.plan.machine import Finding


@dataclass(frozen=True)
class Ends:
    """What each part of a model says of where a text ends. Ids; texts where they are known."""

    tokenizer_eos: tuple[int, str] | None
    config_eos: tuple[int, ...]
    generation_eos: tuple[int, ...] | None
    """None where there is no generation_config.json."""
    template: tuple[str, ...]
    """The texts with which the config's templates end an answer."""
    vocabulary: int
    """Rows of the model's embeddings."""


def ids_of(value: Any) -> tuple[int, ...]:
    """`eos_token_id` as it stands in a config: nothing, one, or several."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def compare_ends(ends: Ends, tokenizer: Any, labels: Sequence[np.ndarray]) -> list[Finding]:
    """What is wrong or only repaired, each with the key or file that mends it. `labels` are those of a few rows."""
    found: list[Finding] = []
    stops: dict[str, int] = {}
    for text in ends.template:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1:
            stops[text] = ids[0]
        else:
            found.append(
                Finding(
                    "stop",
                    "problem",
                    f"The template ends a turn with `{text}`, which is {len(ids)} tokens in this vocabulary: generation "
                    "cannot stop at it.",
                    f'Write `special_tokens: {{eos_token: "{text}"}}`, or choose the template that the model was made with.',
                    "AX1203",
                )
            )
    eos = ends.tokenizer_eos
    if eos is None:
        found.append(
            Finding(
                "stop",
                "problem",
                "The tokenizer names no EOS token.",
                "Write `special_tokens: {eos_token: ...}`.",
                "AX1203",
            )
        )
    wanted = set(stops.values()) | ({eos[0]} if eos else set())
    beyond = [i for i in sorted(wanted | set(ends.config_eos)) if i >= ends.vocabulary]
    if beyond:
        found.append(
            Finding(
                "stop",
                "problem",
                f"Token {beyond[0]} ends a text, but the model has only {ends.vocabulary:,} embeddings.",
                "Tokenizer and model do not belong together: set `tokenizer_config`, or copy the model again.",
                "AX1203",
            )
        )
    for name, has in (("config.json", ends.config_eos), ("generation_config.json", ends.generation_eos)):
        if has is None:
            if stops:
                found.append(
                    Finding(
                        "stop", "note", f"The base model has no {name}; training writes one with these stops."
                    )
                )
            continue
        lacking = [f"`{text}` ({i})" for text, i in stops.items() if i not in has]
        if lacking and name == "generation_config.json":
            found.append(
                Finding(
                    "stop",
                    "note",
                    f"The base model's {name} stops at {_listed(has)}, not at {', '.join(lacking)}, with which the template "
                    "ends a turn. The trained model's will stop at all of them.",
                )
            )
        if eos and has and eos[0] not in has:
            found.append(
                Finding(
                    "stop",
                    "note",
                    f"The base model's {name} says EOS is {_listed(has)}, the tokenizer {eos[0]} (`{eos[1]}`). Training "
                    "saves the tokenizer's beside them.",
                )
            )
    if eos and stops and eos[0] not in stops.values():
        text = next(iter(stops))
        found.append(
            Finding(
                "stop",
                "note",
                f"The tokenizer's EOS is `{eos[1]}`, the template ends a turn with `{text}`. Generation here stops at both; "
                "a program that knows the tokenizer alone will not.",
                f'Write `special_tokens: {{eos_token: "{text}"}}` to make them one.',
            )
        )
    trained = wanted and any(np.isin(row, list(wanted)).any() for row in labels)
    if labels and not trained:
        found.append(
            Finding(
                "stop",
                "problem",
                f"In {len(labels)} rows no trained token is a stop token, so the model will not learn to end.",
                "Set `train_on_eos: turn`, or use a template that ends each turn.",
                "AX1204",
            )
        )
    if not any(f.state == "problem" for f in found):
        names = [f"`{text}` ({i})" for text, i in stops.items()]
        if eos and eos[0] not in stops.values():
            names.append(f"`{eos[1]}` ({eos[0]})")
        found.insert(0, Finding("stop", "ok", f"generation stops at {' and '.join(names)}"))
    return found


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids)) or "nothing"
