"""A conversation at the terminal, with commands to steer it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from axolotl.console import note, out
from axolotl.errors import DataError, UserError
from axolotl.inference.generate import Answer, Sampling, generate
from axolotl.inference.loading import Loaded
from axolotl.inference.once import say_speed

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
THINKING = (("<think>", "</think>"), ("<reasoning>", "</reasoning>"), ("<thinking>", "</thinking>"))


class Chat:
    """The state of a conversation. `handle` takes one line of the user: a command or a message."""

    def __init__(
        self, loaded: Loaded, sampling: Sampling, write: Callable[[str], None] | None = None
    ) -> None:
        self.loaded, self.sampling = loaded, sampling
        self.messages: list[dict[str, Any]] = []
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
                note(
                    f"`/{name}` is no command. /help lists them; a message that begins with / is written //…"
                )
                return
            try:
                command(rest.strip())
            except UserError as error:
                for problem in error.problems:
                    note(f"{problem.message} {problem.remedy}")
            return
        self.messages.append({"role": "user", "content": text[1:] if text.startswith("//") else text})
        self._answer()

    def _answer(self) -> None:
        try:
            prompt = self.loaded.prompter.chat(self.messages)
            shown = Shown(self.write, dim=sys.stdout.isatty())
            answer: Answer = generate(
                self.loaded.model,
                self.loaded.tokenizer,
                prompt,
                self.sampling,
                self.loaded.stops,
                on_text=shown,
            )
        except UserError as error:
            self.messages.pop()
            for problem in error.problems:
                note(f"{problem.message} {problem.remedy}")
            return
        except KeyboardInterrupt:
            self.messages.pop()
            self.write("\n")
            note("Stopped; the question is forgotten.")
            return
        shown.end()
        self.write("\n")
        self.messages.append({"role": "assistant", "content": without_thinking(answer.text)})
        say_speed(answer)

    def do_help(self, _: str) -> None:
        """This list."""
        for name in sorted(n for n in dir(self) if n.startswith("do_")):
            note(f"/{name[3:]:<8} {(getattr(self, name).__doc__ or '').splitlines()[0]}")

    def do_quit(self, _: str) -> None:
        """Leave."""
        self.over = True

    do_exit = do_quit

    def do_system(self, text: str) -> None:
        """TEXT: set the system message (no text: remove it)."""
        self.messages = [m for m in self.messages if m["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})
        note("System message set." if text else "System message removed.")

    def do_set(self, text: str) -> None:
        """NAME VALUE: change a sampling value, such as temperature 0.7 (nothing: show them)."""
        if text:
            name, _, value = text.replace("=", " ").partition(" ")
            self.sampling = self.sampling.changed(name, value)
        shown = {k: v for k, v in vars(self.sampling).items() if v is not None}
        note(", ".join(f"{k} {v}" for k, v in shown.items()))

    def do_retry(self, _: str) -> None:
        """Answer the last message again."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            raise DataError("There is no message to answer again.", "Write one.")
        self._answer()

    def do_undo(self, _: str) -> None:
        """Forget the last message and its answer."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if self.messages and self.messages[-1]["role"] == "user":
            note(f"Forgotten: {self.messages.pop()['content'][:60]}")

    def do_clear(self, _: str) -> None:
        """Begin anew; the system message stays."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        note("The conversation is empty.")

    def do_save(self, text: str) -> None:
        """FILE: append the conversation as one row of JSONL, ready to train on."""
        if not text:
            raise DataError("`/save` needs a file name.", "For example: /save chats.jsonl")
        try:
            with Path(text).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(
                f"`{text}` cannot be written: {error.strerror}.", "Choose another file."
            ) from None
        note(f"Saved to {text}.")


class Shown:
    """Writes an answer as it grows; at a terminal, thinking is dimmed."""

    def __init__(self, write: Callable[[str], None], dim: bool) -> None:
        self.write, self.dim = write, dim
        self.dimmed = False

    def __call__(self, text: str) -> None:
        if self.dim:
            for opening, closing in THINKING:
                if opening in text:
                    text, self.dimmed = text.replace(opening, f"{_DIM}{opening}"), True
                if closing in text:
                    text, self.dimmed = text.replace(closing, f"{closing}{_PLAIN}"), False
        self.write(text)

    def end(self) -> None:
        if self.dimmed:
            self.write(_PLAIN)
            self.dimmed = False


def without_thinking(text: str) -> str:
    """An answer without its closed thinking blocks: what later turns see."""
    for opening, closing in THINKING:
        while opening in text and closing in text[text.index(opening) :]:
            start = text.index(opening)
            text = text[:start] + text[text.index(closing, start) + len(closing) :].lstrip()
    return text


def run_chat(loaded: Loaded, sampling: Sampling, stdin: TextIO | None = None) -> Chat:
    """Talks until /quit or the end of input. Without a terminal every line of stdin is a message or a command."""
    chat = Chat(loaded, sampling)
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
