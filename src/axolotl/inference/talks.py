"""Conversations with two models at once, for a page: they grow while they are told, and can be stopped."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any

from axolotl.inference.generate import Answer, Sampling, generate
from axolotl.inference.once import speed_of
from axolotl.inference.sides import Sides
from axolotl.inference.thinking import without_thinking

Turn = dict[str, Any]
"""`question`, and `answers`: the text of each side that was asked."""


def answers(
    sides: Sides, side: str, messages: list[dict[str, Any]], sampling: Sampling, stop: threading.Event
) -> Generator[str | Answer, None, None]:
    """The growing text of an answer, and at last the answer. It ends when `stop` is set or the reader goes away.

    Raises UserError for what cannot be asked, such as a conversation that is longer than the model's context.
    """
    pieces: queue.Queue[str | Answer | BaseException] = queue.Queue()
    gone = threading.Event()

    def cancelled() -> bool:
        return stop.is_set() or gone.is_set()

    def work() -> None:
        try:
            with sides.opened(side, cancelled) as loaded:
                if loaded is None:
                    answer = Answer("", 0, 0.0, "cancelled")
                else:
                    answer = generate(
                        loaded.model,
                        loaded.tokenizer,
                        loaded.prompter.chat(messages),
                        sampling,
                        loaded.stops,
                        on_text=pieces.put,
                        cancelled=cancelled,
                    )
            pieces.put(answer)
        except BaseException as error:
            pieces.put(error)

    worker = threading.Thread(target=work, daemon=True, name="axolotl-answer")
    worker.start()
    text = ""
    try:
        while True:
            piece = pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            if isinstance(piece, Answer):
                yield piece
                return
            text += piece
            yield text
    finally:
        gone.set()
        worker.join()


def messages_for(side: str, turns: list[Turn], question: str, system: str) -> list[dict[str, Any]]:
    """What a side is asked: the turns that it answered itself, then the question."""
    messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for turn in turns:
        if side in turn["answers"]:
            messages += [
                {"role": "user", "content": turn["question"]},
                {"role": "assistant", "content": without_thinking(turn["answers"][side])},
            ]
    return [*messages, {"role": "user", "content": question}]


def shown_for(side: str, turns: list[Turn]) -> list[dict[str, Any]]:
    """The conversation of a side, as messages to show."""
    shown = []
    for turn in turns:
        if side in turn["answers"]:
            shown.append({"role": "user", "content": turn["question"]})
            if turn["answers"][side]:
                shown.append({"role": "assistant", "content": turn["answers"][side]})
    return shown


class Talks:
    """The conversations of a page, one for each tab that is open."""

    def __init__(self, sides: Sides) -> None:
        self.sides = sides
        self._stops: dict[str, threading.Event] = {}

    def ask(
        self, tab: str, turns: list[Turn], question: str, system: str, sampling: Sampling, *, both: bool
    ) -> Iterator[tuple[list[Turn], dict[str, str]]]:
        """The turns as they grow, with a line for each side about its speed. The sides answer one after the other.

        Raises UserError for what cannot be asked.
        """
        self.stop(tab)
        stop = self._stops[tab] = threading.Event()
        given: dict[str, str] = {}
        said: dict[str, str] = {}
        grown = [*turns, {"question": question, "answers": given}]
        try:
            for side in ("tuned", "base") if both else ("tuned",):
                if stop.is_set():
                    break
                messages = messages_for(side, turns, question, system)
                given[side] = ""
                yield grown, said
                with contextlib.closing(answers(self.sides, side, messages, sampling, stop)) as stream:
                    for piece in stream:
                        if isinstance(piece, Answer):
                            given[side], said[side] = piece.text, speed_of(piece)
                        else:
                            given[side] = piece
                        yield grown, said
        finally:
            if self._stops.get(tab) is stop:
                del self._stops[tab]

    def stop(self, tab: str) -> None:
        """Ends what a tab is being told: the model stops at its next token, not only the screen."""
        if (event := self._stops.get(tab)) is not None:
            event.set()
