"""One run after another in one process, for the memory grid: what `axolotl train` does between its command line and its disk.

Reads one JSON object per line from stdin ({"point": ..., "folder": ..., "tiny": ...}) and writes one result per line to
stdout; it ends with its input. All imports are done before the first line is read, and no GPU is touched until then.

The same as in `axolotl train`: config and its automatic values, the choice of attention, the loaded model (`reinit_weights`, so
its numbers are drawn on the GPU), bitsandbytes' packing, PEFT's adapter, our kernels with their trials, batches, loss,
optimizer, schedule, clipping, callbacks, log. Left out: checks and the plan beforehand, preparation of data (rows of random
tokens are made in memory), evaluation, saving. The peak is counted from the moment at which the trainer is ready.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft  # noqa: F401  (so that no run pays for the import)
import pyarrow as pa
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from transformers.trainer_callback import TrainerCallback

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from geometries import write_model  # noqa: E402
from measure import TINY  # noqa: E402

from axolotl.config import load_config, resolve  # noqa: E402
from axolotl.distributed.world import detect_hardware  # noqa: E402
from axolotl.errors import UserError  # noqa: E402
from axolotl.model.adapter import add_adapter  # noqa: E402
from axolotl.model.load import load_model  # noqa: E402
from axolotl.run.preprocess import tokenizer_of  # noqa: E402
from axolotl.train.build import attention_for, build_trainer  # noqa: E402
from axolotl.train.session import seed_everything  # noqa: E402

GIB = 2**30
MOST_STEPS, LEAST_STEPS = 8, 2
ENOUGH_SECONDS = 2.5
"""Steps after the first are timed until they took so long together."""
TINY_GEOMETRY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 4096,
}


class Watch(TrainerCallback):
    """Times each step, from the end of the one before, with the GPU waited for; ends the run when that is enough."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(_now())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(_now())
        done = len(self.ends) - 1
        if done >= LEAST_STEPS and self.ends[-1] - self.ends[1] >= ENOUGH_SECONDS:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.ends)]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def config_of(point: dict[str, Any], folder: Path, tiny: bool) -> Path:
    """The config of a run, as a file."""
    model = folder / ("tiny" if tiny else "real") / point["model"]
    if not (model / "config.json").exists():
        write_model(point["model"], model, TINY)
        if tiny:
            config = json.loads((model / "config.json").read_text()) | TINY_GEOMETRY
            (model / "config.json").write_text(json.dumps(config))
    keys: dict[str, Any] = {
        "base_model": str(model),
        "reinit_weights": True,
        "datasets": [{"path": "rows.jsonl", "type": "completion"}],
        "output_dir": str(folder / "out"),
        "sequence_len": length_of(point, tiny),
        "sample_packing": point["packed"],
        "micro_batch_size": point["rows"],
        "gradient_accumulation_steps": point["accumulation"],
        "gradient_checkpointing": point["recompute"],
        "max_steps": MOST_STEPS,
        "learning_rate": 1e-5,
        "lr_scheduler": "constant",
        "save_strategy": "no",
        "on_oom": "fail",
        "bf16": True,
        "fused_kernels": False,
        **point["keys"],
    }
    if point["adapter"]:
        keys |= {"adapter": point["adapter"], "lora_r": 32, "lora_alpha": 64, "lora_target_linear": True}
    if point["adapter"] == "qlora":
        keys["load_in_4bit"] = True
    file = folder / "run.yml"
    file.write_text(json.dumps(keys, indent=1), encoding="utf-8")
    return file


def length_of(point: dict[str, Any], tiny: bool) -> int:
    return int(point["length"]) // (64 if tiny else 1)


def make_rows(point: dict[str, Any], tiny: bool) -> datasets.Dataset:
    """Rows of random tokens, all of them trained: full ones, or documents around 700 tokens where they are packed."""
    draw = np.random.default_rng(0)
    length = length_of(point, tiny)
    wanted = length * point["rows"] * point["accumulation"] * (MOST_STEPS + 1)
    lengths: list[int] = []
    while sum(lengths) < wanted or len(lengths) < 2:
        if point["packed"]:
            lengths.append(int(np.clip(draw.lognormal(np.log(min(700, length / 4)) - 0.18, 0.6), 8, length)))
        else:
            lengths.append(length)
    ends = np.cumsum([0, *lengths]).astype(np.int32)
    tokens = pa.array(draw.integers(0, 4000, ends[-1]).astype(np.int32))
    ids = pa.ListArray.from_arrays(pa.array(ends), tokens)
    return datasets.Dataset(pa.table({"input_ids": ids, "labels": ids}))


