"""What was trained is what is served: plain transformers and PEFT, given what a run left, find the run's own loss.

Nothing of ours takes part in reloading: no kernel, no packing, no noise, no hook.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl.plan.check import load_config
from axolotl.run import train as verb
from axolotl.run.preprocess import prepare_data, tokenizer_of

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "runs", "sleeps", "sings"]
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
PACKED = {"sample_packing": True}
NOISE = {"neftune_noise_alpha": 5}
TOKENS = {"tokens": ["<|red|>", "<|dog|>"]}
LOSS_KERNEL = {"cut_cross_entropy": True}
KERNELS = {**LOSS_KERNEL, "lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True}
OLD, NEW = "tiny_llama3", "tiny_chatml"
"""A model with an output head of its own, and one whose head is its embedding."""

CASES = [
    ("lora", OLD, LORA),
    ("lora, packed", OLD, LORA | PACKED),
    ("lora, noise", OLD, LORA | NOISE),
    ("lora, kernels", OLD, LORA | KERNELS),
    ("lora, new tokens", OLD, LORA | TOKENS),
    ("lora, tied", NEW, LORA),
    ("lora, tied, new tokens", NEW, LORA | TOKENS),
    ("lora, tied, everything", NEW, LORA | PACKED | NOISE | TOKENS | KERNELS),
    ("lora, everything", OLD, LORA | PACKED | NOISE | TOKENS | KERNELS),
    ("dora, packed, noise, new tokens", OLD, LORA | PACKED | NOISE | TOKENS | {"peft_use_dora": True}),
    ("embeddings in full", OLD, LORA | TOKENS | {"lora_modules_to_save": ["embed_tokens", "lm_head"]}),
    ("all weights", OLD, {}),
    ("all weights, tied", NEW, {}),
    ("all weights, tied, everything", NEW, PACKED | NOISE | TOKENS | LOSS_KERNEL),
    ("all weights, everything", OLD, PACKED | NOISE | TOKENS | LOSS_KERNEL),
    ("all weights, saved in the background", OLD, PACKED | {"save_async": True, "save_steps": 2}),
]


def config(folder: Path, base: Path, **keys: Any) -> Any:
    """The config of four steps in float32 on sentences that hold the words which new tokens are made of."""
    draw = random.Random(0)
    marks = keys.get("tokens") or ["red", "dog"]
    rows = [
        {
            "instruction": " ".join(draw.choices([*WORDS, *marks], k=draw.randint(3, 12))),
            "output": draw.choice(marks),
        }
        for _ in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "base_model": str(base), "datasets": [{"path": str(folder / "rows.jsonl"), "type": "alpaca"}],
        "val_set_size": 0.25, "output_dir": str(folder / "out"), "dataset_prepared_path": str(folder / "prepared"),
        "micro_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler": "constant", "sequence_len": 128, "max_steps": 4,
        "save_strategy": "no" if "save_steps" not in keys else None, "eval_strategy": "no", "seed": 3,
        "bf16": False, "tf32": False, "generate_samples": False,
    } | keys  # fmt: skip
    file = folder / "c.yml"
    file.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return load_config([file], [], verb="train")


def plain_loss(model: Any, rows: Any) -> float:
    """Mean loss of the trained tokens, one row at a time, the logits written out."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for row in rows:
            ids_T, labels_T = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1]
            total += float(F.cross_entropy(logits_TV.double(), labels_T[1:], reduction="sum"))
            count += int((labels_T[1:] != -100).sum())
    return total / count


def reloaded(out: Path, base: Path) -> Any:
    """The model as somebody without axolotl loads it, following the two cards' usual lines."""
    if not (out / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return PeftModel.from_pretrained(model, out)


def trained(cfg: Any, monkeypatch: Any) -> tuple[float, Any]:
    """Trains; the loss that the trainer itself measures after its last step, and what kernels replaced."""
    seen: list[Any] = []
    run = verb.run_trainer

    def observed(trainer: Any, cfg: Any, resume: Any) -> Any:
        result = run(trainer, cfg, resume)
        seen.extend((trainer.evaluate()["eval_loss"], trainer.parts.replaced.counts))
        return result

    monkeypatch.setattr(verb, "run_trainer", observed)
    assert verb.train(cfg).complete
    loss, replaced = seen
    return loss, replaced


def held_out(cfg: Any, marks: list[str]) -> Any:
    """The rows of the evaluation. New tokens are asked for, and trained as well."""
    tokenizer = tokenizer_of(cfg, None)
    rows = prepare_data(cfg, tokenizer).eval_dataset()
    assert rows is not None
    for new in tokenizer.convert_tokens_to_ids(marks):
        assert any(new in row["input_ids"] for row in rows)
    assert not marks or any(set(tokenizer.convert_tokens_to_ids(marks)) & set(row["labels"]) for row in rows)
    return rows


@pytest.mark.parametrize(("base", "keys"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_the_loss_is_the_same(tmp_path: Path, request: Any, monkeypatch: Any, base: str, keys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    folder = request.getfixturevalue(base)
    cfg = config(tmp_path, folder, **keys)
    loss, replaced = trained(cfg, monkeypatch)
    assert bool(replaced) == any("kernel" in key or "cross_entropy" in key for key in keys)
    rows = held_out(cfg, keys.get("tokens", []))
    served = reloaded(tmp_path / "out", folder)
    assert plain_loss(served, rows) == pytest.approx(loss, abs=1e-5)
    # The run did learn: a reload that lost any of it would show.
    untouched = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    untouched.resize_token_embeddings(served.get_input_embeddings().weight.shape[0], mean_resizing=False)
    assert abs(plain_loss(untouched, rows) - loss) > 1e-2


# One LoRA and one full run stay with the fast tests: what differs between the rest was seen in float32.
HALF = [
    pytest.param(
        *case[1:],
        id=case[0],
        marks=() if case[0] in ("lora, everything", "all weights") else pytest.mark.slow,
    )
    for case in CASES
]


@pytest.mark.parametrize(("base", "keys"), HALF)
def test_bfloat16_is_as_near_as_it_can_be(
    tmp_path: Path, request: Any, monkeypatch: Any, base: str, keys: Any
) -> None:
    """Trained under autocast, measured in float32: the difference is that of the number type."""
    monkeypatch.chdir(tmp_path)
    folder = request.getfixturevalue(base)
    cfg = config(tmp_path, folder, **keys, bf16=True)
    loss, _ = trained(cfg, monkeypatch)
    rows = held_out(cfg, keys.get("tokens", []))
    served = reloaded(tmp_path / "out", folder)
    assert plain_loss(served, rows) == pytest.approx(loss, abs=0.02)
    # Served in 16 bits, as most are.
    assert plain_loss(served.to(torch.bfloat16), rows) == pytest.approx(loss, abs=0.03)
