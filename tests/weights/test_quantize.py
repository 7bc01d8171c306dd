"""quantize: what torchao writes can be read back, is smaller, and costs what the table says; what it cannot is told."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl.config.model import PostTrainingQuantization
from axolotl.errors import EnvironmentProblem, ModelError
from axolotl.inference.evaluate import LossReport
from axolotl.weights import quantize as quantizing
from axolotl.weights.quantize import Row, check_scheme, quantize, scheme_name

LLAMA = Path(__file__).parents[1] / "fixtures" / "tiny-llama3"
IDS = torch.arange(40, 104).view(4, 16)


def wanted(**keys: Any) -> PostTrainingQuantization:
    return PostTrainingQuantization.model_validate(keys)


def measure(model: Any) -> LossReport:
    with torch.no_grad():
        loss = float(model(input_ids=IDS, labels=IDS).loss)
    return LossReport(loss, 2.718281828**loss, IDS.numel(), len(IDS))


@pytest.mark.extras
@pytest.mark.parametrize(
    ("keys", "most"),
    [
        ({"weight_dtype": "int8"}, 0.75),
        ({"weight_dtype": "fp8"}, 0.75),
        ({"weight_dtype": "int8", "activation_dtype": "int8"}, 0.75),
        ({"weight_dtype": "int4", "activation_dtype": "int8"}, 0.75),
        ({"weight_dtype": "int8", "quantize_embedding": True}, 0.55),
    ],
    ids=["int8", "fp8", "int8-int8", "int4-int8", "embedding"],
)
def test_smaller_and_the_same_when_read_back(keys: dict[str, Any], most: float, tmp_path: Path) -> None:
    chosen = wanted(**keys)
    report = quantize(LLAMA, tmp_path / "q", chosen, AutoTokenizer.from_pretrained(LLAMA), measure=measure)
    assert report.after.bytes < most * report.before.bytes
    assert report.before.loss == pytest.approx(measure(AutoModelForCausalLM.from_pretrained(LLAMA)).loss)
    assert report.after.loss == pytest.approx(report.before.loss, abs=0.1)
    assert report.after.loss != report.before.loss
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype="auto")
    assert report.after.loss == pytest.approx(measure(again).loss)
    assert type(again.model.layers[0].mlp.up_proj.weight).__name__ not in ("Tensor", "Parameter")
    assert (tmp_path / "q" / "tokenizer.json").is_file()
    assert report.table()[2].startswith(scheme_name(chosen))
    assert "tags: [axolotl, quantized]" in (tmp_path / "q" / "README.md").read_text()
    quantize(LLAMA, tmp_path / "q", chosen, AutoTokenizer.from_pretrained(LLAMA))  # may be made again
    with pytest.raises(ModelError, match="is quantised already"):
        quantize(tmp_path / "q", tmp_path / "r", chosen, AutoTokenizer.from_pretrained(LLAMA))


@pytest.mark.extras
def test_what_cannot_be_done_is_told_before_the_model_is_read(tmp_path: Path) -> None:
    for keys in (
        {"weight_dtype": "int4"},
        {"weight_dtype": "fp8", "activation_dtype": "fp8"},
        {"weight_dtype": "int4", "activation_dtype": "fp8"},
    ):
        with pytest.raises(EnvironmentProblem, match="on a CUDA GPU only"):
            check_scheme(wanted(**keys), "cpu")
    with pytest.raises(ModelError, match=r"`quantization.group_size: 33` does not divide the 128 inputs"):
        quantize(LLAMA, tmp_path / "q", wanted(group_size=33), AutoTokenizer.from_pretrained(LLAMA))
    assert not (tmp_path / "q").exists()


def test_a_pair_that_torchao_has_not_and_a_missing_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="weights in int8 with activations in float8_e4m3fn are no scheme"):
        check_scheme(wanted(weight_dtype="int8", activation_dtype="fp8"), "cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EnvironmentProblem, match="needs the package `torchao`") as told:
        check_scheme(wanted(), "cpu")
    assert "axolotl[torchao]" in told.value.problems[0].remedy


def test_the_table() -> None:
    report = quantizing.QuantizeReport(
        Path("x"), "int8", Row("before", 2 * 10**9, 1.5, 4.4817), Row("int8", 10**9, None, None)
    )
    assert report.table()[1].split() == ["before", "2.00", "GB", "1.5000", "4.4817"]
    assert report.table()[2].split() == ["int8", "1.00", "GB", "-", "-"]


CONFIG = f"""
base_model: {LLAMA}
datasets:
  - path: rows.jsonl
    type: alpaca
sequence_len: 64
micro_batch_size: 1
gradient_accumulation_steps: 1
num_epochs: 1
learning_rate: 1e-4
output_dir: out
"""


def test_mistakes_of_the_command(
    tmp_path: Path, axolotl: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "config.yml").write_text(CONFIG)
    for arguments, words in (
        ((), "`axolotl quantize` needs to know how"),
        (("--weight-dtype", "int5"), "quantization.weight_dtype` is `int5`"),
    ):
        done = axolotl("quantize", "config.yml", *arguments, cwd=tmp_path)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr


@pytest.mark.extras
@pytest.mark.slow
def test_the_command(tmp_path: Path, axolotl: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    (tmp_path / "config.yml").write_text(CONFIG)
    rows = [{"instruction": f"say {i}", "input": "", "output": f"it is {i}"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = axolotl("quantize", "config.yml", "--weight-dtype", "int8", cwd=tmp_path)
    assert (done.returncode, "no finished model" in done.stderr) == (2, True), done.stderr
    done = axolotl("quantize", "config.yml", "--weight-dtype", "int8", "--base-model", LLAMA, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["after"]["bytes"] < figures["before"]["bytes"]
    assert "perplexity" in done.stderr
    asked = axolotl(
        "inference",
        "config.yml",
        "--base-model",
        "out/quantized",
        "--prompt",
        "hi",
        "--max-new-tokens",
        "3",
        cwd=tmp_path,
    )
    assert asked.returncode == 0, asked.stderr
