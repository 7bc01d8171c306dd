"""The bundled chat templates write the published format of each model family, byte for byte."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.data.templates import FOLDER, load_template, render_chat_template, template_names
from axolotl.data.types import Conversation, Message
from axolotl.errors import DataError

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "templates"
RENDERED: dict[str, dict[str, Any]] = json.loads((GOLDENS / "rendered.json").read_text(encoding="utf-8"))
CONVERSATIONS: dict[str, Any] = json.loads((GOLDENS / "conversations.json").read_text(encoding="utf-8"))
NAMES = sorted(RENDERED)

# takes white space from the ends of what an assistant says
TRIMMING = {
    *("aya", "cohere", "gemma", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "llama3", "metharme"),
    "mistral_v2v3",
}
# takes line breaks from the start of what an assistant says
LEADING_BREAKS = {"qwen3", "qwen3_5"}
NO_SYSTEM = {"gemma"}
# writes EOS at the end of a conversation and in its place the opening of an answer
NOT_A_SUFFIX = {"metharme"}
# nothing tells that an answer is expected: [/INST] does, or the opening is always there
NO_GENERATION_PROMPT = {
    *("mistral_v1", "mistral_v2v3", "mistral_v3_tekken", "mistral_v7_tekken", "pixtral"),
    *("phi_3", "command_a_rag", "command_a_tool_use"),
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The {name} of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
    for name in ("weather", "time")
]


def render(name: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    given_ = {"bos_token": "<s>", "eos_token": "</s>", "date_string": "26 Jul 2024", **variables}
    return load_template(name).render(messages, **given_)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def call(name: str, arguments: Any, number: int) -> dict[str, Any]:
    return {
        "id": f"call0000{number}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def result(content: str, number: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "content": content}


def two_calls(as_text: bool = False) -> list[dict[str, Any]]:
    """A question that is answered with the results of two calls made at once."""
    arguments: Any = '{"city": "Åre"}' if as_text else {"city": "Åre"}
    return [
        user("Weather and time?"),
        assistant("", tool_calls=[call("weather", arguments, 1), call("time", arguments, 2)]),
        result("cold", 1),
        result("noon", 2),
        assistant("Cold, noon."),
    ]


def after(text: str, mark: str) -> str:
    assert mark in text
    return text.partition(mark)[2]


def test_there_is_one_template_for_each_known_name() -> None:
    assert template_names() == NAMES


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in NAMES for case in RENDERED[name]], ids=lambda v: v
)
def test_writes_the_recorded_text(name: str, case: str) -> None:
    expected, given_ = RENDERED[name][case], CONVERSATIONS[case]
    if "text" in expected:
        assert render(name, **given_) == expected["text"]
    else:
        with pytest.raises(Exception) as caught:
            render(name, **given_)
        assert type(caught.value).__name__ == expected["error"]


@pytest.mark.parametrize("name", NAMES)
def test_file_begins_with_a_comment_that_says_what_it_is_for(name: str) -> None:
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    first = text.splitlines()[0]
    assert first.startswith("{#- ")
    assert first.endswith(". -#}")


@pytest.mark.parametrize("name", NAMES)
def test_two_turns_and_a_system_text_in_any_script(name: str) -> None:
    said = ["Где Ōsaka? 🗾", "日本に。", "ȧ\u0301\u200d?", "Ja — «ja»\nnoch eine Zeile."]
    messages = [user(said[0]), assistant(said[1]), user(said[2]), assistant(said[3])]
    text = render(name, messages)
    at = -1
    for content in said:
        at = text.find(content, at + 1)
        assert at >= 0, content
    with_system = [{"role": "system", "content": "Sei höflich."}, *messages[:1]]
    if name in NO_SYSTEM:
        with pytest.raises(jinja2.TemplateError, match="System role"):
            render(name, with_system)
    else:
        assert "Sei höflich." in render(name, with_system, add_generation_prompt=True)


_TEXTS = st.text(
    st.characters(exclude_characters="<>[]|", exclude_categories=["Cs"]), min_size=1, max_size=30
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None)
@given(said=st.lists(_TEXTS.filter(str.strip), min_size=2, max_size=6).map(lambda s: s[: len(s) // 2 * 2]))
def test_answers_stand_in_the_text_as_they_are(name: str, said: list[str]) -> None:
    messages = [user(s) if i % 2 == 0 else assistant(s) for i, s in enumerate(said)]
    text = render(name, messages)
    at = 0
    for answer in said[1::2]:
        if name in TRIMMING:
            answer = answer.strip()
        elif name in LEADING_BREAKS:
            answer = answer.lstrip("\n")
        at = text.find(answer, at) + len(answer)
        assert at >= len(answer), answer


@pytest.mark.parametrize("name", NAMES)
def test_generation_prompt_only_adds_to_the_text(name: str) -> None:
    messages = [user("2+2?"), assistant("4"), user("3+3?")]
    plain, prompting = render(name, messages), render(name, messages, add_generation_prompt=True)
    if name in NOT_A_SUFFIX:
        assert plain == plain.removesuffix("</s>") + "</s>"
        assert prompting == plain.removesuffix("</s>") + "<|model|>"
    else:
        assert prompting.startswith(plain)
        assert (prompting == plain) == (name in NO_GENERATION_PROMPT)


@pytest.mark.parametrize("name", NAMES)
def test_tracing_writes_the_same_text(name: str) -> None:
    messages = [user("Why?"), assistant("Because.", reasoning_content="Hm."), user("And?"), assistant("So.")]
    variables = {"bos_token": "<s>", "eos_token": "</s>", "date_string": "26 Jul 2024"}
    traced = load_template(name).trace(
        Conversation([Message(m.pop("role"), m.pop("content"), m) for m in map(dict, messages)]), variables
    )
    assert traced.text == render(name, messages)
    own = [traced.text[a:b] for a, b, source in traced.runs if source.kind == "content"]
    assert own == ["Why?", "Because.", "And?", "So."]


@pytest.mark.parametrize("name", ["aya", "cohere", "gemma", "gemma3", "gemma3n", "mistral_v1", "pixtral"])
def test_turns_must_alternate(name: str) -> None:
    with pytest.raises(jinja2.TemplateError, match="must alternate"):
        render(name, [user("a"), user("b")])


# tools --------------------------------------------------------------------------------------------------------------

_QWEN_CALLS = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Åre"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {"city": "Åre"}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\ncold\n</tool_response>\n<tool_response>\nnoon\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n"
)
TWO_CALLS = {
    "qwen_25": "<|im_start|>assistant\n" + _QWEN_CALLS + "Cold, noon.<|im_end|>\n",
    "qwen3": "<|im_start|>assistant\n" + _QWEN_CALLS + "<think>\n\n</think>\n\nCold, noon.<|im_end|>\n",
    "qwen3_5": "<|im_start|>assistant\n" + _QWEN_CALLS + "<think>\n\n</think>\n\nCold, noon.<|im_end|>\n",
    "exaone4": "[|assistant|]\n<think>\n\n</think>\n\n"
    '<tool_call>{"name": "weather", "arguments": {"city": "Åre"}}</tool_call>\n'
    '<tool_call>{"name": "time", "arguments": {"city": "Åre"}}</tool_call>[|endofturn|]\n'
    '[|tool|]\n<tool_result>{"result": "cold"}</tool_result>\n'
    '<tool_result>{"result": "noon"}</tool_result>[|endofturn|]\n'
    "[|assistant|]\n<think>\n\n</think>\n\nCold, noon.[|endofturn|]\n",
    "gemma4": '<|turn>model\n<|tool_call>call:weather{city:<|"|>Åre<|"|>}<tool_call|>'
    '<|tool_call>call:time{city:<|"|>Åre<|"|>}<tool_call|>'
    '<|tool_response>response:weather{value:<|"|>cold<|"|>}<tool_response|>'
    '<|tool_response>response:time{value:<|"|>noon<|"|>}<tool_response|>Cold, noon.<turn|>\n',
    "jamba": '<|bom|><|assistant|> <tool_calls>[\n    {"name": "weather", "arguments": {"city": "Åre"}},\n'
    '    {"name": "time", "arguments": {"city": "Åre"}}\n]</tool_calls><|eom|>'
    "<|bom|><|tool|> cold<|eom|><|bom|><|tool|> noon<|eom|><|bom|><|assistant|> Cold, noon.<|eom|>",
    "llama4": "<|header_start|>assistant<|header_end|>\n\n<|python_start|><|python_end|>"
    '{"name": "weather", "parameters": {"city": "Åre"}}{"name": "time", "parameters": {"city": "Åre"}}<|eot|>'
    '<|header_start|>ipython<|header_end|>\n\n"cold"<|eot|><|header_start|>ipython<|header_end|>\n\n"noon"<|eot|>'
    "<|header_start|>assistant<|header_end|>\n\nCold, noon.<|eot|>",
    "mistral_v2v3": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Åre"}, "id": "call00001"}, '
    '{"name": "time", "arguments": {"city": "Åre"}, "id": "call00002"}]</s>'
    '[TOOL_RESULTS] {"content": cold, "call_id": "call00001"}[/TOOL_RESULTS]'
    '[TOOL_RESULTS] {"content": noon, "call_id": "call00002"}[/TOOL_RESULTS] Cold, noon.</s>',
    "command_a_tool_use": "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|>"
    '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "weather", "parameters": {"city": "Åre"}},\n'
    '    {"tool_call_id": "1", "tool_name": "time", "parameters": {"city": "Åre"}}\n]<|END_ACTION|>'
    "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[\n"
    '    {\n        "tool_call_id": "0",\n        "results": {\n            "0": "cold"\n        },\n'
    '        "is_error": null\n    },\n'
    '    {\n        "tool_call_id": "1",\n        "results": {\n            "0": "noon"\n        },\n'
    '        "is_error": null\n    }\n]<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>'
    "<|CHATBOT_TOKEN|><|START_RESPONSE|>Cold, noon.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
}
TWO_CALLS["gemma4_unified"] = TWO_CALLS["gemma4"]


@pytest.mark.parametrize("name", sorted(TWO_CALLS))
def test_two_calls_at_once_and_their_results(name: str) -> None:
    assert render(name, two_calls(), tools=TOOLS).endswith(TWO_CALLS[name])


def test_deepseek_v3_takes_arguments_as_text_and_drops_thinking() -> None:
    text = render("deepseek_v3", [*two_calls(as_text=True), user("Why?"), assistant("<think>hm</think>So.")])
    body = '\n```json\n{"city": "Åre"}\n```<｜tool▁call▁end｜>'
    assert after(text, "<｜Assistant｜>") == (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather" + body + "\n"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>time" + body + "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>cold<｜tool▁output▁end｜>"
        "<｜tool▁output▁begin｜>noon<｜tool▁output▁end｜><｜tool▁outputs▁end｜>Cold, noon.<｜end▁of▁sentence｜>"
        "<｜User｜>Why?<｜Assistant｜>So.<｜end▁of▁sentence｜>"
    )


def test_llama3_2_vision_makes_one_call_at_a_time() -> None:
    with pytest.raises(jinja2.TemplateError, match="single tool-calls"):
        render("llama3_2_vision", two_calls(), tools=TOOLS)


@pytest.mark.parametrize("name", ["mistral_v2v3", "mistral_v3_tekken"])
def test_mistral_refuses_call_ids_of_another_length(name: str) -> None:
    messages = two_calls()
    messages[1]["tool_calls"][0]["id"] = "short"
    with pytest.raises(jinja2.TemplateError, match="length 9"):
        render(name, messages, tools=TOOLS)


@pytest.mark.parametrize("name", ["mistral_v2v3", "mistral_v3_tekken", "pixtral"])
def test_mistral_puts_the_system_text_before_a_last_question(name: str) -> None:
    messages = [{"role": "system", "content": "Sys."}, user("a"), assistant("b"), user("c")]
    text = render(name, messages)
    assert "Sys.\n\nc[/INST]" in text
    assert text.count("Sys.") == 1
    assert "Sys." not in render(name, messages[:3])


# thinking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5"])
@pytest.mark.parametrize("inline", [True, False])
def test_qwen_keeps_the_thoughts_after_the_last_question_only(name: str, inline: bool) -> None:
    def thinking(thought: str, answer: str) -> dict[str, Any]:
        if inline:
            return assistant(f"<think>\n{thought}\n</think>\n\n{answer}")
        return assistant(answer, reasoning_content=thought)

    text = render(name, [user("a"), thinking("old", "A."), user("b"), thinking("new", "B.")])
    assert text == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n<think>\nnew\n</think>\n\nB.<|im_end|>\n"
    )
    off = render(name, [user("a")], add_generation_prompt=True, enable_thinking=False)
    assert off.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_exaone4_writes_the_last_thoughts_on_request() -> None:
    messages = [
        user("a"),
        assistant("A.", reasoning_content="old"),
        user("b"),
        assistant("<think>new</think>B."),
    ]
    assert render("exaone4", messages).count("<think>\n\n</think>") == 2
    text = render("exaone4", messages, skip_think=False)
    assert text.endswith("[|assistant|]\n<think>\nnew\n</think>\n\nB.[|endofturn|]\n")
    assert "old" not in text
    thinking = render("exaone4", messages[:1], add_generation_prompt=True, enable_thinking=True)
    assert thinking.endswith("[|assistant|]\n<think>\n")


@pytest.mark.parametrize("name", ["gemma4", "gemma4_unified"])
def test_gemma4_thinks_in_a_channel(name: str) -> None:
    calls = two_calls()
    calls[1]["reasoning_content"] = "look it up"
    assert "<|channel>thought\nlook it up\n<channel|><|tool_call>" in render(name, calls)
    assert "look it up" not in render(name, [*calls, user("Thanks.")])
    plain = [user("a"), assistant("<|channel>thought\nhm\n<channel|>A.", reasoning_content="hm")]
    assert render(name, plain).endswith("<|turn>model\nA.<turn|>\n")
    assert "<|channel>thought\nhm\n<channel|>A." in render(name, plain, preserve_thinking=True)
    prompt = render(name, plain[:1], add_generation_prompt=True, enable_thinking=True)
    assert prompt == "<s><|turn>system\n<|think|>\n<turn|>\n<|turn>user\na<turn|>\n<|turn>model\n"
    open_call = render(name, calls[:2], add_generation_prompt=True)
    assert open_call.endswith("<tool_call|><|tool_response>")


def test_gemma4_declares_every_kind_of_parameter() -> None:
    properties = {
        "b": {"type": "array", "description": "many", "items": {"type": "string"}},
        "A": {"type": "string", "enum": ["x", "y"], "nullable": True},
        "c": {"type": "object", "properties": {"d": {"type": "number"}}, "required": ["d"]},
    }
    tool = {"name": "f", "description": "F", "parameters": {"type": "object", "properties": properties}}
    text = render("gemma4", [user("a")], tools=[{"type": "function", "function": tool}])
    assert (
        after(text, "properties:")
        .replace('<|"|>', "'")
        .startswith(
            "{A:{enum:['x','y'],nullable:true,type:'STRING'},"
            "b:{description:'many',items:{type:'STRING'},type:'ARRAY'},"
            "c:{properties:{d:{type:'NUMBER'}},required:['d'],type:'OBJECT'}},type:'OBJECT'}}<tool|>"
        )
    )


# pictures, documents, dates -----------------------------------------------------------------------------------------

IMAGE = {"type": "image"}
PLACEHOLDERS = {
    "gemma3": "<start_of_image>Look.",
    "gemma3n": "<image_soft_token>Look.",
    "gemma4": "<|image|>Look.",
    "gemma4_unified": "<|image|>Look.",
    "llama3_2_vision": "<|image|>Look.",
    "llama4": "<|image|>Look.",
    "llava": "USER: <image>\nLook. ",
    "mistral_v7_tekken": "[INST][IMG]Look.[/INST]",
    "pixtral": "[INST][IMG]Look.[/INST]",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>Look.<|im_end|>",
    "qwen3_5": "<|vision_start|><|image_pad|><|vision_end|>Look.<|im_end|>",
}


@pytest.mark.parametrize("name", sorted(PLACEHOLDERS))
def test_pictures_are_placeholders(name: str) -> None:
    messages = [
        user([IMAGE, {"type": "text", "text": "Look."}]),
        assistant([{"type": "text", "text": "I see."}]),
    ]
    text = render(name, messages)
    assert PLACEHOLDERS[name] in text
    assert "I see." in after(text, "Look.")


def test_llama3_2_vision_leaves_the_system_turn_out_with_pictures() -> None:
    messages = [user([IMAGE, {"type": "text", "text": "Look."}])]
    assert render("llama3_2_vision", messages) == (
        "<s><|start_header_id|>user<|end_header_id|>\n\n<|image|>Look.<|eot_id|>"
    )
    with pytest.raises(jinja2.TemplateError, match="incompatible with system"):
        render("llama3_2_vision", [{"role": "system", "content": "Sys."}, *messages])


def test_qwen2_vl_counts_pictures_and_videos_on_request() -> None:
    text = render("qwen2_vl", [user([IMAGE, {"type": "video"}, IMAGE])], add_vision_id=True)
    marks = [text.find(m) for m in ("Picture 1: <|vision", "Video 1: <|vision", "Picture 2: <|vision")]
    assert marks == sorted(marks)
    assert marks[0] > 0


@pytest.mark.parametrize("name", ["command_a", "command_a_rag", "command_a_tool_use"])
def test_command_a_gives_documents_as_the_result_of_a_first_call(name: str) -> None:
    documents = [{"title": "t", "text": "é"}, {"text": "two"}]
    text = render(name, [user("Q"), assistant("A")], documents=documents, tools=TOOLS)
    assert ('"name": "weather"' in text) == (name == "command_a_tool_use")
    shown = after(text, "<|USER_TOKEN|>Q<|END_OF_TURN_TOKEN|>")
    assert shown.startswith("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|>I will look")
    assert (
        '"results": {\n            "0": {"title": "t", "text": "é"},\n            "1": {"text": "two"}\n        },\n'
        in shown
    )
    assert "<|START_RESPONSE|>A<|END_RESPONSE|><|END_OF_TURN_TOKEN|>" in shown


def test_command_a_knows_a_strict_mode() -> None:
    assert "You are in strict safety mode." in render("command_a", [user("Q")], safety_mode="STRICT")


def test_jamba_puts_documents_before_the_last_question() -> None:
    text = render(
        "jamba", [user("a"), assistant("b"), user("c")], documents=[{"title": "T", "text": "X", "url": "u"}]
    )
    assert after(text, "<|bom|><|assistant|> b<|eom|>") == (
        "<|bom|><|system|> <documents>\n# Documents\n\nYou can use the following documents for reference:"
        "\n\n## Document ID: 0\nTitle: T\nUrl: u\nText: X\n</documents><|eom|><|bom|><|user|> c<|eom|>"
    )


def test_mistral_v7_tells_the_date_of_today() -> None:
    before = date.today()
    text = render("mistral_v7_tekken", [user("a"), assistant("b")])
    assert any(f"The current date is {d.isoformat()}.\n\n" in text for d in (before, date.today()))
    assert text.endswith("[/SYSTEM_PROMPT][INST]a[/INST]b</s>")


@pytest.mark.parametrize(
    "messages", [[{"role": "assistant", "content": "a"}], [{"role": "user"}, {"role": "user"}]]
)
def test_what_a_template_refuses_is_told_in_our_words(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="`mistral_v1` does not render"):
        render_chat_template("mistral_v1", messages)
