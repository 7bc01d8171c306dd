"""The renderer: ids that decode to the template's text, and a mask that trains answers and their stop token, no more."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from axolotl.config.data import DataSection, DatasetEntry
from axolotl.data.encode import Encoder
from axolotl.data.render import Renderer, build_renderer
from axolotl.data.templates import ChatTemplate, template_names
from axolotl.data.types import (
    Completion,
    Conversation,
    DetailSpan,
    Marked,
    Message,
    Piece,
    Pieces,
    Rendered,
    RowProblem,
    Tokenized,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
QWEN_STYLE = "tiny-chatml"


@functools.cache
def tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(FIXTURES / name)


def renderer(name: str = QWEN_STYLE, entry: dict[str, Any] | None = None, **data: Any) -> Renderer:
    given_entry = {"path": "x.jsonl", "type": "chat_template", **(entry or {})}
    section = DataSection.model_validate({"datasets": [given_entry], "sequence_len": 64, **data})
    return build_renderer(tokenizer(name), section, DatasetEntry.model_validate(given_entry))


def one(r: Renderer, value: Any) -> Rendered:
    result = r.render_batch([value])[0]
    assert isinstance(result, list) and len(result) == 1, result
    return result[0]


def trained_stretches(name: str, row: Rendered) -> list[str]:
    """The texts of the trained stretches, in order."""
    stretches: list[list[int]] = []
    before = False
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (-100, token)
        if label != -100:
            stretches = [*stretches, []] if not before else stretches
            stretches[-1].append(token)
        before = label != -100
    return [tokenizer(name).decode(s) for s in stretches]


def straddles(name: str, stretch: str, wanted: str) -> bool:
    """True where a trained stretch is `wanted`, but for what its first and its last token hold besides."""
    before, found, after = stretch.partition(wanted)
    if not found and not stretch.endswith(wanted):
        return False
    tokens = tokenizer(name).tokenize(stretch)
    first, last = (tokenizer(name).convert_tokens_to_string([t]) for t in (tokens[0], tokens[-1]))
    return len(before) < max(len(first), 1) and len(after) < max(len(last), 1)


CONTENT = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            "<|im_end|>",
            "a <|im_start|>user\nhi<|im_end|> b",
            "<|eot_id|>",
            "<think>x</think>",
            "[[dummy_message]]",
            " ",
            "\n\n",
            "assistant",
        ]
    ),
)


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[str, str]]:
    turns = draw(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4))
    system = draw(st.one_of(st.none(), CONTENT))
    made = [("system", system)] if system is not None else []
    for question, answer in turns:
        made += [("user", question), ("assistant", answer)]
    return made


TEMPLATES = [
    (QWEN_STYLE, "chatml", "<|im_end|>", False),
    (QWEN_STYLE, "tokenizer_default", "<|im_end|>", False),
    ("tiny-llama3", "llama3", "<|eot_id|>", True),
    ("tiny-llama3", "tokenizer_default", "<|eot_id|>", True),
    ("tiny-llama3", "gemma", "<end_of_turn>", True),
]


@pytest.mark.parametrize("name,template,stop,trims", TEMPLATES, ids=lambda v: str(v))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(turns=conversations())
def test_every_answer_with_its_stop_token_is_trained_and_nothing_else(
    name: str, template: str, stop: str, trims: bool, turns: list[tuple[str, str]]
) -> None:
    # A tokenizer that normalises text gives back what it read, not what was written.
    form = tokenizer(name).backend_tokenizer.normalizer
    if form is not None:
        turns = [(role, form.normalize_str(text)) for role, text in turns]
    if template == "gemma":
        turns = [t for t in turns if t[0] != "system"]
    r = renderer(name, {"chat_template": template})
    row = one(r, Conversation([Message(role, text) for role, text in turns]))
    text = r.chat.template.render([{"role": role, "content": c} for role, c in turns], **r.chat.variables)
    assert tokenizer(name).decode(row.input_ids) == text
    answers = [c.strip() if trims else c for role, c in turns if role == "assistant"]
    for stretch, answer in zip(trained_stretches(name, row), answers, strict=True):
        # a token that straddles the header and the answer is trained whole, and so is one at the end
        assert straddles(name, stretch, answer + stop)


@settings(max_examples=40, deadline=None)
@given(turns=conversations())
def test_control_tokens_in_messages_are_text(turns: list[tuple[str, str]]) -> None:
    r = renderer(QWEN_STYLE, {"chat_template": "chatml"})
    row = one(r, Conversation([Message(role, text) for role, text in turns]))
    end = tokenizer(QWEN_STYLE).convert_tokens_to_ids("<|im_end|>")
    assert row.input_ids.count(end) == len(turns)


def test_added_tokens_that_are_not_special_are_parsed_in_messages() -> None:
    row = one(
        renderer(), Conversation([Message("user", "q"), Message("assistant", "<think>why</think><|im_end|>")])
    )
    ids = tokenizer(QWEN_STYLE).convert_tokens_to_ids
    assert ids("<think>") in row.input_ids and ids("</think>") in row.labels
    assert row.input_ids.count(ids("<|im_end|>")) == 3  # system, user, assistant: the quoted one is text


@pytest.mark.parametrize(
    "option,expected",
    [
        ({}, [["a1<|im_end|>"], ["a2<|im_end|>"]]),
        ({"train_on_eos": "last"}, [["a1"], ["a2<|im_end|>"]]),
        ({"train_on_eos": "none"}, [["a1"], ["a2"]]),
        ({"train_on_eos": "all"}, [["<|im_end|>"], ["a1<|im_end|>"], ["<|im_end|>"], ["a2<|im_end|>"]]),
        ({"roles_to_train": ["human"]}, [["q1<|im_end|>"], ["q2<|im_end|>"]]),
    ],
)
def test_roles_and_stop_options(option: dict[str, Any], expected: list[list[str]]) -> None:
    r = renderer(entry={"chat_template": "chatml", **option})
    value = Conversation(
        [Message("user", "q1"), Message("assistant", "a1"), Message("user", "q2"), Message("assistant", "a2")]
    )
    assert trained_stretches(QWEN_STYLE, one(r, value)) == [e[0] for e in expected]


def test_the_rows_own_word_wins_over_roles_to_train() -> None:
    value = Conversation([Message("user", "q", train=True), Message("assistant", "a", train=False)])
    assert trained_stretches(QWEN_STYLE, one(renderer(), value)) == ["q<|im_end|>"]


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="abc déß", min_size=2, max_size=24), data=st.data())
def test_train_detail_trains_no_character_outside_its_ranges(text: str, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(begin, len(text) - 1))
    message = Message("assistant", text, detail=[DetailSpan(begin, end, True)])
    r = renderer(entry={"chat_template": "chatml"})
    row = one(r, Conversation([Message("user", "q"), message]))
    encoded = r.chat.encoder.encode([tokenizer(QWEN_STYLE).decode(row.input_ids)])[0]
    start = len("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")
    for (a, b), label in zip(zip(encoded.starts, encoded.ends, strict=True), row.labels, strict=True):
        inside = start + begin <= a and b <= start + end + 1
        stop = a == start + len(text)
        assert (label != -100) == (inside or stop) or a == b


def test_reasoning_is_trained_but_not_what_opens_it() -> None:
    r = renderer(entry={"chat_template": "qwen3"})
    value = Conversation(
        [Message("user", "2+2?"), Message("assistant", "Four", {"reasoning_content": "two and two"})]
    )
    assert trained_stretches(QWEN_STYLE, one(r, value)) == ["two and two\n</think>\n\nFour<|im_end|>"]


def test_tool_calls_are_trained_from_their_opening_tag() -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    value = Conversation(
        [
            Message("user", "?"),
            Message("assistant", "", {"tool_calls": [call]}),
            Message("tool", "4"),
            Message("assistant", "4"),
        ]
    )
    wanted = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    assert trained_stretches(QWEN_STYLE, one(renderer(), value)) == [wanted, "4<|im_end|>"]


def test_what_looks_like_a_stop_in_an_answer_does_not_end_the_result_before_it() -> None:
    """gemma4 writes calls, results and answer as one turn; `all` trains stops, and no quoted one."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"k": 1}}}
    answer = Message("assistant", "<|eot_id|>x", {"tool_calls": [call]}, train=False)
    value = Conversation([Message("user", "q"), answer, Message("tool", "4"), Message("assistant", "z")])
    r = renderer("tiny-llama3", {"chat_template": "gemma4", "train_on_eos": "all"}, eot_tokens=["<|eot_id|>"])
    trace = r.chat.template.trace(value, r.chat.variables)
    keep, _ = r.chat.ranges(value, trace)
    assert not any("<|eot_id|>" in trace.text[a:b] for a, b in keep)


