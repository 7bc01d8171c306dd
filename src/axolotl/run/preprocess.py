"""`axolotl preprocess`: tokenise the datasets and save them; on request show what the model will see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from axolotl import console
from axolotl.config import Config, Hardware
from axolotl.data.prepare import prepare
from axolotl.data.prepared import Prepared
from axolotl.data.preview import preview
from axolotl.data.render import build_renderer
from axolotl.model.files import check_base_model
from axolotl.model.hub import check_hub
from axolotl.model.tokenizer import load_tokenizer
from axolotl.report.dataset import write_report
from axolotl.run.ready import ready, refuse, told_with_places


@told_with_places
def preprocess(
    cfg: Config, *, debug: bool = False, debug_text_only: bool = False, report: bool = False
) -> Prepared:
    """Prepares the data of a config. Raises a UserError for whatever the user can mend."""
    cfg = ready(cfg, Hardware(device="cpu"))
    tokenizer = tokenizer_of(cfg)
    prepared = prepare_data(cfg, tokenizer)
    if debug or debug_text_only:
        preview(prepared, tokenizer, ids=not debug_text_only)
    if report:
        file = write_report(prepared, tokenizer, prepared.root / "report.html")
        console.success(f"Report: {file}")
    console.success(f"Prepared data: {prepared.root}")
    return prepared


def tokenizer_of(cfg: Config, adapter_dir: Path | None = None) -> Any:
    """The tokenizer of the config, after a look at the files of the base model."""
    place = cfg.place("base_model")
    refuse([*check_base_model(cfg.model, place), *check_hub(cfg.model.base_model, place=place)])
    return load_tokenizer(cfg.model, adapter_dir, place=place)


def prepare_data(cfg: Config, tokenizer: Any) -> Prepared:
    """The prepared datasets of the config, made now where they were not made before."""
    seed = 42 if cfg.train.seed is None else cfg.train.seed
    return prepare(cfg.data, tokenizer, seed=seed, places=cfg.place)


def stop_tokens(cfg: Config, tokenizer: Any) -> Sequence[str]:
    """The texts that end an answer in the config's datasets."""
    texts = [
        t for entry in cfg.data.datasets for t in build_renderer(tokenizer, cfg.data, entry).stop_tokens()
    ]
    return list(dict.fromkeys(texts))
