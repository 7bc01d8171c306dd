"""What a merge must never let pass: numbers that are none, and files that hold something else than was computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl.errors import ModelError
from axolotl.model.files import read_header
from axolotl.weights import stream, verify
from axolotl.weights.merge import merge
from trained import LLAMA, lora, section, train


def test_numbers_that_are_none_never_pass() -> None:
    logits, nan = [torch.randn(5, 7)], float("nan")
    for wrong in (torch.full((5, 7), nan), torch.cat([torch.full((1, 7), nan), logits[0][1:]])):
        for dtype in ("float32", "bfloat16"):
            check = verify.compare("", logits, [wrong], dtype)
            assert not check.passed and "nan" in str(check)
            assert not verify.compare("", [*logits, *logits], [wrong, *logits], dtype).passed
    worst = None
    for name, difference in (("a", nan), ("b", 1e-5), ("c", 1.0)):
        worst = stream._worse(worst, name, difference)
    assert worst is not None and worst[0] == "a" and not verify.LayerCheck(*worst, "bfloat16").passed


@pytest.mark.parametrize("adapter", [{}, {"peft_use_dora": True}], ids=["by blocks", "as tensors"])
def test_an_overflow_of_one_row_is_refused(
    adapter: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float16).save_pretrained(base)
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(base)
    folder = train(tmp_path / "adapter", LLAMA, lora(**adapter))
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(n for n in weights if "lora_B" in n)
    weights[name][-1] = 3e6
    if adapter:
        magnitude = next(n for n in weights if "magnitude" in n)
        weights[magnitude][-1] = 1e9
    save_file(weights, folder / "adapter_model.safetensors")
    monkeypatch.setattr("axolotl.weights.skeleton._BLOCK", 2**8)  # so that most blocks are not compared
    for way in ("layers", "off"):
        with pytest.raises(ModelError, match=r"`model\.layers.*would hold [\d,]+ numbers that are infinite"):
            merge(section(str(base)), lora(**adapter), folder, tmp_path / "merged", verify=way)  # type: ignore[arg-type]
        assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("adapter", "what"), [({}, "copied"), ({}, "blocks"), ({"peft_use_dora": True}, "computed")]
)
def test_a_file_that_lost_what_was_written_is_found_without_rows(
    adapter: dict[str, Any], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(base)
    folder = train(tmp_path / "adapter", LLAMA, lora(**adapter))
    report = merge(section(str(base)), lora(**adapter), folder, tmp_path / "merged", verify="layers")
    assert report.checks[0].passed
    lost = "model.embed_tokens.weight" if what == "copied" else "model.layers.2.self_attn.q_proj.weight"
    right = stream._write

    def losing(source: Any, changes: Any, destination: Path, *more: Any) -> Any:
        written = right(source, changes, destination, *more)
        if len(more) == 3:  # as it is written
            file = destination / "model.safetensors"
            entry = read_header(file)[0][lost]
            with file.open("r+b") as out:
                out.seek(entry.end - 512)
                out.write(bytes(512))
        return written

    monkeypatch.setattr(stream, "_write", losing)
    with pytest.raises(ModelError, match=f"`{lost}` is another tensor when it is read back"):
        merge(section(str(base)), lora(**adapter), folder, tmp_path / "other", verify="layers")
    assert not (tmp_path / "other").exists()
