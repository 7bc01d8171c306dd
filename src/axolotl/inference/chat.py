"""A conversation at the terminal, with commands to steer it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from axolotl.config.keys import did_you_mean, nearest
from axolotl.console import note, out
from axolotl.errors import ConfigError, DataError, UserError
from axolotl.inference.generate import Sampling, generate
from axolotl.inference.loading import Loaded
from axolotl.inference.once import say_speed
from axolotl.inference.thinking import Shown, opened_by, without_thinking


class Chat:
    """The state of a conversation. `handle` takes one line of the user: a command or a message."""

    def __init__(
        self,
        loaded: Loaded,
        sampling: Sampling,
        write: Callable[[str], None] | None = None,
        system: str | None = None,
    ) -> None:
        self.loaded, self.sampling = loaded, sampling
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.write = write or (lambda text: out(text, end=""))
        self.over = False

    def handle(self, line: str) -> None:
        """Obeys a command (`/…`) or answers a message. Mistakes in commands are told and change nothing."""
        text = line.strip()
        if not text:
            return
        if text.startswith("/") and not text.startswith("//"):
            name, _, rest = text[1:].partition(" ")
            command = getattr(self, f"do_{name.replace('-', '_')}", None)
            if command is None:
                near = did_you_mean([f"/{n}" for n in nearest(name, self._names())]) or "/help lists them."
                note(f"`/{name}` is no command. {near} A message that begins with / is written //…")
                return
            try:
                command(rest.strip())
            except UserError as error:
                for problem in error.problems:
                    note(f"{problem.message} {problem.remedy}")
            return
        self._ask(self.messages, text[1:] if text.startswith("//") else text)

    def _ask(self, earlier: list[dict[str, Any]], question: str) -> None:
        """Answers a question behind the earlier messages. Where that fails, the conversation stays as it was.

        An answer that is stopped by Ctrl-C is kept as far as it came.
        """
        asked = [*earlier, {"role": "user", "content": question}]
        shown: Shown | None = None
        try:
            prompt = self.loaded.prompter.chat(asked)
            opened = opened_by(str(self.loaded.tokenizer.decode(prompt[-16:])))
            shown = Shown(self.write, dim=sys.stdout.isatty(), thinking=opened)
            answer = generate(
                self.loaded.model,
                self.loaded.tokenizer,
                prompt,
                self.sampling,
                self.loaded.stops,
                on_text=shown,
            )
        except UserError as error:
            for problem in error.problems:
                note(f"{problem.message} {problem.remedy}")
            return
        except torch.OutOfMemoryError:
            note(
                "The GPU's memory ran out; the question is forgotten. /clear begins anew, max_new_tokens shortens answers."
            )
            return
        except KeyboardInterrupt:
            text = without_thinking(shown.text) if shown else ""
            if shown:
                shown.end()
            self.write("\n")
            if text.strip():
                self.messages = [*asked, {"role": "assistant", "content": text}]
                note("Stopped; the answer is kept as far as it came. /undo forgets it, /retry asks again.")
            else:
                note("Stopped; the question is forgotten.")
            return
        shown.end()
        self.write("\n")
        self.messages = [*asked, {"role": "assistant", "content": without_thinking(answer.text)}]
        say_speed(answer)

    def do_help(self, text: str) -> None:
        """This list."""
        _takes_nothing("help", text)
        for name in self._names():
            note(f"/{name:<8} {(getattr(self, f'do_{name}').__doc__ or '').splitlines()[0]}")

    def _names(self) -> list[str]:
        return sorted(n.removeprefix("do_") for n in dir(self) if n.startswith("do_"))

    def do_quit(self, text: str) -> None:
        """Leave."""
        _takes_nothing("quit", text)
        self.over = True

    do_exit = do_quit

    def do_system(self, text: str) -> None:
        """TEXT: set the system message (no text: remove it)."""
        self.messages = [m for m in self.messages if m["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})
        note("System message set." if text else "System message removed.")

    def do_set(self, text: str) -> None:
        """NAME VALUE: change a sampling value, such as temperature 0.7 or none (nothing: show them)."""
        if text:
            name, _, value = text.replace("=", " ", 1).partition(" ")
            if not value.strip():
                raise ConfigError(
                    f"`/set {name}` needs a value.",
                    "For example: /set temperature 0.7 (none: the model's own)",
                )
            self.sampling = self.sampling.changed(name, value)
        shown = {k: v for k, v in vars(self.sampling).items() if v is not None}
        note(", ".join(f"{k} {v}" for k, v in shown.items()))

    def do_retry(self, text: str) -> None:
        """Answer the last message again."""
        _takes_nothing("retry", text)
        earlier, question = self._last_turn()
        if question is None:
            raise DataError("There is no message to answer again.", "Write one.")
        self._ask(earlier, question)

    def do_undo(self, text: str) -> None:
        """Forget the last message and its answer."""
        _takes_nothing("undo", text)
        earlier, question = self._last_turn()
        if question is None:
            raise DataError("There is nothing to undo.", "/system without a text removes the system message.")
        self.messages = earlier
        note(f"Forgotten: {question[:60]}{'…' if len(question) > 60 else ''}")

    def _last_turn(self) -> tuple[list[dict[str, Any]], str | None]:
        """(the messages before the last question, that question); None where there is none."""
        at = max((i for i, m in enumerate(self.messages) if m["role"] == "user"), default=None)
        return (
            (self.messages, None) if at is None else (self.messages[:at], str(self.messages[at]["content"]))
        )

    def do_clear(self, text: str) -> None:
        """Begin anew; the system message stays."""
        _takes_nothing("clear", text)
        self.messages = [m for m in self.messages if m["role"] == "system"]
        note("The conversation is empty.")

    def do_save(self, text: str) -> None:
        """FILE: append the conversation as one row of JSONL, ready to train on."""
        if not text:
            raise DataError("`/save` needs a file name.", "For example: /save chats.jsonl")
        if not any(m["role"] == "assistant" for m in self.messages):
            raise DataError("There is no answer to save yet.", "A row to train on has one.")
        try:
            with Path(text).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(
                f"`{text}` cannot be written: {error.strerror}.", "Choose another file."
            ) from None
        note(f"Saved to {text}.")


def _takes_nothing(name: str, text: str) -> None:
    if text:
        raise ConfigError(f"`/{name}` takes nothing behind it: `{text[:40]}`.", f"Write /{name} alone.")


def run_chat(
    loaded: Loaded, sampling: Sampling, stdin: TextIO | None = None, *, system: str | None = None
) -> Chat:
    """Talks until /quit or the end of input. Without a terminal every line of stdin is a message or a command."""
    chat = Chat(loaded, sampling, system=system)
    kind = "" if loaded.prompter.kind == "chat" else " Without a chat template every question stands alone."
    note(f"{loaded.source}. /help lists the commands, /quit leaves.{kind}")
    for line in _lines(stdin or sys.stdin):
        chat.handle(line)
        if chat.over:
            break
    return chat


def _lines(stdin: TextIO) -> Iterator[str]:
    if not stdin.isatty():
        yield from stdin
        return
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return
