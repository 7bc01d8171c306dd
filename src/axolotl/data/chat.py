"""Renders conversations with one chat template: which template, which turns are trained, what ends a turn."""

from __future__ import annotations

import difflib
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from axolotl.data.encode import Encoded, Encoder, steering_tokens
from axolotl.data.formats.messages import DEFAULT_ROLES, THINKING, role_names, trained_roles
from axolotl.data.mask import StopRule, Turn, labels_of, locate_turns, trained_ranges
from axolotl.data.templates import ChatTemplate, Trace, load_template
from axolotl.data.types import Conversation, Message, Rendered, RowProblem
from axolotl.errors import Problem

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry

_CONTROL_LIKE = re.compile(r"<[|｜][^<>\s]{1,40}[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]|\[\|[a-z]+\|\]")


_UNFINISHED = re.compile(r"[<\[][^<>\[\]\s]*$")


def choose_template(tokenizer: Any, data: DataSection, entry: DatasetEntry | None = None) -> ChatTemplate:
    """The chat template of a dataset: its own, else the global one, else the tokenizer's."""
    chosen, text = _named_template(data, entry)
    return load_template(chosen, jinja=text, tokenizer_template=_template_of(tokenizer))


def _named_template(data: DataSection, entry: DatasetEntry | None) -> tuple[str, str | None]:
    """(name, Jinja text or file) of the template that a dataset asks for."""
    for owner in (entry, data):
        if owner is None:
            continue
        name, jinja = owner.chat_template, owner.chat_template_jinja
        if name or jinja:
            chosen = str(name or "jinja")
            if jinja and chosen.startswith("tokenizer_default"):
                chosen = "jinja"
            return chosen, jinja or data.chat_template_jinja
    return "tokenizer_default", None


def takes_tokenizer_template(data: DataSection, entry: DatasetEntry) -> bool:
    """Whether a dataset asks for the template that came with the tokenizer."""
    return _named_template(data, entry)[0].startswith("tokenizer_default")


def _template_of(tokenizer: Any) -> str | None:
    """The tokenizer's own template, as it came with the model."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        return own.get("default") or next(iter(own.values()), None)
    return own


def template_variables(tokenizer: Any, data: DataSection) -> dict[str, Any]:
    """What every template may read besides the messages: the special tokens' texts and chat_template_kwargs."""
    tokens = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    return {"bos_token": "", "eos_token": "", **tokens, **(data.chat_template_kwargs or {})}


def _shared_start(a: str, b: str) -> str:
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return a[: next(differing, min(len(a), len(b)))]


