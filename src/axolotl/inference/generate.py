"""Generation: one prompt streamed piece by piece, or many at once, ending at the end of the turn by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

from axolotl.config.keys import did_you_mean, nearest
from axolotl.errors import ConfigError, DataError

Finish = Literal["stop", "length", "cancelled"]
_HALF_CHARACTER = "\ufffd"


def _number(
    kind: Callable[[str], float], low: float, high: float, above: bool = False
) -> Callable[[str], float | None]:
    """A reader of numbers from `low` (or above it) to `high`; None for others. NaN is in no range."""

    def read(text: str) -> float | None:
        value = kind(text)
        return value if (low < value if above else low <= value) and value <= high else None

    return read


# What each value takes, in words, and its reader.
_VALUES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "max_new_tokens": ("a whole number above 0", _number(int, 1, 2**31)),
    "temperature": ("a number from 0 to 100", _number(float, 0, 100)),
    "top_p": ("a number above 0, at most 1", _number(float, 0, 1, above=True)),
    "top_k": ("a whole number above 0", _number(int, 1, 2**31)),
    "min_p": ("a number from 0 to 1", _number(float, 0, 1)),
    "repetition_penalty": ("a number above 0, at most 100", _number(float, 0, 100, above=True)),
    "do_sample": ("true or false", {"true": True, "false": False}.__getitem__),
    "seed": ("a whole number from 0", _number(int, 0, 2**32 - 1)),
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Unset values are the model's own; without any, the likeliest token is taken."""

    max_new_tokens: int = 1024
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    do_sample: bool | None = None
    seed: int | None = None

    def changed(self, name: str, text: str) -> Sampling:
        """A copy with one value read from text. Raises ConfigError for an unknown name or an unreadable value."""
        known = [f.name for f in fields(self)]
        if name not in known:
            near = did_you_mean(nearest(name, known))
            raise ConfigError(f"`{name}` is no sampling value.", near or f"Known: {', '.join(known)}.")
        word = text.strip().lower()
        if word in ("none", "default") and name != "max_new_tokens":
            return Sampling(**{**vars(self), name: None})
        takes, read = _VALUES[name]
        try:
            value = read(word)
        except (ValueError, KeyError):
            value = None
        if value is None:
            raise ConfigError(f"`{text.strip()}` is no value for `{name}`.", f"It takes {takes}.")
        return Sampling(**{**vars(self), name: value})

    def config(self, own: GenerationConfig | None) -> GenerationConfig:
        """A complete generation configuration: these values over the model's own."""
        chosen = {k: v for k, v in vars(self).items() if v is not None and k not in ("seed", "do_sample")}
        sampled = any(v is not None for v in (self.temperature, self.top_p, self.top_k, self.min_p))
        do_sample = self.do_sample
        if do_sample is None:
            do_sample = sampled if self.temperature is None else self.temperature > 0
            if not sampled and own is not None:
                do_sample = bool(own.do_sample)
        if not do_sample or self.temperature == 0:
            do_sample = False
            chosen = {k: v for k, v in chosen.items() if k not in ("temperature", "top_p", "top_k", "min_p")}
        elif own is not None:
            inherited = {
                k: getattr(own, k, None) for k in ("temperature", "top_p", "top_k", "repetition_penalty")
            }
            chosen = {k: v for k, v in inherited.items() if v is not None} | chosen
        return GenerationConfig(**chosen, do_sample=do_sample, use_cache=True)


@dataclass(frozen=True)
class Stops:
    """What ends an answer: ids, and texts that are several tokens in this vocabulary."""

    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    text: str
    tokens: int
    seconds: float
    finish: Finish

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def find_stops(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], texts: Sequence[str]) -> Stops:
    """Joins the model's stop ids with stop texts, which become ids where they are single tokens."""
    found, several = list(ids), []
    for text in texts:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if len(encoded) == 1:
            found.append(encoded[0])
        elif text.strip():
            several.append(text)
    return Stops(tuple(dict.fromkeys(found)), tuple(several))