def run(point: dict[str, Any], folder: Path, tiny: bool) -> dict[str, Any]:
    """The figures of one run. Nothing of it is left in memory afterwards, unless `left_mib` says so."""
    began = time.perf_counter()
    cuda = torch.cuda.is_available()
    result: dict[str, Any] = {}
    try:
        result |= _measured(point, folder, tiny)
    except torch.OutOfMemoryError as error:
        result |= {"oom": str(error).splitlines()[0]}
    except UserError as error:
        result |= {"error": "\n".join(p.message for p in error.problems)}
        if any(p.code in ("AX1402", "AX1403") for p in error.problems):
            result = {"oom": result["error"]}
    except Exception:
        result |= {"error": traceback.format_exc()[-3000:]}
    result |= {"left_mib": round(clear() / 2**20, 2), "took_seconds": round(time.perf_counter() - began, 1)}
    if cuda:
        result["gpu"] = torch.cuda.get_device_name()
    return result


def _measured(point: dict[str, Any], folder: Path, tiny: bool) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    times = [time.perf_counter()]
    hardware = detect_hardware()
    cfg, _ = resolve(load_config(config_of(point, folder, tiny)), hardware)
    tokenizer = tokenizer_of(cfg, None)
    rows = make_rows(point, tiny)
    seed_everything(42)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    model: Any = load_model(
        cfg.model,
        cfg.adapter,
        tokenizer,
        hardware,
        training=True,
        attn_implementation=attention_for(cfg.model, cfg.data, hardware).name,
        seed=42,
    )
    times.append(time.perf_counter())
    if cfg.adapter.adapter is not None:
        model = add_adapter(model, cfg.adapter, seed=42)
    times.append(time.perf_counter())
    trainer = build_trainer(cfg, model, tokenizer, rows, None, hardware)
    watch = Watch()
    trainer.add_callback(watch)
    del model
    gc.collect()
    times.append(time.perf_counter())
    result: dict[str, Any] = {}
    if cuda:
        torch.cuda.synchronize()
        result |= {"ready_gib": _gib(torch.cuda.memory_allocated())}
        result |= {"getting_ready_peak_gib": _gib(torch.cuda.max_memory_allocated())}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    parts: Any = trainer.parts  # type: ignore[attr-defined]
    try:
        trainer.train()
        if cuda:
            free, total = torch.cuda.mem_get_info()
            stats = torch.cuda.memory_stats()
            result |= {
                "peak_gib": _gib(torch.cuda.max_memory_allocated()),
                "reserved_gib": _gib(torch.cuda.max_memory_reserved()),
                "outside_gib": _gib(total - free - torch.cuda.memory_reserved()),
                "retries": stats.get("num_alloc_retries", 0),
            }
    finally:
        parts.batches.close()
        for callback in trainer.callback_handler.callbacks:
            with contextlib.suppress(Exception):
                getattr(callback, "close", lambda: None)()
    seconds = watch.seconds
    # The second step still allocates: the optimizer's state came at the end of the first.
    settled = seconds[2:] if len(seconds) >= 4 else seconds[1:]
    result |= {
        "step_seconds": round(statistics.median(settled), 5),
        "all_step_seconds": [round(s, 4) for s in seconds],
        "losses": [round(x, 4) for x in watch.losses],
        "kernels": dict(parts.replaced.counts),
        "packed_attention": (parts.run.get("attention") or {}).get("kernel"),
        "tokens_per_step": int(trainer.state.num_input_tokens_seen // max(1, trainer.state.global_step)),
        "set_up_seconds": [round(b - a, 2) for a, b in itertools.pairwise(times)],
    }
    result["batches"] = batches_of(parts.batches, len(seconds) * point["accumulation"])
    parts.replaced.undo()
    if not cuda:
        result["peak_gib"] = 0.0
    return result


def batches_of(source: Any, count: int) -> list[list[int]]:
    """[tokens of the longest row, pairs of tokens that attention looks at] of the first batches."""
    plan, lengths, size = source.plan_of(0), source.rows.lengths.astype(np.int64), source.bins_per_batch
    found = []
    for first in range(0, count * size, size):
        bins = [plan[j] for j in range(first, min(first + size, len(plan)))]
        pairs = sum(int((lengths[b] * (lengths[b] + 1) // 2).sum()) for b in bins)
        found.append([max(int(lengths[b].sum()) for b in bins), pairs])
    return found


def _gib(count: int) -> float:
    return round(count / GIB, 4)


def clear() -> int:
    """Frees what a run has left, the workspaces of cuBLAS too; bytes that are still allocated."""
    with contextlib.suppress(Exception):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    with contextlib.suppress(AttributeError):
        torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    # Whatever prints to stdout must not come between the results.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        answers.write(json.dumps(run(asked["point"], Path(asked["folder"]), asked["tiny"])) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
