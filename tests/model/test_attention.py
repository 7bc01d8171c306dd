"""Attention: packed documents do not see each other, and computing them packed changes nothing."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from axolotl.config.attention import BACKENDS, SHORT
from axolotl.config.model import ModelSection
from axolotl.config.resolve import Hardware
from axolotl.data.collate import PackedCollator
from axolotl.errors import ConfigError, ModelError
from axolotl.model.attention import (
    PACKED,
    AttentionChoice,
    choose_attention,
    generating,
    packed_attention,
    set_attention,
)
from axolotl.train.probe import documents_stay_apart

CPU = Hardware(device="cpu", gpu_names=(), bf16=False, tf32=False, cpus=1, gpu_memory_bytes=())
CUDA = dataclasses.replace(CPU, device="cuda", gpu_names=("NVIDIA H200",), bf16=True, tf32=True)
VOCAB = 61
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 8,
}
CONFIGS = {
    "llama": LlamaConfig(**TINY),
    "qwen2": Qwen2Config(**TINY),
    "mistral": MistralConfig(**TINY, sliding_window=None),
    "mistral-window": MistralConfig(**TINY, sliding_window=6),
    "gemma2-softcap": Gemma2Config(
        **TINY, sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=5.0
    ),
    "gpt-oss-sinks": GptOssConfig(**TINY, num_local_experts=2, num_experts_per_tok=1, sliding_window=6),
}
LENGTHS = (9, 1, 17, 70, 4)


def build(name: str, implementation: str = PACKED) -> torch.nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for parameter in model.parameters():
        # Small random models attend almost evenly; larger weights make a document that leaks stand out.
        parameter.data.mul_(3)
    return model


def documents(seed: int = 0):
    draw = np.random.default_rng(seed)
    ids = [draw.integers(1, VOCAB, n) for n in LENGTHS]
    return [(each.astype(np.int64), each.astype(np.int64)) for each in ids]


def packed_batch(rows, **options):
    batch = PackedCollator(0, **{"joined": True, **options})([rows])
    batch.pop("token_counts")
    return batch


# Capped scores and sinks are beyond sdpa; gpt-oss does not tell transformers' masks where documents begin.
PACKING = [(name, PACKED) for name in CONFIGS]
PACKING += [(name, "eager") for name in CONFIGS if name != "gpt-oss-sinks"]
PACKING += [(name, "sdpa") for name in CONFIGS if name not in ("gemma2-softcap", "gpt-oss-sinks")]


@pytest.mark.parametrize(("name", "implementation"), [*PACKING, ("gpt-oss-sinks", "eager")])
def test_the_look_before_a_run_knows_who_keeps_documents_apart(name, implementation):
    model, choice = build(name, implementation), AttentionChoice(implementation, "", implementation == PACKED)
    assert documents_stay_apart(model, choice, torch.device("cpu")) == ((name, implementation) in PACKING)


@pytest.mark.parametrize(("name", "implementation"), PACKING)
def test_packed_equals_separate_in_logits_and_gradients(name, implementation):
    model = build(name, implementation)
    rows = documents()
    batch = packed_batch(rows, pad_to=sum(LENGTHS) + 3, joined=implementation == PACKED)
    targets = int((batch["labels"] != -100).sum())
    packed = model(**batch, use_cache=False, num_items_in_batch=targets)
    packed.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    # The reference is transformers' own attention, one document at a time.
    plain = build(name, "eager")
    logits, loss = [], 0.0
    for ids, _ in rows:
        tokens = torch.from_numpy(ids)[None]
        out = plain(input_ids=tokens, use_cache=False)
        logits.append(out.logits[0])
        loss = loss + torch.nn.functional.cross_entropy(
            out.logits[0, :-1].float(), tokens[0, 1:], reduction="sum"
        )
    (loss / targets).backward()

    assert torch.allclose(packed.logits[0, : sum(LENGTHS)], torch.cat(logits), atol=1e-5)
    assert abs(packed.loss.item() - loss.item() / targets) < 1e-5
    for parameter, reference in plain.named_parameters():
        if reference.grad is not None:
            assert torch.allclose(gradients[parameter], reference.grad, atol=1e-5), parameter


@pytest.mark.parametrize(("name", "implementation"), PACKING)
def test_a_document_does_not_change_the_others(name, implementation):
    """Neither their logits, nor the gradient of their loss: of any weight, and of the document's own tokens."""
    model = build(name, implementation).eval()
    rows = documents()
    changed = list(rows)
    changed[2] = documents(seed=1)[2]
    start, stop = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    others = torch.ones(sum(LENGTHS), dtype=torch.bool)
    others[start:stop] = False

    def run(documents):
        batch = packed_batch(documents, joined=implementation == PACKED)
        labels = batch.pop("labels")[0]
        embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
        logits = model(inputs_embeds=embeds, **batch, use_cache=False).logits[0]
        targets = torch.where(others, labels, -100)[1:]
        loss = torch.nn.functional.cross_entropy(logits[:-1], targets, ignore_index=-100)
        weights = [p for p in model.parameters() if p is not model.get_input_embeddings().weight]
        return logits.detach(), *torch.autograd.grad(loss, [embeds, *weights])

    (before, inputs, *gradients), (after, _, *changed_gradients) = run(rows), run(changed)
    assert torch.equal(before[others], after[others])
    assert not torch.allclose(before[start:stop], after[start:stop], atol=1e-2)
    assert inputs[0, start:stop].abs().max() == 0 and inputs[0, others].abs().max() > 0
    for one, other in zip(gradients, changed_gradients, strict=True):
        # sums over all positions are added up in another order where a value differs in its zeros
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_borders_are_found_in_the_positions_where_nobody_hands_them_on():
    model = build("llama").eval()
    batch = packed_batch(documents())
    bare = {k: batch[k] for k in ("input_ids", "position_ids")}
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**bare, use_cache=False).logits)


