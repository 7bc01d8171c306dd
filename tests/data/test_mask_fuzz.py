"""Random conversations through every bundled template, held against an oracle that shares no code with the renderer.

The oracle renders with transformers' own `apply_chat_template`, twice: once the conversation, once the same with every
visible character of the messages replaced by a private one. Where the second text holds private characters, the first
holds content; all else are the template's words, in which nobody's content can be mistaken for a header or a stop token.
What opens an answer and what ends one is written down below, from the models' published formats.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from axolotl.config.data import DataSection
from axolotl.data.formats import resolve_format
from axolotl.data.render import build_renderer
from axolotl.data.templates import FOLDER, template_names
from axolotl.data.types import RowProblem

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama3"
EOS = "<|end_of_text|>"
EXAMPLES = 300  # for each template and tokenizer
PRIVATE = 0xF0000

# what opens an answer, one of several where it depends on what came before; what ends it (None: nothing does)
COHERE = (("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",), "<|END_OF_TURN_TOKEN|>")
CHATML = (("<|im_start|>assistant\n",), "<|im_end|>")
GEMMA = (("<start_of_turn>model\n",), "<end_of_turn>")
GEMMA_4 = (("<|turn>model\n",), "<turn|>")
LLAMA = (("<|start_header_id|>assistant<|end_header_id|>\n\n",), "<|eot_id|>")
MISTRAL = (("[/INST]", "[/TOOL_RESULTS]"), EOS)
PHI = (("<|assistant|>\n",), "<|end|>")
FORMATS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "alpaca": (("### Response:\n",), EOS),
    **dict.fromkeys(("aya", "cohere", "command_a", "command_a_rag", "command_a_tool_use"), COHERE),
    **dict.fromkeys(("chatml", "falcon_h1", "nemotron_h", "qwen2_vl", "qwen3", "qwen3_5", "qwen_25"), CHATML),
    "deepseek_v2": (("<｜Assistant｜>",), EOS),
    "deepseek_v3": (("<｜Assistant｜>",), "<｜end▁of▁sentence｜>"),
    "exaone": (("[|assistant|]",), "[|endofturn|]"),
    "exaone4": (("[|assistant|]\n",), "[|endofturn|]"),
    **dict.fromkeys(("gemma", "gemma3", "gemma3n"), GEMMA),
    **dict.fromkeys(("gemma4", "gemma4_unified"), GEMMA_4),
    "jamba": (("<|bom|><|assistant|>",), "<|eom|>"),
    **dict.fromkeys(("llama3", "llama3_2_vision"), LLAMA),
    "llama4": (("<|header_start|>assistant<|header_end|>\n\n",), "<|eot|>"),
    "llava": (("ASSISTANT:",), None),
    "metharme": (("<|model|>",), EOS),
    **dict.fromkeys(
        ("mistral_v1", "mistral_v2v3", "mistral_v3_tekken", "mistral_v7_tekken", "pixtral"), MISTRAL
    ),
    **dict.fromkeys(("phi_3", "phi_35"), PHI),
    "phi_4": (("<|im_start|>assistant<|im_sep|>",), "<|im_end|>"),
}
OPENED_BY_THE_QUESTION = {
    "phi_3",
    "mistral_v1",
    "mistral_v2v3",
    "mistral_v3_tekken",
    "mistral_v7_tekken",
    "pixtral",
}
ENDED_AT_THE_END = {"metharme"}  # only the conversation has an end
CLOSES_TWICE = {"command_a", "command_a_rag", "command_a_tool_use"}  # the answer, then the turn
CONTROL = re.compile(r"<[|｜][^<>\s{}'\"]{1,40}[|｜]>|<\|?[a-z_]+\|?>|\[/?[A-Z_]+\]|\[\|[a-z]+\|\]")
MARKUP = re.compile(r"</?(think|tool_call|tool_response|tools|function|parameter)\b")
KEPT = re.compile(r"</?think>|<\|channel>|<channel\|>|\s+")  # what templates look for inside content


@cache
def tokenizer(template: str, knows: bool) -> Any:
    """The tiny tokenizer; `knows`: with the control tokens of the template, as the model's own has them."""
    made = PreTrainedTokenizerFast.from_pretrained(TINY)
    if knows:
        words = dict.fromkeys(CONTROL.findall((FOLDER / f"{template}.jinja").read_text(encoding="utf-8")))
        made.add_tokens([w for w in words if not MARKUP.match(w)], special_tokens=True)
    return made