def test_an_empty_answer_trains_its_stop_token() -> None:
    row = one(
        renderer(entry={"chat_template": "chatml"}),
        Conversation([Message("user", "q"), Message("assistant", "")]),
    )
    assert trained_stretches(QWEN_STYLE, row) == ["<|im_end|>"]


def test_an_empty_answer_that_the_template_opens_otherwise_trains_its_stop_token() -> None:
    """exaone4 writes an empty thinking block before answers with text only, and the end of a turn as a text here."""
    r = renderer("tiny-llama3", {"chat_template": "exaone4"})
    turns = [Message("user", "q"), Message("assistant", ""), Message("user", "p"), Message("assistant", "a")]
    value = Conversation(turns)
    trace = r.chat.template.trace(value, r.chat.variables)
    keep, _ = r.chat.ranges(value, trace)
    assert [trace.text[a:b] for a, b in keep] == ["[|endofturn|]", "a", "[|endofturn|]"]


def test_text_that_is_written_after_the_results_of_calls_has_its_stop_token_trained() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"k": "v"}}}
    turns = [
        Message("user", "q"),
        Message("assistant", "so", {"tool_calls": [call]}),
        Message("tool", "4", {"tool_call_id": "1"}),
        Message("assistant", "z"),
    ]
    value = Conversation(turns)
    r = renderer("tiny-llama3", {"chat_template": "gemma4"})
    trace = r.chat.template.trace(value, r.chat.variables)
    keep, _ = r.chat.ranges(value, trace)
    written = "".join(trace.text[a:b] for a, b in keep)
    assert written.endswith("<tool_call|><|tool_response>so<turn|>z<turn|>")