def test_rows_padded_at_the_right_need_no_mask():
    model, plain = build("llama").eval(), build("llama", "sdpa").eval()
    tokens = torch.randint(1, VOCAB, (2, 12))
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    with torch.no_grad():
        ours = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        theirs = plain(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], atol=1e-5)


def test_rows_of_a_batch_may_share_one_list_of_borders():
    query, key, value = (torch.randn(2, heads, 6, 8) for heads in (4, 2, 2))
    borders = torch.tensor([0, 2, 6, 12], dtype=torch.int32)
    module = torch.nn.Module()
    together, _ = packed_attention(module, query, key, value, cu_seq_lens_q=borders)
    first, _ = packed_attention(module, query[:1], key[:1], value[:1], cu_seq_lens_q=torch.tensor([0, 2, 6]))
    second, _ = packed_attention(module, query[1:], key[1:], value[1:])
    assert torch.allclose(together, torch.cat([first, second]), atol=1e-6)


def test_a_cache_is_refused_and_generation_gets_another_attention():
    model = build("llama").eval()
    prompt = torch.randint(1, VOCAB, (2, 5))
    with pytest.raises(ModelError, match="cache"):
        model.generate(prompt, max_new_tokens=2, do_sample=False)
    with generating(model):
        out = model.generate(prompt, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 7)
    assert model.config._attn_implementation == PACKED


def test_the_name_is_not_saved_with_the_model(tmp_path):
    build("llama").save_pretrained(tmp_path)
    assert PACKED not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("asked", "packing", "hardware", "name", "joined"),
    [
        (None, False, CPU, "sdpa", False),
        (None, True, CPU, PACKED, True),
        ("flash_attention_2", False, CPU, "sdpa", False),
        ("flash_attention_2", True, CPU, PACKED, True),
        ("flash_attention_3", True, CUDA, PACKED, True),
        ("xformers", True, CUDA, PACKED, True),
        ("kernels-community/flash-attn2", True, CPU, PACKED, True),
        ("sdpa", True, CPU, "sdpa", False),
        ("eager", True, CPU, "eager", False),
        ("flex_attention", True, CUDA, "flex_attention", False),
    ],
)
def test_what_is_chosen(asked, packing, hardware, name, joined):
    choice = choose_attention(ModelSection(base_model="x", attn_implementation=asked), packing, hardware)
    assert (choice.name, choice.joined) == (name, joined)
    assert choice.reason


@pytest.mark.parametrize("asked", ["flex_attention", "sage", "flesh"])
def test_what_cannot_be_had_is_told(asked):
    with pytest.raises(ConfigError, match=asked) as error:
        choose_attention(ModelSection(base_model="x", attn_implementation=asked), True, CPU)
    assert error.value.problems[0].remedy


def test_a_model_can_be_switched():
    model = build("llama", "sdpa")
    assert set_attention(model, PACKED)
    assert model.config._attn_implementation == PACKED


def test_the_table_of_names_holds_for_rules_and_loading() -> None:
    gpu = Hardware(device="cuda", gpu_names=("NVIDIA H200",), bf16=True)
    for name in BACKENDS:
        model = ModelSection(base_model="x", attn_implementation=name)
        assert choose_attention(model, True, gpu).name in (name, PACKED)
    for short, meant in SHORT.items():
        with pytest.raises(ConfigError, match=f"Did you mean `{meant}`"):
            choose_attention(ModelSection(base_model="x", attn_implementation=short), False, gpu)
