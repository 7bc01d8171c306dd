"""`axolotl evaluate`: loss, perplexity and exact match of the trained model on held-out rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl import console
from axolotl.config import Config
from axolotl.distributed.world import detect_hardware
from axolotl.errors import ConfigError, DataError
from axolotl.inference.evaluate import evaluate_loss, exact_match
from axolotl.inference.loading import load_trained
from axolotl.run.preprocess import prepare_data
from axolotl.run.ready import named_on_purpose, ready, refuse_untrained_adapter, told_with_places


@told_with_places
def evaluate(
    cfg: Config, *, answers: bool = False, max_rows: int | None = None, untrained: bool = False
) -> dict[str, Any]:
    """Evaluates on test_datasets, else on the rows that val_set_size holds out. Returns the figures.

    They are printed as one JSON line and written to `{output_dir}/evaluation.json`. `answers` also lets the model answer
    every row and compares (exact match; the rows go to evaluation.csv). Without trained weights this is an error,
    unless `untrained` says that the base model is meant. Raises DataError where nothing is held out.
    """
    refuse_untrained_adapter(cfg, untrained)
    if max_rows is not None and not answers:
        raise ConfigError("`--max-rows` limits the answers, which are not asked for.", "Add `--answers`.")
    hardware = detect_hardware()
    cfg = ready(cfg, hardware)
    output_dir = Path(cfg.output.output_dir)
    loaded = load_trained(
        cfg.model,
        cfg.adapter,
        cfg.data,
        hardware,
        output_dir,
        require_training=not named_on_purpose(cfg),
        untrained=untrained,
    )
    rows = prepare_data(cfg, loaded.tokenizer).eval_dataset()
    if rows is None or not len(rows):
        raise DataError(
            "there are no held-out rows to evaluate on.",
            "Set `val_set_size` (for example 0.05), or name files under `test_datasets`.",
        )
    loss = evaluate_loss(loaded.model, rows)
    figures: dict[str, Any] = {
        "model": loaded.source,
        "loss": round(loss.loss, 6),
        "perplexity": round(loss.perplexity, 6),
        "tokens": loss.tokens,
        "rows": loss.rows,
    }
    if answers:
        match = exact_match(loaded.model, loaded.tokenizer, rows, loaded.stops, max_rows=max_rows)
        figures |= {"exact_match": round(match.share, 6), "matches": match.matches, "asked": match.rows}
        if match.skipped:
            figures["not_asked"] = match.skipped
        match.write_csv(output_dir / "evaluation.csv")
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for line in table(figures):
        console.note(line)
    console.out(json.dumps(figures))
    return figures


def table(figures: Mapping[str, Any]) -> list[str]:
    """The figures for people, one on a line."""
    shown = {
        "loss": f"{figures['loss']:.4f}",
        "perplexity": f"{figures['perplexity']:.4f}",
        "rows": f"{figures['rows']:,}",
        "trained tokens": f"{figures['tokens']:,}",
    }
    if "exact_match" in figures:
        counts = f"{figures['matches']:,} of {figures['asked']:,}"
        if figures.get("not_asked"):
            counts += f"; {figures['not_asked']:,} more hold no question to ask"
        shown["exact match"] = (
            f"{100 * figures['exact_match']:.1f} % ({counts}; every answer: evaluation.csv)"
        )
    width = max(map(len, shown))
    return [f"{name:<{width}}  {value}" for name, value in shown.items()]