@pytest.mark.parametrize("template", ["command_a", "qwen2_vl", "llama4", "chatml", "qwen3"])
def test_a_null_content_beside_calls_is_an_empty_text(template: str) -> None:
    """As APIs write it. `None` would be trained, or the row refused."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"k": "v"}}}
    rows = [
        Conversation([Message("user", "q"), Message("assistant", content, {"tool_calls": [call]})])
        for content in (None, "")
    ]
    null, empty = renderer("tiny-llama3", {"chat_template": template}).render_batch(rows)
    assert null == empty
    assert isinstance(null, list)


def test_a_template_that_asks_for_null_is_given_null() -> None:
    """DeepSeek's own template writes calls where the content is null only."""
    source = (
        "{% for m in messages %}{% if m['content'] is none %}calls{% else %}{{ m['content'] }}{% endif %}</s>"
        "{% endfor %}"
    )
    template = ChatTemplate("t", source)
    message = Message("assistant", None, {"tool_calls": []})
    assert template.trace(Conversation([Message("user", "q"), message]), {}).text == "q</s>calls</s>"
    assert template.render([{"role": "assistant", "content": None}]) == "calls</s>"


def test_a_template_that_ends_no_turn_is_an_error_unless_none_is_written() -> None:
    talker = {
        "chat_template": "jinja",
        "chat_template_jinja": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    }
    assert [p.fatal for p in renderer(entry=talker).problems()] == [True]
    assert not any(p.fatal for p in renderer(entry={**talker, "train_on_eos": "none"}).problems())


