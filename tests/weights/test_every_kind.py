"""Every kind of adapter that the installed PEFT has: merged bit for bit as PEFT does it, or refused in words."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl.errors import ModelError
from axolotl.plan.check import ADAPTERS
from axolotl.weights.merge import merge
from trained import LLAMA, lora, section

KINDS: dict[str, Any] = {str(kind.value): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
MORE: dict[str, dict[str, Any]] = {
    "OFT": {"oft_block_size": 0, "r": 4},
    "BOFT": {"boft_block_size": 4},
    "IA3": {"feedforward_modules": []},
    "ADALORA": {"total_step": 10},
    "FOURIERFT": {"n_frequency": 20},
    "C3A": {"block_size": 4},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "topk": 2, "r": 4},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"token_indices": [5, 9], "target_modules": ["embed_tokens"]},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "ADAPTION_PROMPT": {"adapter_layers": 2, "adapter_len": 4, "target_modules": None},
}
# A kind that needs a package of its own, made of other adapters, or with a cache instead of weights.
NOT_MADE_HERE = {"ADAMSS", "XLORA", "CARTRIDGE"}
# PEFT itself raises on merging these: they depend on the input, or stand beside the weights.
NOT_MERGEABLE = {
    "ADAPTION_PROMPT", "BEFT", "CPT", "LILY", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING", "PROMPT_TUNING",
    "P_TUNING", "SHADOW",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in ADAPTERS if k != "qlora"])
def test_what_the_config_takes_is_trained_and_merged(
    kind: str, tmp_path: Path, axolotl: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    values = {
        "base_model": LLAMA, "datasets": [{"path": str(tmp_path / "rows.jsonl"), "type": "alpaca"}],
        "adapter": kind, "lora_target_modules": ["q_proj", "o_proj"], "output_dir": str(tmp_path / "out"),
        "dataset_prepared_path": str(tmp_path / "prepared"), "micro_batch_size": 2, "max_steps": 2,
        "learning_rate": 1e-2, "sequence_len": 128, "bf16": False, "generate_samples": False,
    }  # fmt: skip
    values |= {} if kind in ("ia3", "fourierft") else {"lora_r": 4}
    values |= {"lora_alpha": 8} if kind == "lora" else {}
    row = {"instruction": "Name a colour.", "output": "Red is one."}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    (tmp_path / "c.yml").write_text(yaml.safe_dump(values))
    for verb in (["train", "c.yml", "--launcher", "python"], ["merge-lora", "c.yml"]):
        done = axolotl(*verb, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "same top token 100.00 %" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(KINDS) - NOT_MADE_HERE))
def test_merging_is_peft_s_or_refused(kind: str, tmp_path: Path) -> None:
    cls = KINDS[kind]
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if "target_modules" in {f.name for f in dataclasses.fields(cls)}:
        options["target_modules"] = ["q_proj", "o_proj"]
    torch.manual_seed(0)
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(LLAMA), cls(**options | MORE.get(kind, {}))
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(folder)
    if kind in NOT_MERGEABLE:
        with pytest.raises(ModelError, match=r"cannot merge this adapter|nothing to merge"):
            merge(section(LLAMA), lora(), folder, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        return
    reloaded: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(LLAMA), str(folder))
    expected = reloaded.merge_and_unload(safe_merge=True).state_dict()
    plain = AutoModelForCausalLM.from_pretrained(LLAMA).state_dict()
    assert any(not torch.equal(expected[name], plain[name]) for name in plain)
    report = merge(section(LLAMA), lora(), folder, tmp_path / "merged", verify="logits")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert set(found) == set(expected)
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    assert report.checks[0].passed
