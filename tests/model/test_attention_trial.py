"""Ways of packed attention: each keeps documents apart, and the fastest is found, kept and told."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from axolotl.model import attention_trial, varlen
from axolotl.model.attention import _kernel, packed_attention, use_kernel
from axolotl.model.attention_trial import Timing, Work, describe, fastest, measure
from axolotl.model.varlen import VARLEN, kernel, on_host, steady_length, unusable
from kernels.comparing import assert_like_twin

WORK = Work("cpu", torch.float32, 4, 2, 8, (0, 5, 5, 6, 40, 64))
ON_CPU = [name for name, way in VARLEN.items() if not way.cuda_only]


def one_by_one(q, k, v, borders):
    """Plain softmax attention of each document."""
    outs = []
    groups = q.shape[1] // k.shape[1]
    for a, b in itertools.pairwise(borders):
        q1, k1, v1 = (x[a:b].transpose(0, 1) for x in (q, *(y.repeat_interleave(groups, 1) for y in (k, v))))
        scores = q1 @ k1.transpose(1, 2) / q.shape[2] ** 0.5
        scores = scores.masked_fill(torch.ones(b - a, b - a).triu(1).bool(), float("-inf"))
        outs.append((scores.softmax(-1) @ v1).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("borders", [(0, 7), (0, 1), (0, 1, 2, 3), (0, 5, 5, 6, 20), (0, 0, 4)])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_documents_stay_apart_forward_and_backward(name, borders, key_heads):
    torch.manual_seed(0)
    cu = torch.tensor(borders, dtype=torch.int32)
    longest = max(b - a for a, b in itertools.pairwise(borders))
    tensors = [torch.randn(borders[-1], n, 8, requires_grad=True) for n in (4, key_heads, key_heads)]
    run = kernel(name)
    assert_like_twin(
        lambda q, k, v: run(q, k, v, cu, longest, None, None),
        lambda q, k, v: one_by_one(q, k, v, borders),
        tensors,
        1e-5,
    )


def test_borders_are_read_from_the_device_once_for_all_layers(monkeypatch):
    reads = []

    class Counted(torch.Tensor):
        def tolist(self):
            reads.append(1)
            return super().tolist()

    cu = torch.tensor([0, 3, 8], dtype=torch.int32).as_subclass(Counted)
    q, k = torch.randn(8, 4, 8), torch.randn(8, 2, 8)
    for _ in range(5):
        kernel("documents")(q, k, k, cu, 5, None, None)
        kernel("padded")(q, k, k, cu, 5, None, None)
    assert len(reads) == 1
    assert on_host(torch.tensor([0, 8])) == [0, 8]


def test_every_way_is_measured_or_told_why_not():
    timings = measure(WORK)
    assert {t.name for t in timings} == set(VARLEN)
    taken = [t for t in timings if t.milliseconds is not None]
    assert {t.name for t in taken} == set(ON_CPU)
    assert [t.milliseconds for t in taken] == sorted(t.milliseconds for t in taken)
    assert all(t.why_not == "it needs a GPU" for t in timings if t.milliseconds is None)
    assert all(name in describe(timings) for name in ON_CPU)


def test_a_way_that_is_wrong_or_fails_is_not_taken(monkeypatch):
    def seeing_all(q, k, v, *rest):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    def failing(*args):
        raise RuntimeError("no image for this device")

    monkeypatch.setitem(VARLEN, "leaks", varlen.Varlen(lambda: seeing_all, cuda_only=False))
    monkeypatch.setitem(VARLEN, "fails", varlen.Varlen(lambda: failing, cuda_only=False))
    found = {t.name: t for t in measure(WORK, ["leaks", "fails", "documents"])}
    assert "differ" in found["leaks"].why_not and "no image" in found["fails"].why_not
    assert found["documents"].milliseconds is not None


def test_a_slow_way_loses(monkeypatch):
    import time

    def slow(*args):
        time.sleep(0.02)
        return kernel("documents")(*args)

    monkeypatch.setitem(VARLEN, "slow", varlen.Varlen(lambda: slow, cuda_only=False))
    assert [t.name for t in measure(WORK, ["slow", "documents"])] == ["documents", "slow"]


def test_figures_are_kept_for_the_next_run(tmp_path):
    file, calls = tmp_path / "deep" / "attention.json", []

    def counted(work):
        calls.append(work)
        return [Timing("padded", 1.0), Timing("documents", 2.0), Timing("flex", None, "it needs a GPU")]

    assert fastest(WORK, file, counted)[0::2] == ("padded", False)
    name, timings, known = fastest(WORK, file, counted)
    assert (name, known, len(calls)) == ("padded", True, 1)
    assert timings[2].why_not == "it needs a GPU"
    other = dataclasses.replace(WORK, heads=8)
    assert not fastest(other, file, counted)[2]
    file.write_text("no json")
    assert not fastest(WORK, file, counted)[2]


def test_a_kept_choice_that_is_gone_is_measured_again(tmp_path):
    file = tmp_path / "attention.json"
    fastest(WORK, file, lambda work: [Timing("flash_attention_2", 1.0)])
    assert fastest(WORK, file, lambda work: [Timing("documents", 2.0)])[0::2] == ("documents", False)


def test_what_cannot_be_taken_is_told():
    assert "GPU" in unusable("torch_varlen", "cpu", torch.float32, 8, None)
    assert "16 bits" in unusable("torch_varlen", "cuda", torch.float32, 64, None)
    assert "heads" in unusable("flex", "cuda", torch.bfloat16, 100, None)
    assert "window" in unusable("padded", "cpu", torch.float32, 8, 4)
    assert "installed" in unusable("flash_attention_3", "cuda", torch.bfloat16, 64, None)


def test_a_choice_is_used_and_taken_back():
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    module = torch.nn.Module()
    by_document, _ = packed_attention(module, q, k, k, cu_seq_lens_q=cu, max_length_q=5)
    used = []

    def noted(*args):
        used.append(1)
        return kernel("padded")(*args)

    try:
        use_kernel("padded", "cpu", torch.float32, 8)
        assert _kernel("cpu", torch.float32, 8, False) is kernel("padded")
        side_by_side, _ = packed_attention(module, q, k, k, cu_seq_lens_q=cu, max_length_q=5)
        # What knows no window leaves it to the plain way.
        assert _kernel("cpu", torch.float32, 8, False, 3) is None
    finally:
        use_kernel(None, "cpu", torch.float32, 8)
    assert _kernel("cpu", torch.float32, 8, False) is None
    assert torch.allclose(by_document, side_by_side, atol=1e-6)


def test_the_cache_is_where_the_system_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert attention_trial.cache_file() == tmp_path / "axolotl" / "attention.json"


@given(st.integers(0, 100_000))
def test_rows_of_about_one_length_are_filled_up_to_one(tokens):
    filled = steady_length(tokens)
    assert tokens <= filled <= tokens + max(127, tokens // 4)
    assert steady_length(filled) == filled


@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention_fills_rows_up_and_keeps_documents_apart(window):
    lengths = [1, 40, 7, 93]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    q, k, v = (
        torch.randn(sum(lengths), heads, 16, generator=torch.Generator().manual_seed(heads + i))
        for i, heads in enumerate((4, 2, 2))
    )
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        run = VARLEN["flex"].load()
        assert run is not None
        found = run(q, k, v, cu, 93, None, window)
    at = torch.arange(sum(lengths))
    document = torch.bucketize(at, cu[1:].long(), right=True)
    seen = (document[:, None] == document[None]) & (at[:, None] >= at[None])
    if window:
        seen &= at[:, None] - at[None] < window
    whole = (x.transpose(0, 1)[None] for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*whole, attn_mask=seen, enable_gqa=True)
    assert torch.allclose(found, expected[0].transpose(0, 1), atol=1e-5)