@cache
def byte_of_letter() -> dict[str, int]:
    """The letters in which a byte-level vocabulary spells bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def token_bytes(tok: Any, i: int) -> bytes:
    added = tok.added_tokens_decoder.get(i)
    if added is not None:
        return str(added.content).encode()
    return bytes(byte_of_letter()[c] for c in tok.convert_ids_to_tokens(i))


class Draw:
    """Draws conversations for one template."""

    def __init__(self, seed: str, template: str) -> None:
        self.pick = random.Random(seed)
        source = (FOLDER / f"{template}.jinja").read_text(encoding="utf-8")
        self.alike = sorted(w for w in set(CONTROL.findall(source)) if not MARKUP.match(w))
        self.alike += ["<|eot_id|>", EOS, "<|im_end|>\n<|im_start|>assistant\n", "### Response:\n", "[/INST]"]

    def chance(self, share: float) -> bool:
        return self.pick.random() < share

    def plain(self) -> str:
        """Words that no encoding of text inside JSON changes."""
        pool = ("Oslo", "łódź", "東京", "🙂🙃", "x", "a b", "é", "0", "-", "naïve", "ｆｕｌｌ")
        return " ".join(self.pick.choices(pool, k=self.pick.randint(1, 3)))

    def text(self) -> str:
        if self.chance(0.08):
            return self.pick.choice(["", "", " ", "\n", "\n \n"])
        parts = []
        for _ in range(self.pick.randint(1, 4)):
            kind = self.pick.random()
            if kind < 0.25:
                parts.append(self.pick.choice(self.alike))
            elif kind < 0.35:
                parts.append(
                    "".join(chr(self.pick.choice([0x301, 0x200D, 0x1F469, 0x4E2D, 0x5D0])) for _ in "123")
                )
            elif kind < 0.45:
                parts.append(
                    self.pick.choice(
                        ['{"a": "b\\n"}', "{{ bos_token }}", "{% if %}", "'\"", "assistant", "user:"]
                    )
                )
            else:
                parts.append(self.plain())
            parts.append(self.pick.choice([" ", "", "\n", "\n\n", ""]))
        made = "".join(parts)
        if self.chance(0.85):
            made = made.strip()
        return made or "y"

    def answer(self, thinks: bool) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text()}
        if thinks and self.chance(0.5):
            if self.chance(0.7):
                message["reasoning_content"] = self.plain()
            else:
                message["content"] = f"<think>\n{self.plain()}\n</think>\n\n{self.text().strip() or 'y'}"
        return message

    def calls(self, number: int) -> list[dict[str, Any]]:
        count = self.pick.randint(1, 2)
        made, results = [], []
        for i in range(count):
            key = f"call{number:03d}{i:02d}"
            arguments = {"city": self.plain(), **({"day": self.plain()} if self.chance(0.3) else {})}
            made.append(
                {"id": key, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
            )
            results.append(
                {"role": "tool", "tool_call_id": key, "name": "get_weather", "content": self.plain()}
            )
        content = self.pick.choice(["", "", None, self.plain()])
        return [{"role": "assistant", "content": content, "tool_calls": made}, *results]

    def ranges(self, length: int) -> list[dict[str, Any]]:
        """Some of the characters 0 to length - 1, in ranges of which some are trained."""
        if self.chance(0.1):
            return []
        edges = sorted(self.pick.sample(range(length + 1), k=min(length + 1, self.pick.randint(2, 4))))
        found = [
            {"begin_offset": a, "end_offset": b - 1, "train": self.chance(0.6)}
            for a, b in itertools.pairwise(edges)
            if self.chance(0.9)
        ]
        return self.pick.sample(found, k=len(found))

    def options(self) -> dict[str, Any]:
        """What a dataset says on the roles that are trained and on stop tokens; mostly nothing."""
        made: dict[str, Any] = {}
        if self.chance(0.3):
            made["roles_to_train"] = self.pick.choice(
                [["user"], ["user", "assistant"], ["system", "user", "assistant"], ["assistant", "tool"]]
            )
        if self.chance(0.5):
            made["train_on_eos"] = self.pick.choice(["all", "last", "none", "turn"])
        return made

    def row(self) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        thinks, uses_tools, marks = self.chance(0.4), self.chance(0.3), self.chance(0.3)
        if self.chance(0.35):
            messages.append({"role": "system", "content": self.text()})
        for number in range(self.pick.randint(1, 3)):
            messages.append({"role": "user", "content": self.text()})
            if uses_tools and self.chance(0.6):
                messages += self.calls(number)
            messages.append(self.answer(thinks))
            if self.chance(0.03):
                messages.append(self.answer(thinks))
        if self.chance(0.1):
            messages.append({"role": "user", "content": self.text()})
        ranges = self.chance(0.3)
        for message in messages:
            if marks and self.chance(0.4 if message["role"] == "assistant" else 0.1):
                message["train"] = self.chance(0.2)
            if ranges and message.get("content") and "tool_calls" not in message and self.chance(0.5):
                message["detail"] = self.ranges(len(message["content"]))
        row: dict[str, Any] = {"messages": messages}
        if uses_tools:
            parameters = {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where"}},
            }
            function = {"name": "get_weather", "description": "Tells it", "parameters": parameters}
            row["tools"] = [{"type": "function", "function": function}]
        return row


def rendered(tok: Any, template: str, row: dict[str, Any]) -> str | None:
    """What transformers writes; None where the template refuses or fails."""
    messages = [{k: v for k, v in m.items() if k not in ("train", "detail")} for m in row["messages"]]
    messages = [m if m["content"] is not None else {**m, "content": ""} for m in messages]
    source = (FOLDER / f"{template}.jinja").read_text(encoding="utf-8")
    try:
        return str(
            tok.apply_chat_template(messages, tools=row.get("tools"), chat_template=source, tokenize=False)
        )
    except Exception:
        return None


Spot = tuple[int, str, int]  # a message, one of its keys, and a place in that text


def privately(row: dict[str, Any]) -> tuple[dict[str, Any], dict[int, Spot]]:
    """The row with private characters in its texts, and to which message each of them belongs."""
    owner: dict[int, Spot] = {}

    def hidden(text: str, number: int, key: str = "") -> str:
        made, at = [], 0
        for match in [*KEPT.finditer(text), None]:
            for place in range(at, match.start() if match else len(text)):
                private = PRIVATE + len(owner)
                owner[private] = number, key, place
                made.append(chr(private))
            if match:
                made.append(match.group())
                at = match.end()
        return "".join(made)

    copy = json.loads(json.dumps(row))
    for number, message in enumerate(copy["messages"]):
        for key in ("content", "reasoning_content"):
            if message.get(key):
                message[key] = hidden(message[key], number, key)
        for call in message.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            call["function"]["arguments"] = {k: hidden(v, number) for k, v in arguments.items()}
    return copy, owner


# FORBIDDEN: masked even where the token holds what is trained; UNKNOWN: it cannot be told which character this is
MASKED, TRAINED, EITHER, FORBIDDEN, UNKNOWN = range(5)


def openings_of(
    template: str, messages: list[dict[str, Any]], places: dict[int, list[int]], found: list[tuple[int, int]]
) -> dict[int, tuple[int, int]]:
    """The opening of each answer; none where it cannot be told which opening belongs to which answer."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if template in OPENED_BY_THE_QUESTION and (
        messages[-1]["role"] != "assistant" or any(messages[i - 1]["role"] != "user" for i in answers)
    ):
        return {}
    if len(found) != len(answers):
        return {}
    for number, opening in zip(answers, found, strict=True):
        if number in places and opening != max((o for o in found if o[1] <= places[number][0]), default=None):
            return {}
    return dict(zip(answers, found, strict=True))


