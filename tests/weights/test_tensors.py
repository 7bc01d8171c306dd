"""Safetensors files written and read as streams are those that the safetensors package writes and reads."""

from __future__ import annotations

import ctypes
import errno
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from axolotl.errors import EnvironmentProblem, ModelError
from axolotl.model.files import read_header
from axolotl.weights.direct import PAGE
from axolotl.weights.folder import written_whole
from axolotl.weights.skeleton import LowRank
from axolotl.weights.tensors import NAMES, ShardWriter, Spec, read_tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float64]
SHAPES = st.lists(st.integers(0, 5), max_size=3)


def specs(tensors: dict[str, torch.Tensor]) -> dict[str, Spec]:
    return {n: Spec(NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), SHAPES),
        max_size=5,
    )
)
def test_what_is_written_is_read_by_others(
    tmp_path: Path, made: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    tensors = {n: (torch.randn(shape) * 50).to(dtype) for n, (dtype, shape) in made.items()}
    with ShardWriter(tmp_path / "a", specs(tensors), {"format": "pt"}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    found = load_file(tmp_path / "a")
    assert set(found) == set(tensors)
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in tensors.items())


def test_reading_and_copying(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(7, 3).bfloat16(), "b": torch.arange(10), "c": torch.randn(4)}
    save_file(tensors, tmp_path / "source", {"format": "pt", "mine": "1"})
    entries, metadata = read_header(tmp_path / "source")
    assert all(torch.equal(read_tensor(tmp_path / "source", n, entries[n]), t) for n, t in tensors.items())
    with ShardWriter(
        tmp_path / "copy", {n: Spec(e.dtype, e.shape) for n, e in entries.items()}, metadata
    ) as writer:
        for name, entry in entries.items():
            writer.copy(name, tmp_path / "source", entry)
    assert all(torch.equal(v, tensors[n]) for n, v in load_file(tmp_path / "copy").items())
    with safe_open(tmp_path / "copy", "pt") as file:
        assert file.metadata() == {"format": "pt", "mine": "1"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_low_rank_changes_by_blocks_are_rounded_once(dtype: torch.dtype, rows: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(s, generator=generator) for s in ((37, 24), (4, 24), (37, 4)))
    weight = weight.to(dtype)
    save_file({"w": weight}, tmp_path / "source")
    entry = read_header(tmp_path / "source")[0]["w"]
    change = LowRank(a, b)
    with ShardWriter(tmp_path / "out", {"w": Spec(entry.dtype, entry.shape)}, {}) as writer:
        later = writer.rewrite("w", tmp_path / "source", entry, change.adder(check=True), rows)
        found = later()
    exact = weight.double() + b.double() @ a.double()
    written = load_file(tmp_path / "out")["w"]
    step = torch.finfo(dtype).eps
    assert ((written.double() - exact).abs() <= step * exact.abs() + 1e-6).all()
    assert len(found) == -(-37 // rows)
    assert max(d for d, _, _ in found) > 0 and not any(bad for _, _, bad in found)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(
        st.sampled_from(
            [0, 1, 7, 511, 512, PAGE // 4, PAGE // 4 + 1, PAGE - 1, PAGE, 3 * PAGE, 3 * PAGE + 5]
        ),
        min_size=1,
        max_size=8,
    ),
    piece=st.sampled_from([1, 100, PAGE, PAGE + 12, 2**21]),
    direct=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_pages_shared_by_tensors_are_written_whole(
    tmp_path: Path, sizes: list[int], piece: int, direct: bool, order: random.Random
) -> None:
    tensors = {str(i): torch.randint(0, 256, (n, 4), dtype=torch.uint8) for i, n in enumerate(sizes)}
    save_file(tensors, tmp_path / "source")
    entries, _ = read_header(tmp_path / "source")
    names = list(tensors)
    order.shuffle(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("axolotl.weights.tensors._PIECE", max(piece, sum(sizes) // 50))
        if not direct:
            patch.setattr("axolotl.weights.direct._opened_past_the_cache", lambda path: None)
        with ShardWriter(tmp_path / "out", specs(tensors), {}) as writer:
            for number, name in enumerate(names):
                if number % 3 == 0:
                    writer.write(name, tensors[name])
                elif number % 3 == 1 or not len(tensors[name]):
                    writer.copy(name, tmp_path / "source", entries[name])
                else:
                    writer.rewrite(name, tmp_path / "source", entries[name], lambda _, b: b.add_(1), 3)
                    tensors[name] = tensors[name] + 1
    found = load_file(tmp_path / "out")
    assert all(torch.equal(found[n], t) for n, t in tensors.items())


def test_a_disk_without_room_is_told_when_the_file_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fallocate(*_: object) -> int:
        ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(
        "axolotl.weights.direct.ctypes.CDLL", lambda *_, **__: SimpleNamespace(fallocate=fallocate)
    )
    monkeypatch.setattr(
        "axolotl.weights.direct._opened_past_the_cache", lambda path: os.open(path, os.O_WRONLY)
    )
    opened = len(os.listdir("/proc/self/fd"))
    with (
        pytest.raises(OSError, match="No space left"),
        ShardWriter(tmp_path / "x", {"a": Spec("U8", (9,))}, {}),
    ):
        raise AssertionError("not reached")
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_size_that_no_file_can_have_is_told_when_the_file_is_opened(tmp_path: Path) -> None:
    with pytest.raises(OSError), ShardWriter(tmp_path / "x", {"a": Spec("U8", (2**60,))}, {}):
        raise AssertionError("not reached")


def test_a_writer_that_is_used_wrongly(tmp_path: Path) -> None:
    plan = {"a": Spec("F32", (2,)), "b": Spec("F32", (2,))}
    with pytest.raises(RuntimeError, match="closed before"), ShardWriter(tmp_path / "x", plan, {}) as writer:
        writer.write("a", torch.zeros(2))
    with pytest.raises(RuntimeError, match="announced as"), ShardWriter(tmp_path / "x", plan, {}) as writer:
        writer.write("a", torch.zeros(3))


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / "source")
    entry = read_header(tmp_path / "source")[0]["a"]
    os.truncate(tmp_path / "source", 2000)
    with pytest.raises(ModelError, match="ends before its last tensor"):
        read_tensor(tmp_path / "source", "a", entry)
    with (
        pytest.raises(ModelError, match="ends before"),
        ShardWriter(tmp_path / "x", {"a": Spec("F32", (1000,))}, {}) as w,
    ):
        w.copy("a", tmp_path / "source", entry)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"

    def write_half() -> None:
        with written_whole(target) as part:
            (part / "file").write_text("x")
            assert not target.exists()
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert list((tmp_path / "deep").iterdir()) == []
    with written_whole(target) as part:
        (part / "file").write_text("new")
    assert (target / "file").read_text() == "new"
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(EnvironmentProblem, match="cannot be written"),
        written_whole(tmp_path / "file" / "out"),
    ):
        raise AssertionError("not reached")
