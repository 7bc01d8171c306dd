"""What a dataset row becomes on its way to tokens: the typed values that a format returns and the renderer takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class DetailSpan:
    """One range of characters of a message, both ends inclusive, that is trained or masked (`train_detail`)."""

    begin: int
    end: int
    train: bool


@dataclass(slots=True)
class Message:
    """One turn of a conversation.

    `role` is the template's role (aliases such as `gpt` already mapped). `fields` holds everything else that the
    template may read: reasoning_content, tool_calls, name, ... `train` is the row's own word on whether this turn is
    trained (None: decided by roles_to_train). `detail` holds the character ranges of `content` that are trained, and
    `field_details` the same for other text fields such as reasoning_content.
    """

    role: str
    content: str | None
    fields: dict[str, Any] = field(default_factory=dict)
    train: bool | None = None
    detail: list[DetailSpan] | None = None
    field_details: dict[str, list[DetailSpan]] | None = None


@dataclass(slots=True)
class Conversation:
    """A chat: its messages, the tools on offer, and variables for the template."""

    messages: list[Message]
    tools: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text that is tokenised on its own, and whether it is trained.

    `bos` asks for the tokenizer's usual opening (BOS where it has one); `eos` appends that many EOS tokens, the first
    only where the text does not already end in one. An empty text gives no token at all, not even EOS.
    """

    text: str
    train: bool
    bos: bool = False
    eos: int = 0


@dataclass(slots=True)
class Pieces:
    """Text that is tokenised piece by piece: instruction formats, mappings, input_output."""

    pieces: list[Piece]


@dataclass(slots=True)
class Marked:
    """One text tokenised at once, of which the characters in `spans` (start, end exclusive) are trained; with BOS and EOS."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(slots=True)
class Completion:
    """Plain text, trained as a whole and cut into pieces of sequence_len."""

    text: str


@dataclass(slots=True)
class Tokenized:
    """A row that came with its tokens."""

    input_ids: list[int]
    labels: list[int]


FormatValue = Conversation | Pieces | Marked | Completion | Tokenized


@dataclass(slots=True)
class Rendered:
    """Tokens of one training row; `labels` repeats the id where it is trained and holds -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


class RowProblem(Exception):
    """A row that cannot be used: `reason` is a short fixed phrase for the ledger, `detail` tells about this row.

    Raised by formats and by the renderer; `prepare` adds file and row number, and decides whether it ends the run.
    """

    def __init__(self, reason: str, detail: str = "", remedy: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.remedy = reason, detail, remedy


IGNORE_INDEX = -100