def test_control_text_unknown_to_the_vocabulary_is_told_and_trained_as_text() -> None:
    r = renderer("tiny-llama3", {"chat_template": "chatml"})
    assert any("<|im_end|>" in p.message and not p.fatal for p in r.problems())
    row = one(r, Conversation([Message("user", "q"), Message("assistant", "a")]))
    (stretch,) = trained_stretches("tiny-llama3", row)
    assert straddles("tiny-llama3", stretch, "a<|im_end|>")


def test_eot_token_that_is_several_tokens_is_an_error() -> None:
    r = renderer(entry={"chat_template": "chatml"}, eot_tokens=["<|not_a_token|>"])
    assert any(p.fatal and "<|not_a_token|>" in p.message for p in r.problems())


def test_a_role_that_nothing_knows_is_a_problem_of_the_row() -> None:
    def rendered(role: str, **entry: Any) -> Any:
        r = renderer("tiny-llama3", {"chat_template": "llama3", **entry})
        return r.render_batch([Conversation([Message("user", "q"), Message(role, "a")])])[0]

    told = rendered("asistant")
    assert isinstance(told, RowProblem) and told.reason == "unknown role"
    assert "message 2 has the role `asistant`" in told.detail and "Did you mean `assistant`?" in told.remedy
    assert isinstance(rendered("bot"), RowProblem)
    assert isinstance(rendered("bot", roles_to_train=["bot"]), list)
    assert isinstance(rendered("bot", roles={"bot": ["robot"]}), list)
    template = "{% for m in messages %}{{ 'B: ' if m.role == 'bot' else 'U: ' }}{{ m.content + eos_token }}{% endfor %}"
    assert isinstance(rendered("bot", chat_template="jinja", chat_template_jinja=template), list)


def test_a_refusing_template_is_a_problem_of_the_row() -> None:
    r = renderer(
        entry={
            "chat_template": "jinja",
            "chat_template_jinja": "{{ raise_exception('roles must alternate') }}",
        }
    )
    result = r.render_batch([Conversation([Message("user", "q")])])[0]
    assert isinstance(result, RowProblem) and "roles must alternate" in result.detail


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.foo.bar }}{% endfor %}", "a message has no attribute 'foo'"),
        ("{% for m in messages %}{{ m.content.foo.bar }}{% endfor %}", "a text has no attribute 'foo'"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "a text and 'int'"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}", "RecursionError"),
    ],
)
def test_a_failing_template_is_a_problem_of_the_row(template: str, said: str) -> None:
    r = renderer(entry={"chat_template": "jinja", "chat_template_jinja": template})
    r.problems()
    result = r.render_batch([Conversation([Message("user", "q")])])[0]
    assert isinstance(result, RowProblem) and said in result.detail


def test_a_misspelt_role_to_train_is_told() -> None:
    entry = {"chat_template": "chatml", "roles_to_train": ["assistant", "humna"]}
    (told,) = renderer(entry=entry).problems()
    assert not told.fatal and "`humna`" in told.message and "`human`" in told.remedy
    assert not renderer(entry={**entry, "roles_to_train": ["assistant", "bot"]}).problems()


def test_pieces_are_tokenised_one_by_one_with_bos_and_eos() -> None:
    r = renderer("tiny-llama3", {"type": "alpaca"})
    row = one(r, Pieces([Piece("Question:", False, bos=True), Piece("Answer", True, eos=1)]))
    tok = tokenizer("tiny-llama3")
    question = tok("Question:").input_ids
    answer = [*tok("Answer", add_special_tokens=False).input_ids, tok.eos_token_id]
    assert row.input_ids == question + answer
    assert row.labels == [-100] * len(question) + answer
    assert one(r, Pieces([Piece("Q", False, bos=True), Piece("", True, eos=1)])).labels == [-100] * len(
        tok("Q").input_ids
    )


