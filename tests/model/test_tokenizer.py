"""The tokenizer is what the config says, and reloads as it was saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from axolotl.config.model import ModelSection
from axolotl.errors import ModelError
from axolotl.model.tokenizer import load_tokenizer, new_token_ids

FIXTURES = Path(__file__).parents[1] / "fixtures"
LLAMA, CHATML = str(FIXTURES / "tiny-llama3"), str(FIXTURES / "tiny-chatml")


def section(base: str = LLAMA, **keys: Any) -> ModelSection:
    return ModelSection.model_validate({"base_model": base, **keys})


def reloaded(tokenizer: Any, folder: Path) -> Any:
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_plain_load_keeps_bos_and_finds_a_pad_token_that_is_no_eos() -> None:
    tokenizer = load_tokenizer(section())
    assert tokenizer("hi")["input_ids"][0] == tokenizer.bos_token_id == 4080
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert tokenizer.padding_side == "right"
    assert len(tokenizer) == 4096
    assert new_token_ids(tokenizer) == []


def test_an_existing_pad_token_is_kept() -> None:
    assert load_tokenizer(section(CHATML)).pad_token == "<|endoftext|>"


def test_special_tokens_that_exist_keep_their_ids() -> None:
    special = {"pad_token": "<|end_of_text|>", "eos_token": "<|eot_id|>"}
    tokenizer = load_tokenizer(section(special_tokens=special))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (4084, 4081, 4096)


def test_a_new_bos_replaces_the_old_one_in_front(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(section(special_tokens={"bos_token": "<|python_tag|>"}))
    for each in (tokenizer, reloaded(tokenizer, tmp_path)):
        ids = each("hi")["input_ids"]
        assert ids[0] == 4086
        assert 4080 not in ids
        assert each("a", "b")["input_ids"].count(4086) == 2


def test_absent_special_tokens_are_added_and_known_as_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    special = {
        "pad_token": "<my_pad>",
        "eos_token": "<my_eos>",
        "additional_special_tokens": ["<x>", "<|eot_id|>"],
    }
    tokenizer = load_tokenizer(section(special_tokens=special))
    assert len(tokenizer) == 4096 + 3
    # the pad token's row is never trained
    assert new_token_ids(tokenizer) == sorted(tokenizer.convert_tokens_to_ids(["<my_eos>", "<x>"]))
    assert "grows by 3" in capsys.readouterr().err
    again = reloaded(tokenizer, tmp_path)
    assert (again.eos_token, again.pad_token) == ("<my_eos>", "<my_pad>")
    assert again.encode("a<x>b", add_special_tokens=False)[1] == tokenizer.convert_tokens_to_ids("<x>")
    assert again.decode(again.encode("a<x>"), skip_special_tokens=True) == "a"


def test_tokens_are_added_as_ordinary_ones(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(section(CHATML, tokens=["<tool>", "</tool>"]))
    again = reloaded(tokenizer, tmp_path)
    for each in (tokenizer, again):
        assert each.encode("use <tool>x</tool>", add_special_tokens=False)[-3:] == [4096, 87, 4097]
        assert "<tool>" in each.decode([4096], skip_special_tokens=True)
    assert new_token_ids(tokenizer) == [4096, 4097]


def test_overrides_rewrite_reserved_tokens_in_place(tmp_path: Path) -> None:
    keys = {"added_tokens_overrides": {4087: "<|my_start|>", 4088: "<|my_end|>"}}
    tokenizer = load_tokenizer(section(**keys, special_tokens={"eos_token": "<|my_end|>"}))
    for each in (tokenizer, reloaded(tokenizer, tmp_path)):
        assert each.encode("<|my_start|>hi<|my_end|>", add_special_tokens=False)[::3] == [4087, 4088]
        assert len(each) == 4096
        assert each.eos_token_id == 4088
        assert "<|reserved_special_token_0|>" not in each.get_vocab()
    assert new_token_ids(tokenizer) == [4087, 4088]
    assert tokenizer.name_or_path == LLAMA


def test_overriding_the_bos_itself_renames_it_everywhere() -> None:
    tokenizer = load_tokenizer(section(added_tokens_overrides={4080: "<start>"}))
    assert tokenizer.bos_token == "<start>"
    assert tokenizer("hi")["input_ids"][0] == 4080


def test_wrong_overrides_are_told_all_at_once() -> None:
    with pytest.raises(ModelError) as told:
        load_tokenizer(section(added_tokens_overrides={5: "<a>", 4087: "<|eot_id|>"}))
    messages = [p.message for p in told.value.problems]
    assert len(messages) == 2
    assert "`added_tokens_overrides.5`" in messages[0]
    assert "4084 already" in messages[1]
    assert "4087" in told.value.problems[0].remedy


@pytest.mark.parametrize(
    ("vocabulary", "pad"),
    [
        (["<s>", "</s>", "<unk>"], "<unk>"),
        (["<s>", "</s>", "<pad>", "<unk>"], "<pad>"),
        (["<s>", "</s>", "<|reserved_special_token_3|>"], "<|reserved_special_token_3|>"),
        (["<s>", "</s>"], "</s>"),
    ],
)
def test_the_pad_token_is_found_not_added(
    tmp_path: Path, vocabulary: list[str], pad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_word_tokenizer(tmp_path, vocabulary)
    tokenizer = load_tokenizer(section(str(tmp_path)))
    assert tokenizer.pad_token == pad
    assert len(tokenizer) == len(vocabulary) + 1
    assert ("EOS `</s>` is used for padding" in capsys.readouterr().err) == (pad == "</s>")


def write_word_tokenizer(folder: Path, specials: list[str]) -> None:
    words = {"hello": 0, **{s: i + 1 for i, s in enumerate(specials)}}
    added = [
        {
            "id": i,
            "content": s,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for s, i in words.items()
        if s != "hello"
    ]
    model = {"type": "WordLevel", "vocab": words, "unk_token": "hello"}
    state = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(state))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_tokenizer_saved_by_training_is_used_as_it_is(tmp_path: Path) -> None:
    trained = load_tokenizer(section(CHATML, tokens=["<tool>"]))
    trained.chat_template = "{{ messages }}"
    trained.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(section(CHATML, tokens=["<tool>"]), tmp_path)
    assert len(tokenizer) == 4097
    assert tokenizer.chat_template == "{{ messages }}"
    # a checkpoint without one falls back on the base model's, with the config's changes
    (tmp_path / "bare").mkdir()
    assert len(load_tokenizer(section(CHATML, tokens=["<a>", "<b>"]), tmp_path / "bare")) == 4098


def test_tokenizer_type_that_reads_the_vocabulary_wrongly_is_not_used(
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = AutoTokenizer.from_pretrained(LLAMA).encode("Hello, world! 12345")
    for name in ("LlamaTokenizer", "PreTrainedTokenizerFast", "AutoTokenizer"):
        assert load_tokenizer(section(tokenizer_type=name)).encode("Hello, world! 12345") == right
    assert "`tokenizer_type: LlamaTokenizer` is not used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"base_model": "./does/not/exist"}, "`base_model: ./does/not/exist` is not a folder"),
        ({"base_model": "/nowhere/at/all"}, "is not a folder"),
        ({"tokenizer_config": "./nor/this"}, "`tokenizer_config: ./nor/this`"),
        ({"tokenizer_type": "LamaTokenizer"}, "`tokenizer_type: LamaTokenizer` is no class"),
        ({"special_tokens": {"pad_token": "x"}, "base_model": str(FIXTURES)}, "holds no tokenizer"),
    ],
)
def test_what_cannot_be_loaded_is_told_with_its_place(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError) as told:
        load_tokenizer(section(**{"base_model": LLAMA, **keys}))
    [problem] = told.value.problems
    assert words in problem.message
    assert problem.keys[0] in keys


def test_a_hub_name_without_network_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="not a folder here, not in the local cache"):
        load_tokenizer(section("some-owner/no-such-model"))


def test_a_damaged_tokenizer_file_is_told(tmp_path: Path) -> None:
    shutil.copytree(LLAMA, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text('{"version": "1.0", "tru')
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(section(str(tmp_path / "m")))