class ChatRenderer:
    """Renders conversations with one chat template, and knows what ends a turn there."""

    def __init__(self, tokenizer: Any, data: DataSection, entry: DatasetEntry) -> None:
        self.tokenizer, self.data, self.entry = tokenizer, data, entry
        self.template = choose_template(tokenizer, data, entry)
        self.variables = template_variables(tokenizer, data)
        self.train_on_inputs = bool(data.train_on_inputs)
        self.roles_to_train = trained_roles(entry)
        self._named_roles = {*DEFAULT_ROLES, *role_names(entry), *role_names(entry).values()}
        self.known_roles = self.roles_to_train | self.template.words | self._named_roles
        self.notes: Counter[str] = Counter()
        self.probe, self.openings = self._probe()
        literal = self._literal()
        guard = entry.special_tokens_in_content != "parse"
        self.encoder = Encoder(tokenizer, steering_tokens(tokenizer, literal))
        self.guard = guard
        self.rule = StopRule(
            eos=tokenizer.eos_token,
            eot=tuple(data.eot_tokens or ()),
            train_on_eos=entry.train_on_eos,
            train_on_eot=entry.train_on_eot,
            control=self.encoder.control_pattern,
            openings=self.openings,
        )
        self.stops = {*self.stop_tokens(), *self.rule.eot, tokenizer.eos_token}

    _PROBES = (
        [Message("user", "Axquestion"), Message("assistant", "Axanswer")],
        [Message("system", "Axsystem"), Message("user", "Axquestion"), Message("assistant", "Axanswer")],
    )

    def _probe(self) -> tuple[Trace | None, tuple[str, ...]]:
        """A two-turn conversation as the template writes it, and what opens an assistant's turn, longest first."""
        for messages in self._PROBES:
            try:
                trace = self.template.trace(Conversation(messages), self.variables)
                asked = self.template.trace(Conversation(messages[:-1]), self.variables).text
                opened = self.template.trace(
                    Conversation(messages[:-1], variables={"add_generation_prompt": True}), self.variables
                ).text
            except RowProblem:
                continue
            found = {opened[len(asked) :]} - {""} if opened.startswith(asked) else set()
            return trace, tuple(sorted(found | self._headers(messages), key=len, reverse=True))
        return None, ()

    def _headers(self, messages: list[Message]) -> set[str]:
        """What stands before an answer: one that is the last or is not, one with text or without."""
        found: set[str] = set()
        for answer in ("Axanswer", ""):
            both = Message("assistant", answer)
            try:
                trace = self.template.trace(
                    Conversation([*messages[:-1], both, messages[-2], both]), self.variables
                )
            except RowProblem:
                continue
            for turn in (len(messages) - 1, len(messages) + 1):
                begin = next((a for a, _, t, _ in trace.own if t == turn), None)
                content = next((a for a, _, source in trace.runs if source.turn == turn), None)
                if begin is None or (content is None and answer):
                    continue
                if content is not None:
                    found.add(trace.text[begin:content])
                else:  # as far as it is the same without text, up to a whole word of the template
                    text = trace.text[begin:]
                    alike = [_shared_start(header, text) for header in found]
                    found |= {_UNFINISHED.sub("", each) for each in alike}
        return found - {""}

    def _literal(self) -> str:
        """The words of the template itself in the probe."""
        if self.probe is None:
            return ""
        text, at = [], 0
        for start, end, _ in self.probe.runs:
            text.append(self.probe.text[at:start])
            at = end
        return "\n".join([*text, self.probe.text[at:]])

    def _probe_turns(self) -> list[Turn]:
        if self.probe is None or not self.probe.runs:
            return []
        count = 1 + max(source.turn for *_, source in self.probe.runs)
        return locate_turns(self.probe, count, [False] * count, self.rule)

    def _turns(self, conversation: Conversation, trace: Trace) -> list[Turn]:
        """Where each turn stands. What follows another role's text is its end only if it can end an answer too."""
        messages = conversation.messages
        turns = locate_turns(
            trace, len(messages), [bool(m.fields.get("tool_calls")) for m in messages], self.rule
        )
        begins = [begin for begin, *_ in trace.runs]
        for turn, message in zip(turns, messages, strict=True):
            if turn.stop is None:
                continue
            start, end = turn.stop
            text = trace.text[start:end]
            # words that the vocabulary does not know are found together with those before them
            known = [stop for stop in self.stops if stop and text.endswith(stop)]
            turn.stop = (end - len(max(known, key=len)), end) if known else turn.stop
            if message.role == "assistant":
                continue
            before = bisect_left(begins, end) - 1
            in_message = before >= 0 and trace.runs[before][1] > start
            following = bisect_left(begins, turn.reach)  # another turn's text in between has that stop token
            in_message = in_message or (following < len(begins) and begins[following] < turn.stop[0])
            if in_message or not (known or any(stop and stop.endswith(text) for stop in self.stops)):
                turn.stop = None
        return turns

    def _writes_nothing(self) -> bool:
        """True where no text of any role that is known here comes into what the template writes."""
        for role in ("", *sorted(self._named_roles | self.roles_to_train | self.template.words)):
            try:
                trace = (
                    self.template.trace(Conversation([Message(role, "Axtext")]), self.variables)
                    if role
                    else self.probe
                )
            except RowProblem:
                return False  # what it refuses to write is told with the row
            if trace is not None and trace.runs:
                return False
        return True

    def stop_tokens(self) -> list[str]:
        """What ends a turn of the assistant: the named eot_tokens that the template writes, else what it writes there."""
        written = self._written_stop(self._probe_turns())
        if written is None:
            return [self.tokenizer.eos_token] if self.tokenizer.eos_token else []
        return [written]

    def _written_stop(self, turns: list[Turn]) -> str | None:
        """What the template writes behind the last of the probe's turns."""
        if not turns or turns[-1].stop is None or self.probe is None:
            return None
        return self.probe.text[slice(*turns[-1].stop)]

    def problems(self) -> list[Problem]:
        """What is wrong or doubtful with the template, told before any row is read."""
        found: list[Problem] = []
        name = self.template.name
        if self.probe is None:
            return found
        if self._writes_nothing():
            return [
                Problem(
                    f"the chat template `{name}` writes nothing of the content of the messages.",
                    "Let it write `{{ message['content'] }}` of each message; look at the spelling of the keys it reads.",
                    kind="data",
                    keys=("chat_template_jinja", "chat_template"),
                )
            ]
        turns = self._probe_turns()
        written = self._written_stop(turns)
        vocabulary = self.encoder.backend
        unknown = sorted(
            {m for m in _CONTROL_LIKE.findall(self._literal()) if vocabulary.token_to_id(m) is None}
        )
        ends = next((u for u in unknown if u in (written or "")), "")
        if unknown:
            found.append(
                Problem(
                    f"the chat template `{name}` writes {', '.join(f'`{u}`' for u in unknown)}, which this tokenizer does "
                    "not know: they become several ordinary tokens."
                    + (f" Answers end with such, `{ends}`: generation does not stop there." if ends else ""),
                    "Use the model's own template (`chat_template: tokenizer_default`), or add them under `tokens`.",
                    kind="warning",
                    keys=("chat_template",),
                )
            )
        for token in self.rule.eot:
            if len(vocabulary.encode(token, add_special_tokens=False).ids) != 1:
                found.append(
                    Problem(
                        f"`{token}` in `eot_tokens` is not a single token of this tokenizer.",
                        "Add it under `tokens` or `added_tokens_overrides`, or remove it.",
                        keys=("eot_tokens",),
                    )
                )
            elif token not in self._literal() and token not in self.template.text:
                found.append(
                    Problem(
                        f"the chat template `{name}` never writes `{token}`, which `eot_tokens` names.",
                        "Remove it, or correct its spelling.",
                        kind="warning",
                        keys=("eot_tokens",),
                    )
                )
        on_eos = self.rule.train_on_eos or "turn"
        on_eot = self.rule.train_on_eot or on_eos
        if on_eos != on_eot and len(self.rule.eot) > 1 and self.rule.eos in self.rule.eot:
            found.append(
                Problem(
                    f"`{self.rule.eos}` is the EOS token and one of `eot_tokens`: `train_on_eos: {on_eos}` and "
                    f"`train_on_eot: {on_eot}` contradict each other on it.",
                    "Take it out of `eot_tokens`, or give both the same value.",
                    keys=("train_on_eot", "train_on_eos", "eot_tokens"),
                )
            )
        for role in sorted(self.roles_to_train - self.template.words - self._named_roles):
            near = difflib.get_close_matches(role, self._named_roles, n=1)
            if near:
                found.append(
                    Problem(
                        f"`roles_to_train` names `{role}`, which is no role here.",
                        f"Did you mean `{near[0]}`?",
                        kind="warning",
                        keys=("roles_to_train",),
                    )
                )
        for target, source in (self.entry.message_property_mappings or {}).items():
            read = re.search(rf"(?<!\w){re.escape(target)}(?!\w)", self.template.text)
            if read or target in ("role", "content", THINKING):
                continue
            near = difflib.get_close_matches(target, ["role", "content", THINKING, "tool_calls"], n=1)
            found.append(
                Problem(
                    f"`message_property_mappings` gives the template `{target}` (from `{source}`), which the chat template "
                    f"`{name}` never reads.",
                    f"Did you mean `{near[0]}`?" if near else "Remove it, or correct its spelling.",
                    kind="warning",
                    keys=("message_property_mappings",),
                )
            )
        trains_assistant = "assistant" in self.roles_to_train or self.train_on_inputs
        if written is None and self.rule.train_on_eos != "none" and trains_assistant:
            found.append(
                Problem(
                    f"the chat template `{name}` writes nothing that ends a turn of the assistant: a model trained with "
                    "it would never stop talking.",
                    "Let the template write `{{ eos_token }}` after each answer, or say that you mean it with "
                    "`train_on_eos: none`.",
                    kind="data",
                    keys=("chat_template",),
                )
            )
        elif written is not None:
            when = self.rule.when(written)
            if self.rule.train_on_eot not in (None, when) and self.rule.train_on_eos is None:
                found.append(
                    Problem(
                        f"`train_on_eot: {self.rule.train_on_eot}` does not narrow what is trained of `{written}`: that is "
                        f"the EOS token, which follows `train_on_eos`, and that is `{when}`.",
                        f"Write `train_on_eos: {self.rule.train_on_eot}`.",
                        kind="warning",
                        keys=("train_on_eot",),
                    )
                )
            if when == "none":
                found.append(
                    Problem(
                        f"the end of a turn, `{written}`, is not trained, because the config says `none`: the model will "
                        "not learn to stop.",
                        kind="warning",
                        keys=("train_on_eos", "train_on_eot"),
                    )
                )
        return found

    def _is_trained(self, message: Message) -> bool:
        if message.train is not None:
            return message.train
        if message.detail is not None or message.field_details:
            return True
        return self.train_on_inputs or message.role in self.roles_to_train

    def render(self, conversations: Sequence[Conversation]) -> list[list[Rendered] | RowProblem]:
        """Renders conversations; the ids of a row decode to exactly what the template writes."""
        traces: list[Trace | RowProblem] = []
        conversations = [self._with_system(c) for c in conversations]
        for conversation in conversations:
            try:
                self._check_roles(conversation)
                traces.append(self.template.trace(conversation, self.variables))
            except RowProblem as problem:
                traces.append(problem)
        plain = [t for t in traces if isinstance(t, Trace) and not self._is_quoting(t)]
        encoded = dict(zip(map(id, plain), self.encoder.encode([t.text for t in plain]), strict=True))
        results: list[list[Rendered] | RowProblem] = []
        for conversation, trace in zip(conversations, traces, strict=True):
            if isinstance(trace, RowProblem):
                results.append(trace)
                continue
            self._note_losses(conversation, trace)
            tokens = encoded.get(id(trace)) or self.encoder.encode_guarded(
                trace.text, [(a, b) for a, b, _ in trace.runs]
            )
            results.append([self._mask(conversation, trace, tokens)])
        return results

    def _check_roles(self, conversation: Conversation) -> None:
        """Raises RowProblem for a role that nothing knows: most templates would write it, and no model would answer it."""
        for number, message in enumerate(conversation.messages, 1):
            role = message.role
            if role in self.known_roles:
                continue
            names = sorted(self._named_roles)
            near = difflib.get_close_matches(role, names, n=1)
            raise RowProblem(
                "unknown role",
                f"message {number} has the role `{role}`, which neither `roles` nor the chat template "
                f"`{self.template.name}` names",
                (f"Did you mean `{near[0]}`? " if near else "")
                + f"Known: {', '.join(names)}. Others are mapped, for example `roles: {{assistant: [{role}]}}`.",
            )

    def _with_system(self, conversation: Conversation) -> Conversation:
        """The conversation, opened with `default_system_message` where it has no system turn of its own."""
        text = self.data.default_system_message
        if not text or not conversation.messages or conversation.messages[0].role == "system":
            return conversation
        messages = [Message("system", text), *conversation.messages]
        return Conversation(messages, conversation.tools, conversation.variables)

    def _note_losses(self, conversation: Conversation, trace: Trace) -> None:
        """Counts what a conversation holds and this template leaves out, so that `prepare` can tell."""
        text, name = self.template.text, self.template.name
        if conversation.tools and "tools" not in text:
            self.notes[f"the chat template `{name}` does not write the tools on offer"] += 1
        written = {(source.turn, source.kind) for *_, source in trace.runs}
        for i, message in enumerate(conversation.messages):
            if message.fields.get("tool_calls") and (i, "tool_calls") not in written:
                self.notes[f"the chat template `{name}` does not write tool calls"] += 1
            if "reasoning_content" in message.fields and "reasoning" not in text:
                self.notes[f"the chat template `{name}` does not write reasoning"] += 1
            if message.content and message.content.strip() and (i, "content") not in written:
                self.notes[
                    f"the chat template `{name}` does not write the text of a {message.role} turn"
                ] += 1

    def _is_quoting(self, trace: Trace) -> bool:
        """True where a message holds what looks like a control token."""
        if not self.guard or self.encoder.control_pattern is None:
            return False
        search = self.encoder.control_pattern.search
        at = 0
        while at < len(trace.runs):  # neighbouring runs are one text to whoever reads it
            start, end, _ = trace.runs[at]
            at += 1
            while at < len(trace.runs) and trace.runs[at][0] == end:
                end = trace.runs[at][1]
                at += 1
            if search(trace.text, start, end):
                return True
        return False

    def ranges(
        self, conversation: Conversation, trace: Trace
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The characters of a rendered conversation that are trained, and those masked inside them."""
        trained = [self._is_trained(m) for m in conversation.messages]
        return trained_ranges(self._turns(conversation, trace), trained, self.rule, trace.text)

    def _mask(self, conversation: Conversation, trace: Trace, tokens: Encoded) -> Rendered:
        return Rendered(tokens.ids, labels_of(tokens, *self.ranges(conversation, trace)))