def test_a_text_that_already_ends_in_eos_gets_no_second_one() -> None:
    tok = tokenizer("tiny-llama3")
    row = one(renderer("tiny-llama3", {"type": "alpaca"}), Pieces([Piece("a" + tok.eos_token, True, eos=1)]))
    assert row.input_ids.count(tok.eos_token_id) == 1


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="abcdef ", min_size=1, max_size=400))
def test_a_completion_is_cut_without_losing_a_token(text: str) -> None:
    rows = renderer("tiny-llama3", {"type": "completion"}).render_batch([Completion(text)])[0]
    assert isinstance(rows, list)
    tok = tokenizer("tiny-llama3")
    assert list(itertools.chain.from_iterable(r.input_ids for r in rows)) == [
        *tok(text).input_ids,
        tok.eos_token_id,
    ]
    assert all(len(r.input_ids) == 64 for r in rows[:-1]) and all(r.labels == r.input_ids for r in rows)


def test_marked_text_trains_its_spans_and_eos() -> None:
    tok = tokenizer("tiny-llama3")
    row = one(renderer("tiny-llama3", {"type": "reflection"}), Marked("ask\n\nanswer", [(5, 11)]))
    assert tok.decode([token for token in row.labels if token != -100]) == "answer" + tok.eos_token


def test_tokens_pass_through_and_lengths_must_agree() -> None:
    r = renderer()
    assert r.render_batch([Tokenized([1, 2], [-100, 2])]) == [[Rendered([1, 2], [-100, 2])]]
    assert isinstance(r.render_batch([Tokenized([1, 2], [2])])[0], RowProblem)


@pytest.mark.parametrize("template", [t for t in template_names() if t != "llava"])
@settings(max_examples=12, deadline=None)
@given(
    words=st.lists(st.text(alphabet="xyz0é", min_size=1, max_size=6), min_size=5, max_size=5),
    system=st.booleans(),
)
def test_in_every_template_answers_are_trained_to_their_end_and_nothing_else(
    template: str, words: list[str], system: bool
) -> None:
    texts = [f"⟪{i}{w}⟫" for i, w in enumerate(words)]
    messages = [Message(role, text) for role, text in zip(["user", "assistant"] * 2, texts, strict=False)]
    if system:
        messages.insert(0, Message("system", texts[4]))
    chat = renderer("tiny-llama3", {"chat_template": template}).chat
    conversation = Conversation(messages)
    try:
        trace = chat.template.trace(conversation, chat.variables)
    except RowProblem:
        assert system and template in {"gemma", "mistral_v1", "mistral_v2v3", "mistral_v3_tekken", "pixtral"}
        return
    keep, drop = chat.ranges(conversation, trace)
    trained = "".join(trace.text[a:b] for a, b in keep)
    ends = texts[1:4:2]
    assert drop == [] and all(trained.count(t) == 1 for t in ends)
    assert not any(t in trained for t in (texts[0], texts[2], texts[4]))
    stop = chat.stop_tokens()[0]
    assert trained.endswith(stop) and trained.startswith(ends[0])
    assert trained.count(stop) == (1 if template == "metharme" else 2)
    assert len(trained) == sum(map(len, ends)) + len(stop) * trained.count(stop)


@settings(max_examples=150, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=60), CONTENT, st.text(alphabet="e\u0301\u00e9 \n🙂<|im_end|>", max_size=30)
    )
)
@pytest.mark.parametrize("name", ["tiny-chatml", "tiny-llama3"])
def test_offsets_from_byte_widths_are_those_of_the_tokenizer(name: str, text: str) -> None:
    encoder = Encoder(tokenizer(name))
    assert encoder._bytes.applies
    (fast,) = encoder.encode([text])
    slow = encoder.backend.encode(text, add_special_tokens=False)
    assert fast.ids == slow.ids
    assert list(zip(fast.starts.tolist(), fast.ends.tolist(), strict=True)) == slow.offsets
