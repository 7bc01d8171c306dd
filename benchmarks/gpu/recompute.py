"""Recomputation on one GPU: each way gives the same gradients, and this is its memory and its time.

    python benchmarks/gpu/recompute.py                       # gradients of every way, then the rows of an 8B LoRA
    python benchmarks/gpu/recompute.py --rows long --length 300000     # one step of one long row
    python benchmarks/gpu/recompute.py --tiny                # the same program, tiny, on a CPU

A model with the shape of Llama 3.1 8B and random weights is made on the card, with LoRA r=32 and our kernels; each row
sets it up anew, does a few steps of forward, backward and fused AdamW on random tokens, and prints one JSON line. A row
that fails (out of memory) says so, and the next one goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from axolotl.config.kernels import KernelsSection
from axolotl.config.train import TrainSection
from axolotl.model.patch import Bench, apply_kernels
from axolotl.model.recompute import recompute_of
from axolotl.model.sparing import in_words, spare_memory

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
    "small": {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4, "num_attention_heads": 8,
              "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512},
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KERNELS = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True, "liger_rms_norm": True,
           "liger_rope": True, "cut_cross_entropy": True}  # fmt: skip
ON: dict[str, Any] = {"gradient_checkpointing": True}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kept": ({}, {}),
    "half of the layers": ({"gradient_checkpointing": -1}, {}),
    "all layers, no tiles": (ON, {"tiled_mlp": False}),
    "all layers": (ON, {}),
    "attention kept": (ON | {"selective_checkpointing": True}, {}),
    "layer inputs on host": (ON | {"activation_offloading": "hidden_states"}, {}),
    "offload": (ON | {"activation_offloading": True}, {}),
    "offload, tiles of 2048": (ON | {"activation_offloading": True}, {"tiled_mlp": True, "tiled_mlp_num_shards": -2048}),
    "legacy": (ON | {"activation_offloading": "legacy"}, {}),
    "disk": (ON | {"activation_offloading": "disk"}, {}),
}  # fmt: skip
LONG = ("all layers", "attention kept", "layer inputs on host", "offload, tiles of 2048")


def model_of(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Random weights on the device, with LoRA of which both matrices count."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, max_position_embeddings=1 << 20, rope_theta=5e5, attn_implementation="sdpa", use_cache=False
    )
    torch.set_default_dtype(dtype)
    with device:
        base = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    lora = peft.LoraConfig(r=32, lora_alpha=64, target_modules=TARGETS, task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float().normal_(0, 0.02)
    return model.train()


class Setting:
    """A model set up in one way."""

    def __init__(self, model: Any, way: str, tokens: int, device: torch.device) -> None:
        keys, more = (dict(each) for each in WAYS[way])
        inner = model.get_base_model()
        if keys.get("gradient_checkpointing") == -1:
            keys["gradient_checkpointing"] = inner.config.num_hidden_layers // 2
        if more.get("tiled_mlp_num_shards", 1) < 0:
            more["tiled_mlp_num_shards"] = max(1, tokens // -more["tiled_mlp_num_shards"])
        kernels = KernelsSection(**KERNELS, **more)
        train = TrainSection(**keys)
        bench = Bench(inner, kernels, device, torch.bfloat16, tokens)
        self.made = apply_kernels(bench)
        self.done = spare_memory(inner, train, kernels, device, self.made, output_dir=Path("/tmp/recompute"))
        self.words = in_words(recompute_of(train), self.done)
        self.model, self.device = model, device

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Forward and backward pass; the loss."""
        hooks = self.done.hooks()
        items = torch.tensor(float(ids.numel()), device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            if hooks is None:
                loss = self.model(input_ids=ids, labels=ids, num_items_in_batch=items).loss
            else:
                with hooks:
                    loss = self.model(input_ids=ids, labels=ids, num_items_in_batch=items).loss
        loss.backward()
        return loss.detach()

    def close(self) -> None:
        """The model as it was."""
        self.made.undo()
        self.model.zero_grad()
        gc.collect()


def tokens_of(model: Any, rows: int, length: int, seed: int, device: torch.device) -> torch.Tensor:
    draw = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=draw, device=device)


def compare(shape: str, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
    """Asserts that each way has the gradients of the way that keeps everything. Raises SystemExit otherwise."""
    model = model_of(SHAPES[shape], device, dtype)
    ids = tokens_of(model, rows, length, 1, device)
    expected: dict[str, torch.Tensor] = {}
    bad = []
    for way in WAYS:
        setting = Setting(model, way, rows * length, device)
        loss = float(setting.step(ids))
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        setting.close()
        expected = expected or found
        worst = max(float((found[n] - g).norm() / g.norm()) for n, g in expected.items())
        bits = all(torch.equal(found[n], g) for n, g in expected.items())
        # Tiles sum in another order; bfloat16 products of another height may round otherwise too.
        good = worst < 0.02 and found.keys() == expected.keys()
        bad += [] if good else [way]
        line = {
            "check": way,
            "loss": loss,
            "same_bits": bits,
            "worst_relative_difference": worst,
            "good": good,
        }
        print(json.dumps(line), flush=True)
    if bad:
        raise SystemExit(f"Other gradients: {', '.join(bad)}")


def measure(model: Any, way: str, rows: int, length: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Peak bytes and seconds of a step."""
    cuda = device.type == "cuda"
    setting = Setting(model, way, rows * length, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=cuda)
    times: list[float] = []
    try:
        for step in range(steps + (2 if steps > 1 else 0)):
            ids = tokens_of(model, rows, length, step, device)
            if cuda:
                torch.cuda.synchronize()
                if step == min(2, steps):
                    torch.cuda.reset_peak_memory_stats()
            at = time.perf_counter()
            loss = setting.step(ids)
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            figures = torch.stack([loss, norm]).tolist()
            times.append(time.perf_counter() - at)
        kept = sorted(times[2:] or times)
        middle = kept[len(kept) // 2]
        found: dict[str, Any] = {"loss": figures[0], "gradient_norm": figures[1], "seconds": middle}
        found["tokens_per_second"] = rows * length / middle
        if cuda:
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        pool = getattr(setting.done.park, "pool", None)
        found["host_gib"] = 0.0 if pool is None else pool.bytes / 2**30
        found["what"] = setting.words
    except torch.OutOfMemoryError as error:
        found = {"error": str(error).splitlines()[0][:200]}
    finally:
        setting.close()
        del optimizer
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", choices=("check", "usual", "long", "all"), default="all")
    parser.add_argument("--only", help="a single way, by its name")
    parser.add_argument("--length", type=int, default=300_000, help="tokens of the long row")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here too")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not given.tiny else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    if given.rows in ("check", "all"):
        compare(*(("tiny", 2, 96) if given.tiny else ("small", 2, 4096)), device, dtype)
    if given.rows == "check":
        return
    model = model_of(SHAPES["tiny" if given.tiny else "8b"], device, dtype)
    work = [(way, 2, 4096, given.steps) for way in WAYS] if given.rows in ("usual", "all") else []
    work += [(way, 1, given.length, 1) for way in LONG] if given.rows in ("long", "all") else []
    for way, rows, length, steps in work:
        if given.only in (None, way):
            length = min(length, 500) if given.tiny else length
            found = measure(model, way, rows, length, steps, device)
            line = json.dumps(
                {"way": way, "rows": rows, "length": length, "device": name, "torch": torch.__version__}
                | found
            )
            print(line, flush=True)
            if given.out:
                with given.out.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
