"""What a run does with its layers: tiles, compilation, computing them again, activations that wait elsewhere."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from axolotl.config.kernels import KernelsSection
from axolotl.config.train import TrainSection
from axolotl.console import note
from axolotl.distributed.world import world
from axolotl.model.compiled import compile_layers
from axolotl.model.park import Park
from axolotl.model.recompute import Recompute, Recomputing, apply_recompute, recompute_of
from axolotl.model.replace import Replacements
from axolotl.model.tiles import SMALL_TILE, TILE, tile_feed_forward

FOLDER = ".activations"
"""Where `activation_offloading: disk` writes, inside output_dir."""


def spare_memory(
    model: PreTrainedModel,
    train: TrainSection,
    kernels: KernelsSection,
    device: torch.device,
    made: Replacements,
    *,
    output_dir: Path | None = None,
    park: Park | None = None,
    compiles: bool = True,
    strict: bool = False,
) -> Recomputing:
    """Gives a model with its kernels what the keys ask for; undone with `made`.

    `model` is transformers' model without PEFT's wrapper. `output_dir` is where `disk` writes; `park` stands for another
    place than the keys name; without `compiles`, `torch_compile` is left out, as plans do. Raises ModelError where the model has no layers that can be computed again.
    """
    how = recompute_of(train)
    tiles, asked = kernels.tiled_mlp_num_shards, kernels.tiled_mlp
    # In a layer that is computed again, a fused LoRA layer would be gone through twice: its tiles are gone through once.
    fused_alone = asked is None and how is not None and how.own and how.layers is None
    if asked or fused_alone:
        count = tile_feed_forward(
            model,
            made,
            tiles,
            original=kernels.tiled_mlp_use_original_mlp,
            replaced_only=fused_alone,
            tokens=SMALL_TILE if how is not None and how.place else TILE,
        )
        if asked and not count:
            note(f"`tiled_mlp`: {type(model).__name__} has no feed-forward layers that can be tiled.")
    folder = None
    if how is not None and how.place == "disk" and output_dir is not None and park is None:
        folder = _own_folder(output_dir / FOLDER, made)
    compiling = compile_layers(model, train, made, strict=strict) if compiles else None
    return apply_recompute(model, how, device, made, folder=folder, park=park, compiled=compiling is not None)


def _own_folder(folder: Path, made: Replacements) -> Path:
    """An empty folder in there for this process, removed with `made`."""
    own = folder / f"rank-{world().rank}"
    # What a run left behind that was killed; the other processes of this one write beside it.
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)

    def remove() -> None:
        shutil.rmtree(own, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()

    made.undoing(remove)
    return own


def in_words(how: Recompute | None, done: Recomputing) -> str:
    """What was done, for the log; empty where nothing was."""
    if how is None:
        return ""
    words = f"{done.recomputed} of {done.layers} layers are computed again in the backward pass"
    if done.kept:
        words += f", the results of {', '.join(how.keeps)} kept"
    places = {"host": "in CPU memory", "plain": "in CPU memory", "disk": "on disk"}
    return words + (f"; what they need waits {places[how.place]}" if how.place else "")
