"""`axolotl merge-sharded-fsdp-weights`: the parts that the processes of a sharded run saved, as one model."""

from __future__ import annotations

from pathlib import Path

import torch

from axolotl.config import Config
from axolotl.distributed.world import detect_hardware
from axolotl.errors import CheckpointError
from axolotl.run.preprocess import carry_template, stop_tokens, tokenizer_of
from axolotl.run.ready import ready, told_with_places
from axolotl.weights.consolidate import SHARDED, Consolidated, find_sharded
from axolotl.weights.consolidate import consolidate as consolidate_weights


@told_with_places
def consolidate(
    cfg: Config, *, sharded_dir: Path | None = None, destination: Path | None = None, dtype: str | None = None
) -> Consolidated:
    """Writes `{output_dir}/merged` from the newest sharded checkpoint, or from `sharded_dir`.

    Raises CheckpointError where there is none or it is damaged, ModelError where it is another model's.
    """
    cfg = ready(cfg, detect_hardware())
    if sharded_dir is None:
        sharded = find_sharded(cfg.output.output_dir)
    elif not sharded_dir.is_dir():
        raise CheckpointError(f"`--sharded-dir {sharded_dir}` is no folder.", "Check the path.")
    else:
        sharded = sharded_dir / SHARDED if (sharded_dir / SHARDED).is_dir() else sharded_dir
    tokenizer = tokenizer_of(cfg)
    carry_template(cfg, tokenizer)
    return consolidate_weights(
        cfg.model,
        sharded,
        destination or Path(cfg.output.output_dir) / "merged",
        tokenizer,
        dtype=getattr(torch, dtype) if dtype else None,
        stop_tokens=stop_tokens(cfg, tokenizer),
    )
