"""`axolotl merge-lora`: base model and adapter as one model, compared afterwards on the user's own rows."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from axolotl import console
from axolotl.config import Config
from axolotl.data.stream import streams
from axolotl.distributed.world import detect_hardware
from axolotl.errors import ModelError, UserError
from axolotl.inference.loading import find_trained
from axolotl.model.files import check_base_model
from axolotl.run.preprocess import prepare_data, stop_tokens, tokenizer_of
from axolotl.run.ready import placed, ready, refuse, told_with_places
from axolotl.weights.merge import MergeReport
from axolotl.weights.merge import merge as merge_weights

_SAMPLE_ROWS, _SAMPLE_TOKENS = 4, 256


@told_with_places
def merge(cfg: Config, *, destination: Path | None = None, base: str = "full") -> MergeReport:
    """Merges the trained adapter and writes `{output_dir}/merged`. Raises ModelError where there is none."""
    cfg = ready(cfg, detect_hardware())
    found = find_trained(cfg.model, cfg.adapter, cfg.output.output_dir)
    if found.alone:
        # A base whose files are not whole is not recognised either.
        refuse([placed(cfg, problem) for problem in check_base_model(cfg.model)])
        raise ModelError(
            f"`{cfg.model.base_model}` is not the base of the adapter in `{cfg.output.output_dir}`.",
            "Leave `base_model` as it was in training, or name another adapter: --lora-model-dir DIR.",
            cfg.place("base_model"),
        )
    if found.model is not None:
        raise ModelError(
            f"`{found.model}` holds a whole model, trained without an adapter: there is nothing to merge.",
            "Use it as it is, or name an adapter: --lora-model-dir DIR.",
            cfg.place("output_dir"),
        )
    if found.adapter is None:
        raise ModelError(
            f"there is no trained adapter in `{cfg.output.output_dir}`.",
            "Train first, or name the adapter: --lora-model-dir DIR.",
            cfg.place("output_dir"),
        )
    tokenizer = tokenizer_of(cfg, found.adapter)
    return merge_trained(cfg, tokenizer, found.adapter, destination, base)


def merge_trained(
    cfg: Config, tokenizer: Any, adapter_dir: Path, destination: Path | None, base: str = "full"
) -> MergeReport:
    """Merges one adapter, verifies, and says what came of it."""
    target = destination or Path(cfg.output.output_dir) / "merged"
    report = merge_weights(
        cfg.model,
        cfg.adapter,
        adapter_dir,
        target,
        tokenizer=tokenizer,
        sample_rows=_sample_rows(cfg, tokenizer),
        stop_tokens=stop_tokens(cfg, tokenizer),
        base=base,  # type: ignore[arg-type]
    )
    words = cfg.words("lora_model_dir", "base_model", of=("model", "adapter", "data"))
    ask = shlex.join(["axolotl", "inference", *words, "--base-model", str(target), "--chat"])
    console.note(f"Next:\n  {ask}")
    return report


def _sample_rows(cfg: Config, tokenizer: Any) -> list[list[int]]:
    """A few of the user's own rows; none where the data is not at hand, which does not keep a merge from happening."""
    if not cfg.data.datasets or streams(cfg.data):
        return []
    try:
        rows = prepare_data(cfg, tokenizer).train_dataset()
    except UserError as error:
        console.note(
            f"The merge is compared on made-up text, since the training data cannot be read: {error.problems[0].message}"
        )
        return []
    return [list(ids)[:_SAMPLE_TOKENS] for ids in rows[:_SAMPLE_ROWS]["input_ids"]]
