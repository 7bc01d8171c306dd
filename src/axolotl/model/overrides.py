"""Rewrites reserved tokens of a tokenizer in place (`added_tokens_overrides`): same id, new text, no new row."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from axolotl.errors import ModelError, Problem


def rewrite_added_tokens(
    tokenizer: PreTrainedTokenizerBase, overrides: Mapping[int, str]
) -> PreTrainedTokenizerBase:
    """A tokenizer in which each id of `overrides` has the new text.

    Raises ModelError for an id that is no added token and for a text that another token has.
    """
    wanted = {int(number): text for number, text in overrides.items()}
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = tokenizer.get_vocab()
    problems = []
    for number, text in wanted.items():
        if number not in added:
            free = [n for n, t in added.items() if "reserved" in t or "unused" in t] or list(added)
            problems.append(
                Problem(
                    f"`added_tokens_overrides.{number}` is not the id of an added token.",
                    f"Ids that can be rewritten: {', '.join(map(str, sorted(free)[:12]))}{' …' if free[12:] else ''}.",
                    keys=("added_tokens_overrides",),
                )
            )
        elif vocabulary.get(text, number) != number and vocabulary[text] not in wanted:
            problems.append(
                Problem(
                    f"`added_tokens_overrides.{number}: {text}` is the text of token {vocabulary[text]} already.",
                    "Choose a text that no token has.",
                    keys=("added_tokens_overrides",),
                )
            )
    if problems:
        raise ModelError(problems)
    texts = {added[number]: text for number, text in wanted.items()}
    name = tokenizer.name_or_path
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        _rewrite(Path(folder) / "tokenizer.json", lambda d: _in_backend(d, texts, wanted))
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            _rewrite(Path(folder) / file, lambda d: _in_config(d, texts, wanted))
        fresh = AutoTokenizer.from_pretrained(folder)
    fresh.name_or_path = name
    fresh.init_kwargs["name_or_path"] = name
    return fresh


def _rewrite(path: Path, change: Any) -> None:
    if path.is_file():
        data = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(change(data), ensure_ascii=False), encoding="utf-8")


def _in_backend(data: dict[str, Any], texts: dict[str, str], wanted: dict[int, str]) -> dict[str, Any]:
    for token in data["added_tokens"]:
        if token["id"] in wanted:
            token["content"] = wanted[token["id"]]
    vocabulary = data["model"].get("vocab")
    if isinstance(vocabulary, dict):
        data["model"]["vocab"] = {texts.get(t, t) if n in wanted else t: n for t, n in vocabulary.items()}
    elif isinstance(vocabulary, list):
        for number in wanted:
            if number < len(vocabulary):
                vocabulary[number][0] = wanted[number]
    data["post_processor"] = _renamed(data.get("post_processor"), texts)
    return data


def _in_config(data: dict[str, Any], texts: dict[str, str], wanted: dict[int, str]) -> dict[str, Any]:
    decoder = data.pop("added_tokens_decoder", None)
    data = _renamed(data, texts)
    if decoder is not None:
        for number, text in wanted.items():
            if str(number) in decoder:
                decoder[str(number)]["content"] = text
        data["added_tokens_decoder"] = decoder
    return data


def _renamed(node: Any, texts: dict[str, str]) -> Any:
    """The same JSON with every string and key that is a rewritten token's old text exchanged."""
    if isinstance(node, str):
        return texts.get(node, node)
    if isinstance(node, list):
        return [_renamed(n, texts) for n in node]
    if isinstance(node, dict):
        return {texts.get(k, k): _renamed(v, texts) for k, v in node.items()}
    return node
