"""`train_on_eos`, `train_on_eot` and `train_detail` where turns, tokens and templates meet at their edges."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from axolotl.config.data import DataSection
from axolotl.data.formats import resolve_format
from axolotl.data.render import Renderer, build_renderer
from axolotl.data.templates import ChatTemplate
from axolotl.data.types import Conversation, DetailSpan, Message

FIXTURES = Path(__file__).parents[1] / "fixtures"
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "Is it far?"}
ANSWER = {"role": "assistant", "content": "No."}


@functools.cache
def tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(FIXTURES / name)


def built(template: str, name: str, entry: dict[str, Any], **data: Any) -> tuple[DataSection, Renderer]:
    given = {"path": "x.jsonl", "type": "chat_template", "chat_template": template, **entry}
    section = DataSection.model_validate({"datasets": [given], "sequence_len": 512, **data})
    return section, build_renderer(tokenizer(name), section, section.datasets[0])


def trained(
    template: str, messages: list[dict[str, Any]], name: str = "tiny-chatml", **entry: Any
) -> list[str]:
    """The texts of the trained stretches."""
    data = {"eot_tokens": entry.pop("eot_tokens", None)}
    section, renderer = built(template, name, entry, **data)
    convert = resolve_format(section.datasets[0], ["messages"], section).convert
    (result,) = renderer.render_batch([convert({"messages": messages})])
    assert isinstance(result, list)
    stretches: list[list[int]] = [[]]
    for token, label in zip(result[0].input_ids, result[0].labels, strict=True):
        if label == -100:
            stretches.append([])
        else:
            stretches[-1].append(token)
    return [tokenizer(name).decode(s) for s in stretches if s]


@pytest.mark.parametrize("template", ["chatml", "qwen_25", "qwen3", "qwen3_5", "phi_4", "qwen2_vl"])
def test_the_system_turn_that_a_template_writes_ahead_has_its_stop_token(template: str) -> None:
    messages = [SYSTEM, ASKED, ANSWER]
    found = trained(template, messages, train_on_eos="all")
    assert found == ["<|im_end|>", "<|im_end|>", "No.<|im_end|>"]
    found = trained(template, messages, roles_to_train=["system"])
    assert found == ["Be brief.<|im_end|>"]


def test_tools_behind_a_trained_system_text_are_not_its_own() -> None:
    section, renderer = built("qwen_25", "tiny-chatml", {"roles_to_train": ["system"]})
    row = {
        "messages": [{"role": "system", "content": "Be brief"}, ASKED, ANSWER],
        "tools": json.dumps([{"type": "function", "function": {"name": "far", "parameters": {}}}]),
    }
    value = resolve_format(section.datasets[0], list(row), section).convert(row)
    ((result,),) = renderer.render_batch([value])  # type: ignore[misc]
    learned = [i for i in result.labels if i != -100]
    assert tokenizer("tiny-chatml").decode(learned) == "Be brief<|im_end|>"


def test_last_is_the_last_trained_turn_that_has_a_stop_token() -> None:
    messages = [ASKED, ANSWER, {"role": "user", "content": "Walk?"}]  # nothing ends a question here
    found = trained("mistral_v3_tekken", messages, train_on_eos="last", roles_to_train=["user", "assistant"])
    assert found == ["Is it far?", "No.<|im_end|>", "Walk?"]


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({"train_on_eot": "all"}, 2),
        ({"train_on_eos": "all"}, 2),
        ({"train_on_eos": "none", "train_on_eot": "turn"}, 1),
        ({"train_on_eos": "none"}, 0),
        ({"train_on_eot": "none"}, 1),
        ({"train_on_eot": "none", "eot_tokens": ["<|im_end|>"]}, 0),
        ({"train_on_eot": "turn", "train_on_eos": "all", "eot_tokens": ["<|im_end|>"]}, 2),
    ],
)
def test_a_token_that_is_eos_and_end_of_turn_heeds_both_options(options: dict[str, Any], stops: int) -> None:
    assert "".join(trained("chatml", [ASKED, ANSWER], **options)).count("<|im_end|>") == stops


def test_an_option_that_does_not_narrow_is_told() -> None:
    _, renderer = built("chatml", "tiny-chatml", {"train_on_eot": "none"})
    (told,) = renderer.problems()
    assert told.kind == "warning" and "does not narrow" in told.message
    assert told.remedy == "Write `train_on_eos: none`."


def test_contradicting_options_on_one_token_are_an_error() -> None:
    entry = {"train_on_eos": "turn", "train_on_eot": "all"}
    _, renderer = built("chatml", "tiny-chatml", entry, eot_tokens=["<|im_end|>", "<|endoftext|>"])
    assert any("contradict each other" in p.message and p.kind != "warning" for p in renderer.problems())


def test_ranges_say_all_that_is_trained_of_a_turn() -> None:
    ranges = [{"begin_offset": 0, "end_offset": 2, "train": True}]
    answer = {**ANSWER, "reasoning_content": "Ten minutes.", "detail": ranges}
    option = {"message_field_training_detail": "detail"}
    assert trained("qwen3", [ASKED, answer], **option) == ["No.<|im_end|>"]
    assert trained("qwen3", [ASKED, {**answer, "detail": None}], **option) == [
        "Ten minutes.\n</think>\n\nNo.<|im_end|>"
    ]
    later = [{"role": "user", "content": "And back?"}, ANSWER]
    assert trained("chatml", [ASKED, {**answer, "detail": []}, *later], **option) == ["No.<|im_end|>"]


def test_ranges_within_split_thinking_leave_the_answer_masked() -> None:
    content = "<think>\nTen minutes.\n</think>\n\nNo."
    ranges = [{"begin_offset": 8, "end_offset": 19, "train": True}]
    answer = {"role": "assistant", "content": content, "detail": ranges}
    found = trained("qwen3", [ASKED, answer], message_field_training_detail="detail", split_thinking=True)
    assert "No" not in "".join(found) and found[0].startswith("Ten minutes.")


def test_json_of_a_text_keeps_its_ranges_or_is_masked() -> None:
    template = ChatTemplate("mine", "{% for m in messages %}{{ m.content | tojson }}|{% endfor %}")
    for content, kept in (("ab cd", '"ab '), ('ab "cd', "")):
        message = Message("assistant", content, detail=[DetailSpan(0, 2, True)])
        trace = template.trace(Conversation([message]), {})
        assert trace.text == json.dumps(content) + "|"
        learned = "".join(trace.text[a:b] for a, b, source in trace.runs if source.trained is not False)
        assert learned == kept