def is_trained(message: dict[str, Any], options: dict[str, Any]) -> bool:
    marked, ranges = message.get("train"), message.get("detail")
    if marked is not None:
        return bool(marked)
    if ranges is not None:
        return bool(ranges)
    return message["role"] in options.get("roles_to_train", ["assistant"])


def by_ranges(message: dict[str, Any], spots: dict[int, Spot], length: int) -> dict[int, int]:
    """What the ranges of a message say on the characters of its own and on white space at and between them."""
    states = [FORBIDDEN] * len(message["content"])
    for each in message["detail"]:
        if each["train"]:
            first, last = each["begin_offset"], each["end_offset"]
            states[first : last + 1] = [TRAINED] * (last + 1 - first)
    found: dict[int, int] = {}
    mine = sorted(spots)
    content = [(at, spots[at][2]) for at in mine if spots[at][1] == "content"]
    for (at, place), (following, next_place) in itertools.pairwise(content):
        same = following - at == next_place - place
        same = (
            same and not message["content"][place + 1 : next_place].strip()
        )  # not markup, which templates rewrite
        for step in range(1, following - at):
            found[at + step] = states[place + step] if same else UNKNOWN
    if content:
        (first, place), (last, end) = content[0], content[-1]
        found |= dict.fromkeys(range(max(0, first - place), first), UNKNOWN)
        found |= dict.fromkeys(range(last + 1, min(length, last + len(states) - end)), UNKNOWN)
    for at in mine:
        found[at] = states[spots[at][2]] if spots[at][1] == "content" else FORBIDDEN
    return found


