"""Losses of `axolotl train` beside a plain transformers + PEFT loop, and beside itself laid out in other ways.

usage: python benchmarks/loss_equality.py       limits: in the code below, as greatest differences

1. LoRA from the same first adapter over the same batches: each step's loss, and the trained adapter at the end.
2. gradient_accumulation_steps 8 × micro_batch_size 1 against 1 × 8, with rows of ragged lengths.
3. Packed rows against the same rows unpacked.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import load_from_disk
from measure import TINY, alpaca_rows, record, write_rows
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from axolotl.config import load_config
from axolotl.run.train import train

ROWS, STEPS, LEARNING_RATE = 64, 16, 1e-3


def first_adapter(folder: Path) -> Path:
    """A LoRA adapter that both sides start from."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder)
    return folder


def run_axolotl(folder: Path, name: str, **changes: Any) -> tuple[list[float], Path]:
    """(loss of each step, output folder)."""
    out = folder / name
    values: dict[str, Any] = {
        "base_model": str(TINY),
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(out),
        "adapter": "lora",
        "lora_model_dir": str(folder / "adapter"),
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
        "sequence_len": 512,
        "curriculum_sampling": True,
        "sample_packing": False,
        "micro_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "optimizer": "adamw_torch",
        "max_grad_norm": 1.0,
        "bf16": False,
        "tf32": False,
        "logging_steps": 1,
        "save_strategy": "no",
        **changes,
    }
    config = folder / f"{name}.yml"
    config.write_text(json.dumps(values), encoding="utf-8")
    train(load_config(config))
    lines = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"], out


def run_plain(folder: Path, out: Path) -> list[float]:
    """The same training with nothing but transformers, PEFT and AdamW; the rows are those that axolotl prepared."""
    prepared = next(p.parent for p in (folder / "prepared").glob("*/train/dataset_info.json"))
    rows = load_from_disk(str(prepared))
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="sdpa")
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batch = rows[step * 4 : step * 4 + 4]
        width = max(map(len, batch["input_ids"]))
        padded = {
            key: torch.tensor([row + [fill] * (width - len(row)) for row in batch[key]])
            for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
        }
        loss = model(**padded, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.save_pretrained(out)
    return losses


def apart(a: list[float], b: list[float]) -> float:
    """The greatest difference of two curves of the same length."""
    assert len(a) == len(b), (len(a), len(b))
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def weights_apart(a: Path, b: Path) -> float:
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", alpaca_rows(ROWS))
        first_adapter(folder / "adapter")
        ours, ours_out = run_axolotl(folder, "ours")
        plain = run_plain(folder, folder / "plain")
        wide, wide_out = run_axolotl(folder, "wide", micro_batch_size=8, max_steps=8)
        deep, deep_out = run_axolotl(
            folder, "deep", micro_batch_size=1, gradient_accumulation_steps=8, max_steps=8
        )
        # One pack holds every row, so a step sees the same rows packed and unpacked.
        packed, packed_out = run_axolotl(
            folder,
            "packed",
            sample_packing=True,
            sequence_len=12_288,
            micro_batch_size=1,
            max_steps=6,
            num_epochs=6,
        )
        apart_rows, unpacked_out = run_axolotl(
            folder, "unpacked", sequence_len=12_288, micro_batch_size=ROWS, max_steps=6, num_epochs=6
        )
        differences = {
            "plain_loop_loss": apart(ours, plain),
            "plain_loop_adapter": weights_apart(ours_out, folder / "plain"),
            "accumulation_loss": apart(wide, deep),
            "accumulation_adapter": weights_apart(wide_out, deep_out),
            "packing_loss": apart(packed, apart_rows),
            "packing_adapter": weights_apart(packed_out, unpacked_out),
        }
    fell = {"plain": plain[0] - plain[-1], "packed": packed[0] - packed[-1]}
    limits = {f"{key}_1e-5": value <= 1e-5 for key, value in differences.items()}
    limits["losses_fell"] = min(fell.values()) > 0.05
    record("loss_equality", {"greatest_differences": differences, "losses_fell_by": fell}, limits)


if __name__ == "__main__":
    main()
