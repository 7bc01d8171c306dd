"""One question, one answer: from an argument, a file or stdin to stdout, word by word."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

from axolotl.console import note, out
from axolotl.errors import DataError
from axolotl.inference.generate import Answer, Sampling, generate
from axolotl.inference.loading import Loaded


def read_question(prompt: str | None, prompt_file: Path | None, stdin: TextIO | None = None) -> str | None:
    """The question: `prompt`, else the file's text, else all of stdin; None where a person sits at the terminal.

    Raises DataError for a missing file and for a question without any text.
    """
    stdin = stdin or sys.stdin
    if prompt is None and prompt_file is not None:
        if not prompt_file.is_file():
            raise DataError(f"`--prompt-file {prompt_file}` does not exist.", "Check the path.")
        prompt = prompt_file.read_text(encoding="utf-8")
    if prompt is None:
        if stdin.isatty():
            return None
        prompt = stdin.read()
    if not prompt.strip():
        raise DataError(
            "There is no question to answer.", "Give one with --prompt, --prompt-file, or on stdin."
        )
    return prompt.removesuffix("\n")


def answer_once(loaded: Loaded, question: str, sampling: Sampling, *, system: str | None = None) -> Answer:
    """Answers on stdout while the answer grows; speed and how it ended go to stderr."""
    answer = generate(
        loaded.model,
        loaded.tokenizer,
        loaded.prompter.ask(question, system),
        sampling,
        loaded.stops,
        on_text=lambda text: out(text, end=""),
    )
    out()
    say_speed(answer)
    return answer


def speed_of(answer: Answer) -> str:
    """One line about an answer: its tokens, how fast they came, and why it ended where that is not its own doing."""
    ended = {"stop": "", "length": "; cut off at max_new_tokens", "cancelled": "; stopped"}[answer.finish]
    return f"{answer.tokens} tokens in {answer.seconds:.1f} s ({answer.speed:.1f} tokens/s{ended})"


def say_speed(answer: Answer) -> None:
    """One line about an answer, on stderr."""
    note(speed_of(answer))
