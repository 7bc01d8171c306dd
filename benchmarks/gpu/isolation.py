"""Packed attention on a GPU: packed documents give the logits and gradients of separate ones, in bfloat16.

    python benchmarks/gpu/isolation.py --out benchmarks/results/gpu-isolation.json

Compared is the error against float32 separate documents: packing must not be worse than bfloat16 itself is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers

import axolotl.model.attention as attention
from axolotl.model.attention import PACKED

LENGTHS = (1, 17, 300, 64, 1000, 130, 513)


def model_of(kind: str, implementation: str, dtype: torch.dtype) -> Any:
    sizes = {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3,
             "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 8192}  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **sizes)
    transformers.set_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.to("cuda", dtype).train()


def gradients(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    logits = []
    model.zero_grad()
    for batch in batches:
        out = model(**batch, use_cache=False).logits[0].float()
        (out * torch.linspace(-1, 1, out.shape[-1], device="cuda")).sin().sum().backward()
        logits.append(out.detach())
    grads = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    return torch.cat(logits), grads


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    draw = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 512, (1, n), generator=draw).cuda() for n in LENGTHS]
    separate = [{"input_ids": d} for d in documents]
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32).cuda()
    packed = [
        {
            "input_ids": torch.cat(documents, 1),
            "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None].cuda(),
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": max(LENGTHS),
            "max_length_k": max(LENGTHS),
        }
    ]
    assert attention._kernel("cuda", torch.bfloat16, 64, False) is not None
    rows: dict[str, Any] = {}
    for kind in ("llama", "qwen2", "mistral", "qwen3"):
        exact = gradients(model_of(kind, "sdpa", torch.float32), separate)
        alone = gradients(model_of(kind, "sdpa", torch.bfloat16), separate)
        joined = gradients(model_of(kind, PACKED, torch.bfloat16), packed)
        rows[kind] = {
            "separate": {"logits": error(alone[0], exact[0]), "gradients": error(alone[1], exact[1])},
            "packed": {"logits": error(joined[0], exact[0]), "gradients": error(joined[1], exact[1])},
        }
        print(kind, json.dumps(rows[kind]), flush=True)
        for what in ("logits", "gradients"):
            assert rows[kind]["packed"][what] < 1.5 * rows[kind]["separate"][what] + 1e-3, (kind, what)
    result = {"torch": torch.__version__, "transformers": transformers.__version__,
              "gpu": torch.cuda.get_device_name(), "lengths": LENGTHS, "relative_error": rows}  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
