"""The config explained, its schema, its page, and what `check` prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from axolotl.cli.document import (
    PAGE,
    SCHEMA,
    config_page,
    config_schema,
    explain_config,
    explain_key,
    main,
    report_check,
)
from axolotl.config import Config, Hardware, load_config, resolve
from axolotl.config.keys import nested, owners
from axolotl.config.old_keys import OLD_KEYS
from axolotl.errors import ConfigError, Problem

ROOT = Path(__file__).resolve().parents[2]
BASE = "base_model: x\ndatasets: [{path: a.jsonl, type: alpaca}]\nlearning_rate: 1e-4\n"


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    Path("c.yml").write_text(BASE + "flash_attention: true\nwandb_run_id: 007\ncomet_api_key: secret-word\n")
    return load_config("c.yml", [("lora_r", "8", "--lora-r")])


def test_a_key_explained() -> None:
    text = explain_key("lora_alpha")
    for part in (
        "lora_alpha / lora_r",
        "whole number above 0",
        "not set",
        "lora_alpha: 32",
        "lora_r",
        "Adapter",
    ):
        assert part in text
    assert "has to be set" in explain_key("base_model")
    assert "unavailable: preference tuning" in explain_key("rl")
    assert "unavailable: expert parallelism" in explain_key("expert_parallel_size")
    assert "offload_params" in explain_key("fsdp_config")
    assert "flash_attention" in explain_key("attn_implementation")
    assert explain_key("--lora-alpha") == text


def test_every_key_can_be_explained() -> None:
    for key in [*owners(), *OLD_KEYS, *(n.dotted for n in nested())]:
        text = explain_key(key)
        assert key.rpartition(".")[2].replace("[]", "") in text
        assert text.count("\n") >= 2


def test_old_and_nested_keys_explained() -> None:
    assert "`attn_implementation: flash_attention_2`" in explain_key("flash_attention")
    assert "Gone." in explain_key("rope_scaling")
    assert "inside   datasets[]" in explain_key("datasets.field_messages")
    assert "datasets[]" in explain_key("field_messages")


def test_an_unknown_key_is_not_explained() -> None:
    with pytest.raises(ConfigError, match="Did you mean `lora_alpha`"):
        explain_key("lora_alfa")


def test_a_config_explained_with_the_source_of_each_value(cfg: Config) -> None:
    resolved, _ = resolve(cfg, Hardware(cpus=2))
    lines = {line.split(":")[0]: line for line in explain_config(resolved).splitlines()}
    assert lines["learning_rate"].endswith("# c.yml:3:16")
    assert lines["attn_implementation"].endswith("# c.yml:4:18")
    assert lines["lora_r"].endswith("# --lora-r")
    assert "# resolved: " in lines["seed"]
    assert lines["optimizer"] == "optimizer: adamw_torch_fused"
    assert "007" in lines["wandb_run_id"]
    assert "secret-word" not in explain_config(resolved)
    assert "rl_beta" not in lines


def test_the_schema_knows_every_key() -> None:
    schema = config_schema()
    assert set(schema["properties"]) == {*owners(), *OLD_KEYS}
    assert all(schema["properties"][key]["deprecated"] for key in OLD_KEYS)
    assert all(schema["properties"][key]["description"] for key in owners())
    assert schema["properties"]["lora_r"]["type"] == ["integer", "null"]
    assert schema["properties"]["lora_r"]["exclusiveMinimum"] == 0
    assert schema["properties"]["lora_dropout"]["maximum"] == 1
    assert "steps" in schema["properties"]["save_strategy"]["enum"]
    entry = schema["definitions"]["DatasetEntry"]
    assert {"path", "type", "roles_to_train"} <= set(entry["properties"])
    assert json.loads(json.dumps(schema)) == schema
    references = set(re.findall(r'"#/definitions/(\w+)"', json.dumps(schema)))
    assert references == set(schema["definitions"])


def accepts(schema: dict[str, Any], value: Any, definitions: dict[str, Any]) -> bool:
    """Enough of JSON Schema to try values of ours against it."""
    if "$ref" in schema:
        return accepts(definitions[schema["$ref"].rpartition("/")[2]], value, definitions)
    if "anyOf" in schema:
        return any(accepts(each, value, definitions) for each in schema["anyOf"])
    names = {
        str: "string",
        bool: "boolean",
        int: "integer",
        float: "number",
        list: "array",
        dict: "object",
        type(None): "null",
    }
    kinds = schema.get("type")
    if kinds is not None:
        listed = [kinds] if isinstance(kinds, str) else kinds
        name = names[type(value)]
        if name not in listed and not (name == "integer" and "number" in listed):
            return False
    if isinstance(value, list):
        return all(accepts(schema.get("items", {}), each, definitions) for each in value)
    if isinstance(value, dict) and "properties" in schema:
        return all(
            k in schema["properties"] and accepts(schema["properties"][k], v, definitions)
            for k, v in value.items()
        )
    return "enum" not in schema or value in schema["enum"]


def test_the_schema_accepts_our_examples() -> None:
    schema = config_schema()
    for file in sorted((ROOT / "examples").rglob("*.yml")):
        written = load_config(file).effective(defaults=False)
        wrong = [
            k for k, v in written.items() if not accepts(schema["properties"][k], v, schema["definitions"])
        ]
        assert wrong == [], file


@pytest.mark.parametrize(
    "text",
    [
        "bfloat16: auto",
        "fp16: auto",
        "max_time: 2h",
        "hang_timeout: false",
        "resume_from_checkpoint: true",
        "pretraining_dataset: corpus.jsonl",
        "max_steps: -1",
        "gradient_checkpointing: unsloth",
        "tokens: {pad_token: <p>}",
        "save_steps: 0",
        "wandb_name: 7",
        "fsdp_config: {fsdp_offload_params: true, version: 2, fsdp_sharding_strategy: FULL_SHARD}",
        "datasets: [{path: a, message_field_role: from, train_on_split: train}]",
    ],
)
def test_the_schema_accepts_the_forms_of_old_that_load(text: str) -> None:
    schema = config_schema()
    [(key, value)] = yaml.safe_load(text).items()
    assert accepts(schema["properties"][key], value, schema["definitions"])
    assert not accepts(schema["properties"][key], {"no": "such"}, schema["definitions"])


def test_the_examples_carry_the_modeline() -> None:
    for file in sorted((ROOT / "examples").rglob("*.yml")):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        address = first.removeprefix("# yaml-language-server: $schema=")
        assert (file.parent / address).resolve() == (ROOT / SCHEMA).resolve(), file


def test_the_page_has_every_key_with_its_state() -> None:
    page = config_page()
    for key in [*owners(), *OLD_KEYS]:
        assert f"\n| `{key}` |" in page
    assert re.search(r"\| `rl` \|.*\*unavailable\*: preference tuning \|", page)
    assert re.search(r"\| `lora_r` \|.*\| available \|", page)
    assert "| `base_model` | text | required |" in page


def test_the_generated_files_are_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["--check"]) == 0


def test_stale_files_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--check"]) == 1
    assert main([]) == 0
    assert main(["--check"]) == 0
    Path(PAGE).write_text(Path(PAGE).read_text() + "x")
    assert main(["--check"]) == 1


def test_check_in_json(cfg: Config, capsys: pytest.CaptureFixture[str]) -> None:
    Path("d.yml").write_text(BASE + "lora_rank: 8\n")

    def wrong() -> list[Problem]:
        load_config("d.yml")
        return []

    assert report_check(wrong, as_json=True) == 2
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"ok", "problems"}
    assert report["ok"] is False
    [problem] = report["problems"]
    assert {k: problem[k] for k in ("kind", "key", "file", "line", "column")} == {
        "kind": "unknown_key",
        "key": "lora_rank",
        "file": "d.yml",
        "line": 4,
        "column": 1,
    }
    assert problem["message"]
    assert problem["remedy"]
    warning = Problem("w", kind="warning")
    assert report_check(lambda: [warning], as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "problems": [warning.as_dict()]}


def test_check_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_check(lambda: [Problem("`x` is wrong.", "Mend it.")], as_json=False) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "`x` is wrong." in shown.err
    assert report_check(list, as_json=False) == 0
