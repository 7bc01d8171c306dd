"""`axolotl quantize`: the finished model in smaller numbers, compared with the full one on held-out rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from axolotl import console
from axolotl.config import Config
from axolotl.data.stream import streams
from axolotl.distributed.world import detect_hardware
from axolotl.errors import ConfigError, DataError, Problem
from axolotl.inference.evaluate import evaluate_loss
from axolotl.run.finished import finished_model
from axolotl.run.preprocess import prepare_data, tokenizer_of
from axolotl.run.ready import ready, told_with_places
from axolotl.weights.quantize import QuantizeReport, check_scheme
from axolotl.weights.quantize import quantize as quantize_weights

_ROWS = 200


@told_with_places
def quantize(
    cfg: Config, *, destination: Path | None = None, base_model: str | None = None
) -> QuantizeReport:
    """Writes `{output_dir}/quantized` as `quantization` of the config says.

    The model is `base_model` where it is given, else `{output_dir}/merged`, else what a full fine-tuning left in
    output_dir. Raises ConfigError where nothing says how to quantise, ModelError where there is no whole model.
    """
    hardware = detect_hardware()
    wanted = cfg.model.quantization
    if wanted is None:
        raise ConfigError(
            Problem(
                "`axolotl quantize` needs to know how.",
                "Write `quantization: {weight_dtype: int8}` into the config, or give --weight-dtype.",
                "missing",
                ("quantization",),
            )
        )
    check_scheme(wanted, hardware.device)
    cfg = ready(cfg, hardware)
    source = finished_model(cfg, base_model, "quantized")
    model = cfg.model.model_copy(update={"base_model": str(source), "tokenizer_config": None})
    tokenizer = tokenizer_of(cfg, source)
    rows = _rows(cfg, tokenizer)
    report = quantize_weights(
        source,
        destination or Path(cfg.output.output_dir) / "quantized",
        wanted,
        tokenizer,
        device=hardware.device,
        measure=(lambda m: evaluate_loss(m, rows)) if rows is not None else None,
        trust_remote_code=bool(model.trust_remote_code),
    )
    for line in report.table():
        console.note(line)
    console.out(json.dumps(report.as_dict()))
    config = cfg.sources[0] if cfg.sources else "config.yml"
    console.note(f"Next:\n  axolotl inference {config} --base-model {report.destination} --chat")
    return report


def _rows(cfg: Config, tokenizer: Any) -> Any | None:
    """Held-out rows, else rows of the training data; None where there is no data to compare on."""
    if streams(cfg.data) and not cfg.data.test_datasets:
        console.note("The data is streamed: the sizes are compared, not the losses.")
        return None
    try:
        prepared = prepare_data(cfg, tokenizer)
    except DataError as error:
        console.note(
            f"The losses are not compared, since the data cannot be read: {error.problems[0].message}"
        )
        return None
    rows = prepared.eval_dataset()
    if rows is None or not len(rows):
        console.note("No rows are held out (`val_set_size`): the losses are those of training rows.")
        rows = prepared.train_dataset()
    return rows.select(range(min(_ROWS, len(rows))))