def expected(
    template: str, row: dict[str, Any], private: str, owner: dict[int, Spot], options: dict[str, Any]
) -> list[int]:
    """For each character of the text whether its token has to be trained, has to be masked, or may be either."""
    messages = row["messages"]
    heads, stop = FORMATS[template]
    when = options.get("train_on_eos", "turn")
    want = [MASKED] * len(private)
    places: dict[int, list[int]] = {}
    spots = [owner.get(ord(char)) for char in private]
    whose = [spot and spot[0] for spot in spots]
    for at, number in enumerate(whose):
        if number is not None:
            places.setdefault(number, []).append(at)
    found = sorted((m.start(), m.end()) for head in heads for m in re.finditer(re.escape(head), private))
    openings = openings_of(template, messages, places, found)
    trained = [is_trained(message, options) for message in messages]
    last_trained = max((i for i, yes in enumerate(trained) if yes), default=-1)
    last_answer = max(
        (i for i, yes in enumerate(trained) if yes and messages[i]["role"] == "assistant"), default=-1
    )

    def either(start: int, end: int) -> None:
        for at in range(start, end):
            if want[at] == MASKED and whose[at] is None:
                want[at] = EITHER

    def ended(number: int, start: int, end: int) -> None:
        """The stop token of a turn, in start..end-1."""
        state = TRAINED if when == "all" or (trained[number] and when == "turn") else MASKED
        if when == "last" and trained[number] and number == last_answer:
            # another role's turn that is trained after it may have a stop token or not
            state = TRAINED if number == last_trained else EITHER
        want[start:end] = [state] * (end - start)

    if stop and (when == "all" or last_trained != last_answer):
        for match in re.finditer(re.escape(stop), private):
            either(*match.span())  # that of another role's turn, where it cannot be told whose it is
    for number, message in enumerate(messages):
        mine = places.get(number, [])
        answers = message["role"] == "assistant"
        if not trained[number] and when != "all":
            continue
        if not answers:
            if not trained[number]:
                pass
            elif message.get("detail"):
                for at, state in by_ranges(message, {at: spots[at] for at in mine}, len(want)).items():
                    want[at] = state
            else:
                for at in mine:
                    want[at] = TRAINED
                for at, following in itertools.pairwise(mine):
                    either(at + 1, following)
            if (
                message["role"] == "tool" and mine
            ):  # where it is an object, all of that comes from the message
                around = range(max(0, mine[0] - 1), min(len(want), mine[-1] + 2))
                want[around[0]], want[around[-1]] = UNKNOWN, UNKNOWN
            if mine and stop and private.startswith(stop, mine[-1] + 1) and when in ("all", "turn"):
                ended(number, mine[-1] + 1, mine[-1] + 1 + len(stop))
            elif mine:
                following = next(
                    (at for at in range(mine[-1] + 1, len(private)) if whose[at] is not None), -1
                )
                either(mine[-1] + 1, following if following >= 0 else len(private))
            elif trained[number]:
                either(0, len(private))
            if mine:
                either(
                    max(0, mine[0] - spots[mine[0]][2]), mine[0]
                )  # white space and markup that it begins with
            continue
        if not mine and number not in openings:  # it cannot be told where it would stand
            either(0, len(private))
            continue
        ranges: dict[int, int] = {}
        if trained[number]:
            for at, following in itertools.pairwise(mine):
                # the template's words between reasoning, content and calls; other turns may stand there too
                between = set(whose[at + 1 : following]) - {None}
                if between or message.get("detail"):
                    either(at + 1, following)
                else:
                    want[at + 1 : following] = [TRAINED] * (following - at - 1)
            for at in mine:
                want[at] = TRAINED
            if message.get("detail"):
                ranges = by_ranges(message, {at: spots[at] for at in mine}, len(want))
            for at, state in ranges.items():
                if whose[at] in (None, number):
                    want[at] = state
        elif message.get("tool_calls"):
            for at, following in itertools.pairwise(mine):
                either(at + 1, following)  # calls end where their results follow
        last = mine[-1] + 1 if mine else openings[number][1]
        if mine and trained[number]:
            # what opens reasoning or calls, and white space that the content begins with; never the header
            header = max((end for _, end in found if end <= mine[0]), default=0)
            others = max((at + 1 for at in range(mine[0]) if whose[at] is not None), default=0)
            either(max(header, others), mine[0])
        following = next((at for at in range(last, len(private)) if whose[at] is not None), len(private))
        following = min([following, *(start for start, _ in found if start >= last)])
        ends = private.find(stop, last, following) if stop else -1
        if template in ENDED_AT_THE_END and number + 1 < len(messages):
            ends = -1
        if ends >= 0 and stop:
            ended(number, ends, ends + len(stop))
            closed = mine and want[ends] == TRAINED and not message.get("detail")
            if closed and trained[number]:
                want[last:ends] = [TRAINED] * (ends - last)
            elif trained[number] or template in CLOSES_TWICE:
                either(last, ends)
            if not mine and message.get("detail"):  # nothing but white space, with ranges
                want[last : ends + len(stop)] = [UNKNOWN] * (ends + len(stop) - last)
        elif message.get("tool_calls"):
            either(last, following)  # the words that close the calls
        else:
            either(last, last + len(private[last:following]) - len(private[last:following].lstrip()))
    return want


