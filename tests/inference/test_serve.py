"""The command that vLLM is started with: each key in its place, and what vLLM cannot serve told beforehand."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from axolotl.cli.overrides import parse_overrides
from axolotl.config import load_config
from axolotl.config.method_blocks import Vllm
from axolotl.errors import ConfigError, ModelError
from axolotl.inference.loading import Trained
from axolotl.inference.serve import serve_command
from axolotl.run.inference import inference
from axolotl.run.serve import serve

LLAMA = Path(__file__).parents[1] / "fixtures" / "tiny-llama3"


def command(trained: Trained, **keys: Any) -> list[str]:
    return serve_command("base", trained, Vllm.model_validate(keys), python=("vllm",))


def adapter(folder: Path, **keys: Any) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 12, "base_model_name_or_path": str(LLAMA)} | keys
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_each_key_has_its_argument() -> None:
    words = command(
        Trained(model=Path("out/merged")),
        port=8001,
        tensor_parallel_size=2,
        data_parallel_size=3,
        max_model_len=4096,
        enable_prefix_caching=False,
        enforce_eager=True,
        enable_reasoning=True,
        reasoning_parser="qwen3",
        worker_extension_cls="a.B",
        dtype="bfloat16",
    )
    assert words[:3] == ["vllm", "serve", "out/merged"]
    text = " ".join(words)
    for expected in (
        "--host 127.0.0.1",
        "--port 8001",
        "--dtype bfloat16",
        "--gpu-memory-utilization 0.9",
        "--tensor-parallel-size 2",
        "--data-parallel-size 3",
        "--max-model-len 4096",
        "--reasoning-parser qwen3",
        "--worker-extension-cls a.B",
        "--no-enable-prefix-caching",
        "--enforce-eager",
    ):
        assert expected in text
    assert "--enable-lora" not in text
    assert "--host 0.0.0.0" in " ".join(command(Trained(), host="0.0.0.0"))


def test_an_adapter_is_served_beside_its_base(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "mine", rank_pattern={"q_proj": 20})
    text = " ".join(command(Trained(adapter=folder)))
    assert f"serve base --enable-lora --max-lora-rank 32 --lora-modules mine={folder}" in text
    assert "--tokenizer" not in text
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text("{}")
    text = " ".join(command(Trained(adapter=folder)))
    assert f"--tokenizer {folder} --generation-config {folder}" in text


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"use_dora": True}, "a DoRA adapter"),
        ({"peft_type": "VERA"}, "a VERA adapter"),
        ({"modules_to_save": ["lm_head"]}, "with embeddings or layers of its own"),
    ],
)
def test_adapters_that_vllm_cannot_serve(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        command(Trained(adapter=adapter(tmp_path / "a", **keys)))


def test_options_that_vllm_has_no_more() -> None:
    with pytest.raises(ConfigError) as told:
        command(Trained(), device="cuda", serve_module="x", enable_reasoning=True)
    assert len(told.value.problems) == 3


def test_the_command(tmp_path: Path, axolotl: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    adapter(tmp_path / "out")
    (tmp_path / "config.yml").write_text(
        f"base_model: {LLAMA}\ndatasets: [{{path: x.jsonl, type: alpaca}}]\nadapter: lora\nlora_r: 12\nlora_alpha: 8\n"
        "lora_target_linear: true\nlearning_rate: 1e-4\noutput_dir: out\nvllm: {port: 8123}\n"
    )
    done = axolotl("vllm-serve", "config.yml", "--show", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:3] == ["vllm", "serve", str(LLAMA)]
    assert words[words.index("--port") + 1] == "8123"
    assert "--lora-modules" in words
    done = axolotl("vllm-serve", "config.yml", cwd=tmp_path)
    assert (done.returncode, "axolotl[vllm]" in done.stderr) == (2, True), done.stderr


def test_nothing_trained_is_not_served_in_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = (
        f"base_model: {LLAMA}\ndatasets: [{{path: x.jsonl, type: alpaca}}]\nlearning_rate: 1e-4\n"
        f"output_dir: {tmp_path / 'out'}\n"
    )
    (tmp_path / "full.yml").write_text(text)
    (tmp_path / "lora.yml").write_text(text + "adapter: lora\nlora_target_linear: true\n")
    for name, words in (
        ("full.yml", "holds no trained weights"),
        ("lora.yml", "there is no trained adapter in"),
    ):
        with pytest.raises(ModelError, match=words) as told:
            serve(load_config(str(tmp_path / name), verb="vllm-serve"), show=True)
        assert "--base-model" in told.value.problems[0].remedy
        with pytest.raises(ModelError, match=words):
            inference(load_config(str(tmp_path / name), verb="inference"), prompt="hi")
        named = load_config(
            str(tmp_path / name), parse_overrides(["--base-model", str(LLAMA)]), verb="vllm-serve"
        )
        assert serve(named, show=True) == 0
        assert capfd.readouterr().out.startswith(f"vllm serve {LLAMA}")


def test_the_base_alone_where_something_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "axolotl.run.inference.load_trained", lambda *_, **options: found.append(options) or 1 / 0
    )
    file = tmp_path / "config.yml"
    file.write_text(
        f"base_model: {LLAMA}\ndatasets: [{{path: x.jsonl, type: alpaca}}]\nadapter: lora\n"
        "lora_target_linear: true\nlearning_rate: 1e-4\n"
    )
    for overrides, options, wanted in (
        ([], {}, (False, True)),
        ([], {"untrained": True}, (True, True)),
        (parse_overrides(["--base-model", str(LLAMA)]), {}, (False, False)),
    ):
        with pytest.raises(ZeroDivisionError):
            inference(load_config(str(file), overrides, verb="inference"), prompt="hi", **options)
        assert (found[-1]["untrained"], found[-1]["require_training"]) == wanted
    named = load_config(str(file), parse_overrides(["--lora-model-dir", str(tmp_path)]), verb="inference")
    with pytest.raises(ConfigError, match="`--untrained` asks for the base model"):
        inference(named, prompt="hi", untrained=True)
