"""Where the whole model is that `quantize` and `export` make something of."""

from __future__ import annotations

from pathlib import Path

from axolotl.config import Config
from axolotl.errors import ModelError
from axolotl.inference.loading import find_trained
from axolotl.model.files import WEIGHTS, WEIGHTS_INDEX, local_folder
from axolotl.weights.merge import base_folder


def finished_model(cfg: Config, base_model: str | None, purpose: str) -> Path:
    """The folder of `base_model` where it is given, else `{output_dir}/merged`, else what a full fine-tuning left.

    `purpose`: what is to be done with it, such as "quantized". Raises ModelError where there is no whole model.
    """
    if base_model is not None:
        return base_folder(cfg.model.model_copy(update={"base_model": base_model, "base_model_config": None}))
    output = Path(cfg.output.output_dir).expanduser()
    for folder in (output / "merged", output):
        whole = any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))
        if whole and (folder / "config.json").is_file():
            return folder
    found = find_trained(cfg.model, cfg.adapter, output)
    if found.model is not None:
        return found.model
    if found.adapter is not None:
        raise ModelError(
            f"`{found.adapter}` is an adapter; only a whole model can be {purpose}.",
            f"Merge it first: axolotl merge-lora {cfg.sources[0] if cfg.sources else 'config.yml'}",
        )
    known = local_folder(cfg.model.base_model)
    raise ModelError(
        f"there is no finished model in `{cfg.output.output_dir}`.",
        f"Train first, or name a model: --base-model {known or cfg.model.base_model}",
        cfg.place("output_dir"),
    )
