"""What a model thinks aloud before it answers: shown dimmed, and no part of what later turns see."""

from __future__ import annotations

from collections.abc import Callable

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
THINKING = (("<think>", "</think>"), ("<reasoning>", "</reasoning>"), ("<thinking>", "</thinking>"))
_TAGS = [tag for pair in THINKING for tag in pair]


class Shown:
    """Writes an answer as it grows; with `dim`, thinking is dimmed. A tag may come in several pieces.

    `thinking`: the prompt has opened the thinking already.
    """

    def __init__(self, write: Callable[[str], None], dim: bool, thinking: bool = False) -> None:
        self.write, self.dim = write, dim
        self.dimmed = False
        self.text = ""
        """All that came so far."""
        self._held = ""
        if dim and thinking:
            self.write(DIM)
            self.dimmed = True

    def __call__(self, text: str) -> None:
        self.text += text
        if not self.dim:
            self.write(text)
            return
        text = self._held + text
        out, at = "", 0
        while at < len(text):
            tag = next((t for t in _TAGS if text.startswith(t, at)), None)
            if tag is not None:
                opens = not tag.startswith("</")
                out += f"{DIM}{tag}" if opens else f"{tag}{PLAIN}"
                self.dimmed = opens
                at += len(tag)
            elif any(t.startswith(text[at:]) for t in _TAGS):
                break  # perhaps the beginning of a tag
            else:
                out += text[at]
                at += 1
        self._held = text[at:]
        if out:
            self.write(out)

    def end(self) -> None:
        """Nothing more will come."""
        if self._held:
            self.write(self._held)
            self._held = ""
        if self.dimmed:
            self.write(PLAIN)
            self.dimmed = False


def opened_by(prompt: str) -> bool:
    """Whether a prompt ends in the middle of thinking, as some templates write it."""
    return prompt.rstrip().endswith(tuple(opening for opening, _ in THINKING))


def without_thinking(text: str) -> str:
    """An answer without its closed thinking blocks; also where the prompt had opened the first of them."""
    for opening, closing in THINKING:
        if closing in text and opening not in text[: text.index(closing)]:
            text = text[text.index(closing) + len(closing) :].lstrip()
        while opening in text and closing in text[text.index(opening) :]:
            start = text.index(opening)
            text = text[:start] + text[text.index(closing, start) + len(closing) :].lstrip()
    return text
