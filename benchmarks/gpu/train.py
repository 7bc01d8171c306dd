"""Training speed and memory of `axolotl train` on one GPU, beside a bare transformers + PEFT loop on the same rows.

    python benchmarks/gpu/train.py --out benchmarks/results/gpu-train.json          # all rows, on a GPU
    python benchmarks/gpu/train.py --tiny --out /tmp/x.json                          # the same program, tiny, on a CPU

Weights are random (the geometry is that of Llama 3), tokens are random, every row is a process of its own. A row that
stands in the output file already is not run again, so the table can be filled in pieces.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
GEOMETRY: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 4096, "tie_word_embeddings": False},
}  # fmt: skip
LORA = {"adapter": "lora", "lora_r": 32, "lora_alpha": 64, "lora_dropout": 0.0, "lora_target_linear": True}
ROWS: dict[str, dict[str, Any]] = {
    "lora-8b": {"model": "8b", "length": 4096, **LORA, "micro_batch_size": 2},
    "lora-8b-recompute": {"model": "8b", "length": 4096, **LORA, "micro_batch_size": 2, "gradient_checkpointing": True},
    "lora-8b-packed-8k": {"model": "8b", "length": 700, "sequence_len": 8192, **LORA, "micro_batch_size": 1,
                          "sample_packing": True},
    "full-1b": {"model": "1b", "length": 4096, "micro_batch_size": 4},
}  # fmt: skip
PEERS = {"lora-8b": "plain", "lora-8b-recompute": "plain", "full-1b": "plain"}


WEIGHTS = """
import sys, torch, transformers
cuda = torch.cuda.is_available()
torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
transformers.set_seed(1)
with torch.device("cuda" if cuda else "cpu"):
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(sys.argv[1]))
model.save_pretrained(sys.argv[1], max_shard_size="5GB")
"""


def make_model(folder: Path, name: str) -> Path:
    """A folder with a model of random weights, made once, and a tokenizer."""
    target = folder / f"model-{name}"
    if (target / "tokenizer.json").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
              "max_position_embeddings": 131072, "bos_token_id": 4080, "eos_token_id": 4081, "initializer_range": 0.02,
              "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rope_theta": 500000.0,
              **GEOMETRY[name]}  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    subprocess.run([sys.executable, "-c", WEIGHTS, str(target)], check=True)
    for file in (ROOT / "tests/fixtures/tiny-llama3").glob("token*"):
        (target / file.name).write_bytes(file.read_bytes())
    return target


def make_rows(folder: Path, length: int, vocabulary: int, tokens: int, varied: bool) -> Path:
    """Random token rows: all of `length`, or varied around it as conversations are."""
    draw = np.random.default_rng(0)
    file = folder / f"rows-{length}-{vocabulary}-{varied}.parquet"
    lengths = []
    while sum(lengths) < tokens:
        lengths.append(
            int(np.clip(draw.lognormal(np.log(length) - 0.18, 0.6), 32, length * 6)) if varied else length
        )
    ids = [draw.integers(0, min(vocabulary, 4000), n).tolist() for n in lengths]
    pq.write_table(
        pa.table({"input_ids": ids, "labels": ids, "attention_mask": [[1] * n for n in lengths]}), file
    )
    return file


def make_config(folder: Path, name: str, tiny: bool, steps: int) -> Path:
    row = dict(ROWS[name])
    model, length = row.pop("model"), row.pop("length")
    if tiny:
        model, length = "tiny", length // 32
        row["sequence_len"] = row.get("sequence_len", length * 32) // 32
    sequence_len = row.setdefault("sequence_len", length)
    tokens = sequence_len * row["micro_batch_size"] * (steps + 2)
    data = make_rows(folder, length, GEOMETRY[model]["vocab_size"], tokens, bool(row.get("sample_packing")))
    config = {
        "base_model": str(make_model(folder, model)),
        "datasets": [{"path": str(data), "ds_type": "parquet"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / f"out-{name}"),
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "constant",
        "learning_rate": 1e-5,
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "bf16": "auto",
        "tf32": "auto",
        "logging_steps": 1,
        **row,
    }
    file = folder / f"{name}.yml"
    file.write_text(json.dumps(config, indent=1))  # JSON is YAML
    return file


def run_axolotl(config: Path, warm: int) -> dict[str, Any]:
    settings = json.loads(config.read_text())
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "axolotl", "train", str(config)], capture_output=True, text=True
    )
    if done.returncode:
        return {"error": (done.stderr or done.stdout)[-2000:]}
    lines = [
        json.loads(line) for line in (Path(settings["output_dir"]) / "run.jsonl").read_text().splitlines()
    ]
    steps = [line for line in lines if line.get("kind") == "train"]
    times = [b["time"] - a["time"] for a, b in itertools.pairwise(steps)][warm:]
    tokens = [b["tokens"] - a["tokens"] for a, b in itertools.pairwise(steps)][warm:]
    return {
        "tokens_per_second": round(sum(tokens) / sum(times)),
        "median_step_seconds": round(statistics.median(times), 4),
        "peak_gib": round(steps[-1]["peak_memory_gib"], 2),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "first_grad_norm": steps[0]["grad_norm"],
        "first_step_after_seconds": round(steps[0]["time"] - started, 1),
    }


PLAIN = """
import json, sys, time, torch, transformers, pyarrow.parquet as pq
c = json.loads(open(sys.argv[1]).read()); warm = int(sys.argv[2])
cuda = torch.cuda.is_available(); device = "cuda" if cuda else "cpu"
dtype = torch.bfloat16 if cuda else torch.float32
torch.backends.cuda.matmul.allow_tf32 = True
transformers.set_seed(42)
model = transformers.AutoModelForCausalLM.from_pretrained(c["base_model"], dtype=dtype, device_map=device)
model.config.use_cache = False; model.train()
if c.get("adapter"):
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(model, LoraConfig(r=c["lora_r"], lora_alpha=c["lora_alpha"], target_modules="all-linear"))
if c.get("gradient_checkpointing"):
    model.gradient_checkpointing_enable({"use_reentrant": False}); model.enable_input_require_grads()
params = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(params, lr=1e-5, fused=True)
rows = torch.tensor(pq.read_table(c["datasets"][0]["path"])["input_ids"].to_pylist())
batch, times, losses, norms = c["micro_batch_size"], [], [], []
for step in range(c["max_steps"]):
    ids = rows[step * batch:(step + 1) * batch].to(device)
    with torch.autocast(device, torch.bfloat16, enabled=cuda):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    norms.append(torch.nn.utils.clip_grad_norm_(params, 1.0).item())
    optimizer.step(); optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item()); times.append(time.time())
steps = [b - a for a, b in zip(times, times[1:])][warm:]
peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
print(json.dumps({"tokens_per_second": round(len(steps) * ids.numel() / sum(steps)), "peak_gib": round(peak, 2),
                  "median_step_seconds": sorted(steps)[len(steps) // 2], "first_loss": losses[0],
                  "last_loss": losses[-1], "first_grad_norm": norms[0]}))
"""


def run_plain(config: Path, warm: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(config), str(warm)], capture_output=True, text=True
    )
    if done.returncode:
        return {"error": done.stderr[-2000:]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "accelerate", "datasets", "triton")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/axolotl-gpu-benchmark"))
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    result = json.loads(args.out.read_text()) if args.out.exists() else {"versions": versions(), "rows": {}}
    for name in args.rows.split(","):
        config = make_config(args.work, name, args.tiny, args.steps)
        measured = result["rows"].setdefault(name, {})
        for who, run in (("axolotl", run_axolotl), ("plain", run_plain)):
            if who in measured and "error" not in measured[who]:
                continue
            if who == "plain" and name not in PEERS:
                continue
            measured[who] = run(config, args.warm)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            print(name, who, json.dumps(measured[who]), flush=True)
    sys.exit(any("error" in m for row in result["rows"].values() for m in row.values()))


if __name__ == "__main__":
    main()
