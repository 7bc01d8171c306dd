"""Old spellings: what they become, what is said about them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import axolotl
from axolotl.config import Config, load_config
from axolotl.config.old_conversations import LAYOUTS
from axolotl.config.old_keys import LEFTOVER, REMOVED
from axolotl.errors import ConfigError, Problem

BASE = "base_model: x\ndatasets: [{path: a.jsonl, type: alpaca}]\nlearning_rate: 1e-4\n"


def load(text: str, folder: Path, base: str = BASE) -> Config:
    file = folder / "c.yml"
    file.write_text(base + text + "\n", encoding="utf-8")
    return load_config(file)


def refused(text: str, folder: Path, base: str = BASE) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load(text, folder, base)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("text", "key", "value", "warned"),
    [
        ("type_of_model: M", "model_type", "M", False),
        ("model_revision: r", "revision_of_model", "r", False),
        ("model_config: {a: 1}", "overrides_of_model_config", {"a": 1}, False),
        ("model_kwargs: {a: 1}", "overrides_of_model_kwargs", {"a": 1}, False),
        ("flash_attention: true", "attn_implementation", "flash_attention_2", False),
        ("sdp_attention: true", "attn_implementation", "sdpa", False),
        ("eager_attention: true", "attn_implementation", "eager", False),
        ("flex_attention: true\nflash_attention: false", "attn_implementation", "flex_attention", False),
        ("xformers_attention: true\nflash_attention: true", "attn_implementation", "xformers", True),
        ("flash_attention: false\nattn_implementation: sdpa", "attn_implementation", "sdpa", False),
        ("flash_attention: true\nattn_implementation:", "attn_implementation", "flash_attention_2", False),
        ("noisy_embedding_alpha: 5", "neftune_noise_alpha", 5, True),
        ("evaluation_strategy: 'no'", "eval_strategy", "no", True),
        ("dataset_processes: 4", "dataset_num_proc", 4, True),
        ("sequence_parallel_degree: 2", "context_parallel_size", 2, True),
        ("liger_swiglu: true", "liger_glu_activation", True, True),
        ("gc_steps: 7", "gc_collect_steps", 7, True),
        ("gc_steps: 7", "torch_empty_cache_steps", 7, True),
        ("gc_steps: -1", "torch_empty_cache_steps", None, True),
        ("adam_eps: 1e-6", "adam_epsilon", 1e-6, True),
        ("random_init_weights: true", "reinit_weights", True, True),
        ("sample_pack_sequentially: true", "sample_packing_sequentially", True, True),
        ("noisy_embedding_alpha: 0", "neftune_noise_alpha", None, True),
        ("gradient_checkpointing: offload", "gradient_checkpointing", True, False),
        ("gradient_checkpointing: offload", "activation_offloading", True, False),
        ("gradient_checkpointing: selective", "selective_checkpointing", True, False),
        ("gradient_checkpointing: offload_disk", "activation_offloading", "disk", True),
        ("gradient_checkpointing: unsloth\nactivation_offloading:", "activation_offloading", True, True),
        ("chat_template: inst", "chat_template", "mistral_v1", True),
        ("save_safetensors: true", "save_only_model", False, False),
        ("fp16: auto", "fp16", None, False),
    ],
)
def test_old_spellings_mean_what_they_meant(
    tmp_path: Path, text: str, key: str, value: Any, warned: bool
) -> None:
    cfg = load(text, tmp_path)
    assert cfg.get(key) == value
    assert bool(cfg.warnings) is warned
    assert all(w.places[0].line in (4, 5) for w in cfg.warnings)


def test_the_place_of_a_renamed_key_is_where_it_was_written(tmp_path: Path) -> None:
    cfg = load("dataset_processes: 4", tmp_path)
    assert cfg.place("dataset_num_proc").line == 4


def test_fsdp_as_it_was_written_in_three_ages(tmp_path: Path) -> None:
    old = load(
        "fsdp: [full_shard, auto_wrap, offload]\nfsdp_config: {fsdp_transformer_layer_cls_to_wrap: L}",
        tmp_path,
    )
    prefixed = load(
        "fsdp_config: {fsdp_offload_params: true, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, fsdp_limit_all_gathers: true, "
        "fsdp_sharding_strategy: FULL_SHARD, fsdp_transformer_layer_cls_to_wrap: L, fsdp_version: 2}",
        tmp_path,
    )
    new = load(
        "fsdp_config: {offload_params: true, auto_wrap_policy: TRANSFORMER_BASED_WRAP, reshard_after_forward: true, "
        "transformer_layer_cls_to_wrap: L, version: 2}",
        tmp_path,
    )
    assert new.distributed.fsdp_config is not None
    assert new.warnings == ()
    assert prefixed.distributed.fsdp_config == new.distributed.fsdp_config
    assert old.distributed.fsdp_config == new.distributed.fsdp_config.model_copy(
        update={"fsdp_version": None}
    )
    assert load("fsdp: full_shard auto_wrap", tmp_path).distributed.fsdp_config is not None
    assert load("fsdp:\nfsdp_config:", tmp_path).distributed.fsdp_config is None
    assert "`sharded`" in refused("fsdp: [sharded]", tmp_path)[0].message
    assert (
        refused("fsdp_config: {fsdp_offload_params: true, offload_params: false}", tmp_path)[0].kind
        == "conflict"
    )


def test_fields_of_messages(tmp_path: Path) -> None:
    base = "base_model: x\nlearning_rate: 1e-4\n"
    text = "datasets:\n  - path: a\n    type: chat_template\n    message_field_role: from\n    message_field_content: value"
    cfg = load(text, tmp_path, base)
    assert cfg.data.datasets[0].message_property_mappings == {"role": "from", "content": "value"}
    assert cfg.warnings == ()
    [problem] = refused(text + "\n    message_property_mappings: {role: who}", tmp_path, base)
    assert (problem.kind, [p.line for p in problem.places]) == ("conflict", [6, 8])
    cfg = load("datasets:\n  - {path: a, train_on_split: validation}", tmp_path, base)
    assert cfg.data.datasets[0].split == "validation"
    assert cfg.warnings[0].keys == ("datasets[0].train_on_split",)


@pytest.mark.parametrize("kind", ["completion", "input_output", "chat_template", "messages.chat"])
def test_types_that_name_their_loader(kind: str, tmp_path: Path) -> None:
    cfg = load(
        f"datasets:\n  - path: a\n    type: {kind}.load", tmp_path, "base_model: x\nlearning_rate: 1e-4\n"
    )
    assert cfg.data.datasets[0].type == kind


TWO = "base_model: x\nlearning_rate: 1\n"


@pytest.mark.parametrize(
    ("kind", "column", "role", "content"),
    [
        ("sharegpt", "conversations", "from", "value"),
        ("sharegpt:chat", "conversations", "from", "value"),
        ("sharegpt.load_role", "conversations", "role", "value"),
        ("sharegpt_simple.load_role", "conversations", "role", "value"),
        ("sharegpt.load_ultrachat", "messages", "role", "content"),
    ],
)
def test_sharegpt_is_read_as_messages(
    tmp_path: Path, kind: str, column: str, role: str, content: str
) -> None:
    cfg = load(f"datasets:\n  - path: a\n    type: {kind}\n    conversation: llama-3", tmp_path, TWO)
    [entry] = cfg.data.datasets or []
    assert (entry.type, entry.field_messages, entry.chat_template) == ("chat_template", column, "llama3")
    assert entry.message_property_mappings == {"role": role, "content": content}
    [warning] = cfg.warnings
    assert warning.places[0].line == 5
    assert f"`field_messages: {column}`" in warning.message and "`chat_template: llama3`" in warning.message


def test_what_a_sharegpt_entry_says_itself_stays(tmp_path: Path) -> None:
    text = (
        "chat_template: chatml\ndatasets:\n  - path: a\n    type: sharegpt\n    field_messages: talk\n"
        "    message_field_role: who\n    message_field_content: what"
    )
    cfg = load(text, tmp_path, TWO)
    [entry] = cfg.data.datasets or []
    assert (entry.type, entry.field_messages, entry.chat_template) == ("chat_template", "talk", None)
    assert entry.message_property_mappings == {"role": "who", "content": "what"}


@pytest.mark.parametrize(
    ("lines", "kind", "key", "line"),
    [
        ("type: sharegpt", "missing", "datasets[0].type", 5),
        ("type: sharegpt\n    conversation: vicuna_v1.1", "removed", "datasets[0].conversation", 6),
        ("type: sharegpt.load_guanaco", "removed", "datasets[0].type", 5),
    ],
)
def test_a_sharegpt_entry_of_unknown_layout_asks_for_it(
    tmp_path: Path, lines: str, kind: str, key: str, line: int
) -> None:
    [problem] = refused(f"datasets:\n  - path: a\n    {lines}", tmp_path, TWO)
    assert (problem.kind, problem.keys, problem.places[0].line) == (kind, (key,), line)
    assert "chat_template" in problem.remedy


@pytest.mark.parametrize(
    ("layout", "bos", "text"),
    [
        ("chatml", "", "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"),
        ("gemma", "<bos>", "<start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"),
        (
            "llama-3",
            "<|begin_of_text|>",
            "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>",
        ),
        # SentencePiece puts the blank there by itself.
        ("mistral", "<s>", " [INST] a [/INST] b</s>"),
    ],
)
def test_the_layouts_of_old_are_laid_out_so_today(layout: str, bos: str, text: str) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    laid = axolotl.render_chat_template(LAYOUTS[layout], turns, bos_token=bos, eos_token="</s>")
    assert laid == bos + text


def test_a_sharegpt_entry_names_who_asks_and_who_answers(tmp_path: Path) -> None:
    text = (
        "datasets:\n  - path: a\n    type: sharegpt\n    conversation: chatml\n"
        "    roles: {input: [bob, human], output: [alice]}\n    field_model: carol"
    )
    cfg = load(text, tmp_path, TWO)
    [entry] = cfg.data.datasets or []
    assert entry.roles == {
        "user": ["bob", "human", "user"],
        "assistant": ["alice", "carol", "gpt", "assistant"],
        "system": ["system"],
    }
    [warning] = cfg.warnings
    assert "assistant: [alice, carol, gpt, assistant]" in warning.message
    today = text.replace("{input: [bob, human], output: [alice]}\n    field_model: carol", "{user: [bob]}")
    [entry] = load(today, tmp_path, TWO).data.datasets or []
    assert entry.roles == {"user": ["bob"]}


def test_options_of_bitsandbytes_at_the_top_level(tmp_path: Path) -> None:
    flat = "load_in_4bit: true\nadapter: qlora\nlora_r: 8\nlora_alpha: 8\nlora_target_linear: true\n"
    cfg = load(flat + "bnb_4bit_quant_type: fp4\nbnb_4bit_use_double_quant: false", tmp_path)
    assert cfg.model.bnb_config_kwargs == {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    assert [w.places[0].line for w in cfg.warnings] == [9, 10]
    both = "bnb_4bit_quant_type: nf4\nbnb_config_kwargs: {bnb_4bit_quant_type: fp4}"
    [problem] = refused(flat + both, tmp_path)
    assert (problem.kind, problem.keys[0]) == ("conflict", "bnb_4bit_quant_type")
    cfg = load(flat + "bnb_config_kwargs: {bnb_4bit_quant_type: nf4}\nbnb_4bit_quant_type: nf4", tmp_path)
    assert cfg.model.bnb_config_kwargs == {"bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("key", [*REMOVED, "save_safetensors"])
def test_removed_keys_are_refused_with_a_reason_unless_they_are_off(tmp_path: Path, key: str) -> None:
    value = "false" if key == "save_safetensors" else "7"
    [problem] = refused(f"{key}: {value}", tmp_path)
    assert (problem.kind, problem.keys, problem.places[0].line) == ("removed", (key,), 4)
    assert problem.remedy
    assert load(f"{key}:", tmp_path).warnings == ()


@pytest.mark.parametrize("key", LEFTOVER)
def test_leftovers_are_harmless(tmp_path: Path, key: str) -> None:
    assert [w.keys for w in load(f"{key}: 128", tmp_path).warnings] == [(key,)]
    assert load(f"{key}:", tmp_path).warnings == ()


def test_two_spellings_of_one_thing_contradict_each_other(tmp_path: Path) -> None:
    for text in (
        "flash_attention: true\nattn_implementation: sdpa",
        "model_type: A\ntype_of_model: B",
        "eval_strategy: 'no'\nevaluation_strategy: steps",
    ):
        [problem] = refused(text, tmp_path)
        assert problem.kind == "conflict"
        assert {p.line for p in problem.places} == {4, 5}


def test_an_old_boolean_takes_no_other_value(tmp_path: Path) -> None:
    [problem] = refused("flash_attention: fast", tmp_path)
    assert (problem.kind, problem.keys) == ("invalid_value", ("flash_attention",))


def test_what_an_old_boolean_asked_for_is_told_with_its_own_name(tmp_path: Path) -> None:
    [problem] = refused("gemma4_fp8_nonexpert: true", tmp_path)
    assert (problem.kind, problem.keys) == ("unavailable", ("gemma4_fp8_nonexpert",))
    assert problem.message.startswith("`gemma4_fp8_nonexpert` belongs to")