def failure(
    template: str,
    tok: Any,
    tools: tuple[Any, Any],
    row: dict[str, Any],
    seen: Counter[str],
    options: dict[str, Any],
) -> str | None:
    """What is wrong with our ids and labels of a row; None where nothing is."""
    format_, renderer = tools
    text = rendered(tok, template, row)
    try:
        (result,) = renderer.render_batch([format_.convert(json.loads(json.dumps(row)))])
    except RowProblem as problem:
        result = problem
    if text is None:
        seen["refused"] += 1
        return None if isinstance(result, RowProblem) else "the template refuses the row, and we do not"
    if isinstance(result, RowProblem):
        return f"we refuse the row: {result}"
    (ours,) = result
    pieces = [token_bytes(tok, i) for i in ours.input_ids]
    if b"".join(pieces) != text.encode():
        return f"the ids are {b''.join(pieces).decode(errors='replace')!r}, the template writes {text!r}"
    hidden, owner = privately(row)
    private = rendered(tok, template, hidden)
    if private is None or len(private) != len(text):
        seen["not comparable"] += 1
        return None
    seen["compared"] += 1
    want = expected(template, row, private, owner, options)
    of_byte = [at for at, char in enumerate(text) for _ in char.encode()]
    special = set(tok.all_special_ids) | {i for i, t in tok.added_tokens_decoder.items() if t.special}
    at = 0
    for i, label, piece in zip(ours.input_ids, ours.labels, pieces, strict=True):
        covered = range(of_byte[at], of_byte[at + len(piece) - 1] + 1)
        at += len(piece)
        wanted = {want[c] for c in covered}
        near = f"token {piece!r} in {text[max(0, covered[0] - 30) : covered[-1] + 30]!r}"
        if label not in (-100, i):
            return f"{near} has another label"
        if i in special and any(ord(private[c]) in owner for c in covered):
            return f"{near} is a control token inside content"
        if FORBIDDEN in wanted and label != -100:
            return f"{near} is trained, and a range leaves it out"
        if wanted & {FORBIDDEN, UNKNOWN}:
            continue
        if TRAINED in wanted and label == -100:
            return f"{near} is masked"
        if wanted == {MASKED} and label != -100:
            return f"{near} is trained"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("template", template_names())
def test_ids_are_the_template_and_the_mask_is_the_answers(template: str) -> None:
    seen: Counter[str] = Counter()
    for knows in (False, True):
        tok = tokenizer(template, knows)
        draw = Draw(f"{template} {knows}", template)
        for _ in range(EXAMPLES // 10):
            options = draw.options()
            entry = {
                "path": "x.jsonl",
                "type": "chat_template",
                "chat_template": template,
                "message_field_training": "train",
                "message_field_training_detail": "detail",
                **options,
            }
            data = DataSection.model_validate({"datasets": [entry], "sequence_len": 4096})
            tools = (
                resolve_format(data.datasets[0], ["messages", "tools"], data),
                build_renderer(tok, data, data.datasets[0]),
            )
            for _ in range(10):
                row = draw.row()
                wrong = failure(template, tok, tools, row, seen, options)
                assert wrong is None, f"{wrong}\n{options}\n{json.dumps(row, ensure_ascii=False)}"
    assert seen["compared"] >= 0.2 * EXAMPLES, seen
    assert seen["not comparable"] <= 0.1 * seen["compared"], seen
