"""Every shipped example loads without a warning, and its tiny twin trains two steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from axolotl.cli.document import config_schema
from axolotl.config import load_config
from axolotl.run.train import train

PROJECT = Path(__file__).resolve().parent.parent
FOLDER = PROJECT / "examples"
EXAMPLES = sorted(FOLDER.rglob("*.yml"))
WITH_TWIN = [path for path in EXAMPLES if path.parent.name != "quickstart"]
FIXTURES = Path(__file__).resolve().parent / "fixtures"


def name(path: Path) -> str:
    return path.relative_to(FOLDER).as_posix()


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rows_for(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that fit a dataset entry's type, with the fields that it names."""
    kind = entry.get("type", "pretrain")
    if isinstance(kind, dict):
        fields = [kind[k] for k in ("field_instruction", "field_input", "field_output")]
        return [{f: f"{f} of row {n}" for f in fields} for n in range(40)]
    if kind == "alpaca":
        return [{"instruction": f"Add one to {n}.", "input": "", "output": f"{n + 1}"} for n in range(40)]
    if kind == "pretrain":
        return [{entry["text_column"]: "A river ran through the valley. " * (n + 1)} for n in range(40)]
    if kind == "completion":
        return [{entry.get("field", "text"): "A river ran through the valley. " * (n + 1)} for n in range(40)]
    assert kind == "chat_template", f"no rows known for {kind}"
    turns = [{"role": "user", "content": "Is it far?"}, {"role": "assistant", "content": "Not at all."}]
    return [{entry.get("field_messages", "messages"): turns * (1 + n % 2)} for n in range(40)]


def twin(path: Path, tmp_path: Path) -> dict[str, Any]:
    """The overrides that turn an example into something that a CPU trains in a second: same keys, tiny values."""
    config = read(path)
    entries = []
    key = "datasets" if "datasets" in config else "pretraining_dataset"
    for number, entry in enumerate(config[key]):
        data = PROJECT / entry["path"]
        if not data.exists():
            data = tmp_path / f"{number}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows_for(entry)))
        kept = {k: v for k, v in entry.items() if k not in ("name", "split", "data_files", "ds_type")}
        entries.append({**kept, "path": str(data), "ds_type": "json"})
    tiny = "tiny-llama3" if "llama" in config["base_model"].lower() else "tiny-chatml"
    quantized = config.get("load_in_4bit") or config.get("load_in_8bit")
    return {
        "base_model": str(FIXTURES / tiny),
        key: entries,
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(tmp_path / "out"),
        "sequence_len": 512,
        "max_steps": 2,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "save_total_limit": 1,
        # What one process cannot do; tests/distributed does it with two.
        **({"tensor_parallel_size": None} if config.get("tensor_parallel_size") else {}),
        **({"fsdp_config": None, "fsdp_version": None} if config.get("fsdp_config") else {}),
        # What a machine without a GPU cannot do.
        "bf16": False,
        "tf32": False,
        "optimizer": "adamw_torch",
        **({"load_in_4bit": False, "load_in_8bit": False, "adapter": "lora"} if quantized else {}),
        **({"special_tokens": None} if tiny == "tiny-chatml" else {}),
        **({"val_set_size": 4} if config.get("val_set_size") else {}),
    }


def test_there_are_examples() -> None:
    names = {name(path) for path in EXAMPLES}
    assert names >= {
        "llama-3/lora-1b.yml", "llama-3/lora-8b.yml", "llama-3/qlora-8b.yml", "llama-3/full-1b.yml",
        "llama-3/completion-1b.yml", "llama-3/pretrain-1b.yml", "qwen/lora-chat-7b.yml", "qwen/tool-use-1.5b.yml", "quickstart/lora.yml",
    }  # fmt: skip


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_example_loads_without_a_warning(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    cfg = load_config(path)
    assert [str(p) for p in cfg.warnings] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_example_names_the_schema(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("$schema=")[2]).resolve() == (
        FOLDER / "config.schema.json"
    ).resolve()


def test_schema_beside_the_examples_is_fresh() -> None:
    """`make docs` writes it."""
    assert json.loads((FOLDER / "config.schema.json").read_text(encoding="utf-8")) == config_schema()


@pytest.mark.parametrize("path", WITH_TWIN, ids=name)
def test_tiny_twin_trains(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    assert train(load_config(path, twin(path, tmp_path))).complete
    out = tmp_path / "out"
    weights = "adapter_model.safetensors" if read(path).get("adapter") else "model.safetensors"
    assert (out / weights).stat().st_size > 1000
    assert (out / "tokenizer.json").is_file()
    state = json.loads(max(out.glob("checkpoint-*/trainer_state.json")).read_text())
    assert state["global_step"] == 2
