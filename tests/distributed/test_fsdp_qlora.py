"""QLoRA with FSDP2: the 4-bit base in parts, the losses and the adapter of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from distributed.runs import Runs, furthest

pytestmark = pytest.mark.extras


def test_a_base_in_four_bits_is_divided(tmp_path: Path, tiny_llama3: Path) -> None:
    keys = {"adapter": "qlora", "load_in_4bit": True, "lora_r": 4, "lora_alpha": 8}
    runs = Runs(tmp_path, tiny_llama3, lora_target_linear=True, learning_rate=0.01, **keys)
    (tmp_path / "fsdp.yml").write_text(yaml.safe_dump({"fsdp_version": 2, "fsdp_config": {}}))
    runs.run("one")
    said = runs.run("two", "fsdp.yml", "--num-processes", "2", "--gradient-accumulation-steps", "2")
    assert "FSDP2: each weight in 2 parts" in said
    assert furthest(runs.losses("one"), runs.losses("two")) < 1e-4
    assert furthest(runs.weights("one"), runs.weights("two")) < 1e-3
