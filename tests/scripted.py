"""A tiny model that says exactly what it was told to say, one token after the other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from axolotl.config.adapter import AdapterSection
from axolotl.config.data import DataSection
from axolotl.config.model import ModelSection
from axolotl.inference.generate import find_stops
from axolotl.inference.loading import Loaded
from axolotl.inference.prompting import Prompter
from axolotl.model.load import load_model, stop_ids
from axolotl.model.tokenizer import load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
LLAMA, CHATML = str(FIXTURES / "tiny-llama3"), str(FIXTURES / "tiny-chatml")
CPU: Any = SimpleNamespace(device="cpu", bf16=False, tf32=False, cpus=1)
CHAT_DATA: dict[str, Any] = {"datasets": [{"path": "x", "type": "chat_template"}]}


def teach(model: Any, chains: Sequence[Sequence[int]]) -> None:
    """Makes each token of a chain answer with the next; a token must not have two successors."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(model.lm_head.weight.shape, generator=generator)
        model.model.embed_tokens.weight.copy_(rows)
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(rows))  # untied, where it was tied
        follows: dict[int, int] = {}
        for chain in chains:
            for current, following in itertools.pairwise(chain):
                assert follows.setdefault(current, following) == following, "two successors"
        for current, following in follows.items():
            model.lm_head.weight[following] += rows[current]


def scripted(
    answer: str,
    *,
    base: str = LLAMA,
    data: dict[str, Any] | None = None,
    question: str = "hi",
    stop: int | None = None,
    **keys: Any,
) -> Loaded:
    """A loaded model that gives `answer` to every question, and then a token that ends it (default: the template's)."""
    section = ModelSection.model_validate({"base_model": base, **keys})
    tokenizer = load_tokenizer(section)
    prompter = Prompter(tokenizer, DataSection.model_validate(CHAT_DATA if data is None else data))
    model = load_model(
        section, AdapterSection(), tokenizer, CPU, training=False, stop_tokens=prompter.stop_tokens()
    )
    stops = find_stops(tokenizer, stop_ids(model, tokenizer), prompter.stop_tokens())
    end = stops.ids[-1] if stop is None else stop
    ids = tokenizer.encode(answer, add_special_tokens=False)
    teach(model, [[prompter.ask(question)[-1], *ids, end, end]])
    return Loaded(model.eval(), tokenizer, prompter, stops, "scripted")