class _Stream(BaseStreamer):
    """Decodes tokens as they come and passes on text that can no longer change."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Stops, on_text: Callable[[str], None] | None
    ) -> None:
        self.tokenizer, self.stops, self.on_text = tokenizer, stops, on_text
        self.ids: list[int] = []
        self.said = 0
        self.prompt_seen = False
        # A stop text may begin at the end of what is known.
        self.held_back = max((len(t) for t in stops.texts), default=1) - 1

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        text = self.text()
        if self.on_text and not text.endswith(_HALF_CHARACTER):
            self._say(text[: len(text) - self.held_back] if self.held_back else text)

    def _say(self, text: str) -> None:
        if self.on_text and len(text) > self.said:
            self.on_text(text[self.said :])
            self.said = len(text)

    def end(self) -> None:
        self._say(self.text())

    def text(self) -> str:
        """All text so far, without what ends it."""
        ids = self.ids
        while ids and ids[-1] in self.stops.ids:
            ids = ids[:-1]
        return decode(self.tokenizer, ids, self.stops)


class _Criteria(StoppingCriteria):
    """Ends at stop texts and when the user asks for it."""

    def __init__(self, stream: _Stream, cancelled: Callable[[], bool] | None) -> None:
        self.stream, self.cancelled = stream, cancelled
        self.was_cancelled = self.at_text = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.was_cancelled = self.cancelled is not None and self.cancelled()
        if self.stream.stops.texts:
            tail = self.stream.tokenizer.decode(self.stream.ids[-48:], skip_special_tokens=True)
            self.at_text = any(t in tail for t in self.stream.stops.texts)
        done = self.was_cancelled or self.at_text
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    sampling: Sampling,
    stops: Stops,
    *,
    on_text: Callable[[str], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Answer:
    """Answers one prompt (token ids). `on_text` gets the answer piece by piece; `cancelled` is asked at every token.

    Raises DataError for a prompt that is empty or fills the model's context.
    """
    room = check_room(model, prompt, sampling.max_new_tokens)
    if sampling.seed is not None:
        set_seed(sampling.seed)
    config = sampling.config(getattr(model, "generation_config", None))
    config.max_new_tokens = room
    config.eos_token_id = list(stops.ids) or None
    config.pad_token_id = tokenizer.pad_token_id
    stream = _Stream(tokenizer, stops, on_text)
    criteria = _Criteria(stream, cancelled)
    ids = torch.tensor([list(prompt)], device=model.device)
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=stream,
            stopping_criteria=StoppingCriteriaList([criteria]),
        )
    seconds = time.perf_counter() - started
    ended = criteria.at_text or (stream.ids and stream.ids[-1] in stops.ids)
    finish: Finish = "stop" if ended else "cancelled" if criteria.was_cancelled else "length"
    return Answer(stream.text(), len(stream.ids), seconds, finish)


def check_room(model: Any, prompt: Sequence[int], wanted: int) -> int:
    """How many new tokens fit behind the prompt, at most `wanted`. Raises DataError where none does."""
    if not prompt:
        raise DataError("The prompt is empty.", "Write a question, or give one with --prompt.")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not limit:
        return wanted
    if len(prompt) >= limit:
        raise DataError(
            f"The prompt has {len(prompt):,} tokens; this model's context holds {limit:,}.", "Shorten it."
        )
    return min(wanted, limit - len(prompt))


def generate_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stops: Stops,
) -> list[tuple[list[int], Finish]]:
    """New ids of each prompt (without what ends them), generated together with padding on the left."""
    if sampling.seed is not None:
        set_seed(sampling.seed)
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    room = min(check_room(model, p, sampling.max_new_tokens) for p in prompts)
    config = sampling.config(getattr(model, "generation_config", None))
    config.max_new_tokens = room
    config.eos_token_id = list(stops.ids) or None
    config.pad_token_id = pad
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=mask, generation_config=config)
    results: list[tuple[list[int], Finish]] = []
    for new in output[:, width:].tolist():
        end = next((i for i, t in enumerate(new) if t in stops.ids), None)
        results.append((new if end is None else new[:end], "length" if end is None else "stop"))
    return results


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Stops) -> str:
    """Text of an answer's ids, without special tokens, up to the first stop text in it."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    for stop in stops.texts:
        text = text.split(stop)[0]
    return text
