"""Bare training loops of other libraries on the rows of `speed.py`: no data loader, no logging, nothing saved.

python benchmarks/gpu/peers.py transformers|liger|unsloth CONFIG WARM     # prints one line of JSON
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(kind: str, settings: dict[str, Any], device: str, dtype: Any) -> Any:
    """The model as the library's users load it, with the benchmark's adapter in it."""
    import torch

    adapter, recompute = settings.get("lora_model_dir"), bool(settings.get("gradient_checkpointing"))
    four_bit = settings.get("adapter") == "qlora"
    if kind == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            settings["base_model"], max_seq_length=settings["sequence_len"], dtype=dtype, load_in_4bit=four_bit,
            full_finetuning=adapter is None,
        )  # fmt: skip
        if adapter is None:
            return model
        model = FastLanguageModel.get_peft_model(
            model, r=settings["lora_r"], lora_alpha=settings["lora_alpha"], target_modules=TARGETS, lora_dropout=0,
            bias="none", use_gradient_checkpointing="unsloth" if recompute else False,
        )  # fmt: skip
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(model, load_file(Path(adapter) / "adapter_model.safetensors"))
        return model
    import transformers

    if kind == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    options: dict[str, Any] = {"dtype": dtype, "device_map": device}
    if four_bit:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(settings["base_model"], **options)
    model.config.use_cache = False
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def main() -> None:
    kind, settings, warm = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
    if kind == "unsloth":
        import unsloth  # noqa: F401  it wants to be imported first
    import pyarrow.parquet as pq
    import torch

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(42)
    model = load(kind, settings, device, dtype)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"], weight_decay=0.0, fused=True)
    rows = torch.tensor(pq.read_table(settings["datasets"][0]["path"])["input_ids"].to_pylist())
    batch, times, losses, norms = settings["micro_batch_size"], [], [], []
    for step in range(settings["max_steps"]):
        ids = rows[step * batch : (step + 1) * batch].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=cuda):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"]).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        times.append(time.time())
    print(
        json.dumps(
            {
                "times": times[warm - 1 :],
                "tokens": [ids.numel()] * (len(times) - warm),
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
                "losses": losses,
                "grad_norms": norms,
            }
        )
    )


if __name__ == "__main__":
    main()
