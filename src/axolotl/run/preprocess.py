"""`axolotl preprocess`: tokenise the datasets and save them; with `debug` show what the model will see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl import console
from axolotl.config import Config, Hardware
from axolotl.data.prepare import prepare
from axolotl.data.prepared import Prepared
from axolotl.data.preview import preview
from axolotl.model.files import check_base_model
from axolotl.model.tokenizer import load_tokenizer
from axolotl.report.dataset import write_report
from axolotl.run.ready import ready, refuse


def preprocess(cfg: Config, *, debug: bool = False, debug_text_only: bool = False, report: bool = False) -> Prepared:
    """Prepares the data of a config. Raises a UserError for whatever the user can mend."""
    cfg = ready(cfg, Hardware(device="cpu"))
    tokenizer = tokenizer_of(cfg)
    prepared = prepare_data(cfg, tokenizer)
    if debug or debug_text_only:
        preview(prepared, tokenizer, ids=not debug_text_only)
    if report:
        file = Path(cfg.output.output_dir) / "dataset_report.html"
        write_report(prepared, tokenizer, file)
        console.success(f"Report: {file}")
    console.success(f"Prepared data: {prepared.root}")
    return prepared


def tokenizer_of(cfg: Config) -> Any:
    """The tokenizer of the config, after a look at the files of the base model."""
    refuse(check_base_model(cfg.model, cfg.place("base_model")))
    return load_tokenizer(cfg.model, place=cfg.place("base_model"))


def prepare_data(cfg: Config, tokenizer: Any) -> Prepared:
    """The prepared datasets of the config, made now where they were not made before."""
    return prepare(cfg.data, tokenizer, seed=cfg.train.seed if cfg.train.seed is not None else 42, places=cfg.place)
