"""export: what llama.cpp's converter writes is what was trained; what it does not know is told; nothing half is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from axolotl.config import load_config
from axolotl.errors import EnvironmentProblem, ModelError, UserError
from axolotl.run.export import export
from axolotl.weights.gguf_file import check_source, convert, find_converter, look_at

LLAMA = Path(__file__).parents[1] / "fixtures" / "tiny-llama3"
TURNS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}END{% endfor %}"


def model_of_a_known_kind(folder: Path, end: str = "</s>", seed: int = 0) -> Path:
    """A tiny Llama whose tokenizer is of the kind of Llama 2, which the converter reads whatever its words are."""
    special = ["<unk>", "<s>", "</s>", *([end] if end != "</s>" else [])]
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=tokens, show_progress=False)
    tok.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    made = json.loads(tok.to_str())
    made["added_tokens"] = [t for t in made["added_tokens"] if t["content"] in special]
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    fast.chat_template = TURNS.replace("END", end)
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(fast), bos_token_id=1, eos_token_id=2, **shape, **heads)  # type: ignore[arg-type]
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def config_of(tmp_path: Path, base: Path) -> Any:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    file = tmp_path / "config.yml"
    file.write_text(
        f"base_model: {base}\ndatasets:\n  - path: {rows}\n    type: chat_template\noutput_dir: {tmp_path / 'out'}\n"
    )
    return load_config(str(file), verb="export")


@pytest.mark.extras
def test_every_tensor_is_the_sources(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = model_of_a_known_kind(tmp_path / "base")
    cfg = config_of(tmp_path, base)
    plain = export(cfg, outtype="f32", base_model=str(base))
    assert plain is not None and plain.difference == 0.0
    small = export(cfg, outtype="q8_0", base_model=str(base))
    assert small is not None and 0 < (small.difference or 0) < 3e-2 and small.bytes < plain.bytes / 2
    assert plain.deaf_to == small.deaf_to == ()
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["model-f32.gguf", "model-q8_0.gguf"]
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert told["tensors"] == 21 and told["bytes"] == small.bytes


@pytest.mark.extras
def test_a_file_of_other_weights_is_kept_aside_and_an_unknown_stop_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = model_of_a_known_kind(tmp_path / "base", end="<|over|>")
    looked = export(config_of(tmp_path, base), outtype="f32", base_model=str(base))
    assert looked is not None and looked.deaf_to == ("<|over|>",)
    assert "gguf-new-metadata --special-token eot" in capfd.readouterr().err
    other = model_of_a_known_kind(tmp_path / "other", end="<|over|>", seed=1)
    file = tmp_path / "out" / "model-f32.gguf"
    tokenizer = AutoTokenizer.from_pretrained(other)
    with pytest.raises(ModelError, match=r"is not what .* is: a tensor lies"):
        look_at(file, other, "f32", tokenizer, [], free_memory=2**40)
    assert not file.exists() and file.with_name("model-f32.gguf.wrong").is_file()


@pytest.mark.extras
def test_tensors_that_memory_does_not_hold_are_told_as_not_compared(tmp_path: Path) -> None:
    base = model_of_a_known_kind(tmp_path / "base")
    convert(find_converter(None), base, tmp_path / "a.gguf", "f32")
    looked = look_at(
        tmp_path / "a.gguf", base, "f32", AutoTokenizer.from_pretrained(base), [2], free_memory=1
    )
    assert looked.difference is None and "free memory" in looked.reason


@pytest.mark.extras
def test_what_the_converter_does_not_know_is_told(tmp_path: Path) -> None:
    script = find_converter(None)
    with pytest.raises(ModelError, match="does not know the tokenizer of"):
        convert(script, LLAMA, tmp_path / "a.gguf", "f32")
    strange = model_of_a_known_kind(tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "architectures": ["AxolotlForCausalLM"]}))
    with pytest.raises(ModelError, match="does not know `AxolotlForCausalLM`, the architecture"):
        convert(script, strange, tmp_path / "a.gguf", "f32")
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*"))


def test_a_converter_that_fails_leaves_nothing(tmp_path: Path) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import pathlib, sys\n"
        "pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_text('half')\n"
        "sys.exit('OSError: no more room')\n"
    )
    assert find_converter(tmp_path) == script
    (tmp_path / "a.gguf").write_text("an earlier one")
    with pytest.raises(ModelError, match=r"could not write .*: OSError: no more room"):
        convert(script, LLAMA, tmp_path / "a.gguf", "f32")
    assert (tmp_path / "a.gguf").read_text() == "an earlier one" and not (
        tmp_path / ".a.gguf.partial"
    ).exists()


def test_a_folder_that_cannot_be_exported_is_told_before(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}, "auto_map": {}}')
    messages = [p.message for p in check_source(tmp_path)]
    assert len(messages) == 3
    assert "quantised already (fp8)" in messages[0] and "no tokenizer" in messages[1]
    assert "code of its own" in messages[2]
    assert len(check_source(tmp_path, trust_remote_code=True)) == 2
    assert check_source(LLAMA) == []


def test_wrong_uses(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config_of(tmp_path, LLAMA)
    with pytest.raises(ModelError, match="there is no finished model"):
        export(cfg)
    with pytest.raises(UserError, match=r"no name of a GGUF file"):
        export(cfg, base_model=str(LLAMA), destination=tmp_path / "a.bin")
    with pytest.raises(EnvironmentProblem, match=r"there is no `convert_hf_to_gguf.py`"):
        find_converter(tmp_path / "nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EnvironmentProblem, match=r"needs llama\.cpp.s converter"):
        find_converter(None)
    assert export(cfg, base_model=str(LLAMA), show=True) is None
    out = capfd.readouterr().out
    assert (
        out.startswith(f"python convert_hf_to_gguf.py {LLAMA} --outfile ") and not (tmp_path / "out").exists()
    )


def test_where_no_file_can_be_is_told(tmp_path: Path) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("raise SystemExit('not reached')")
    (tmp_path / "plain").write_text("a file")
    for name in ("plain/a.gguf", "plain/b/a.gguf", f"{'n' * 249}.gguf"):
        with pytest.raises(EnvironmentProblem, match="cannot be written"):
            convert(script, LLAMA, tmp_path / name, "f32")


def test_an_earlier_file_stays_until_the_new_one_is_looked_at(tmp_path: Path) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import pathlib, sys\n"
        "pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_text('a new one')\n"
    )
    file = tmp_path / "a.gguf"
    file.write_text("an earlier one")

    def look(part: Path) -> str:
        assert file.read_text() == "an earlier one"
        return part.read_text()

    def refuse(part: Path) -> None:
        raise ModelError("wrong", "")

    with pytest.raises(ModelError, match="wrong"):
        convert(script, LLAMA, file, "f32", refuse)
    assert file.read_text() == "an earlier one" and not (tmp_path / ".a.gguf.partial").exists()
    assert convert(script, LLAMA, file, "f32", look) == "a new one"
    assert file.read_text() == "a new one"


@pytest.mark.extras
def test_a_tensor_that_is_nan_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    base = model_of_a_known_kind(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    bad = tmp_path / "bad"
    shutil.copytree(base, bad)
    model = LlamaForCausalLM.from_pretrained(bad)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(bad)
    file = tmp_path / "a.gguf"
    convert(find_converter(None), bad, file, "f32")
    with pytest.raises(ModelError, match="a tensor lies inf from"):
        look_at(file, base, "f32", tokenizer, [2], free_memory=2**40)
    for damage in (b"GGUF", b"nothing", (tmp_path / "a.gguf.wrong").read_bytes()[:2000]):
        file.write_bytes(damage)
        with pytest.raises(ModelError, match=r"cannot be read as a GGUF file|is not what"):
            look_at(file, base, "f32", tokenizer, [2], free_memory=2**40, named=tmp_path / "named.gguf")
