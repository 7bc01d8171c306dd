"""Everything that can be wrong with a run and be seen before any work: one list, for `check` and for `train`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from axolotl.config import Config, Hardware, unbuilt
from axolotl.config.rules.devices import several_devices_needed
from axolotl.data import templates
from axolotl.data.formats import check_fields, resolve_format
from axolotl.data.sources import open_source
from axolotl.data.stream import streamed_entries, streams
from axolotl.distributed.world import world
from axolotl.errors import ModelError, Problem, UserError
from axolotl.model import attention, load, quantize, tokenizer
from axolotl.model.files import check_adapter_dir, check_base_model, local_folder, read_json
from axolotl.model.hub import check_hub, check_upload
from axolotl.optim import registry as optimizers
from axolotl.run.ready import check_folder, check_output, placed
from axolotl.train import arguments, tracking
from axolotl.train.build import packs_rows
from axolotl.train.checkpoint import resume_folder


def problems_beforehand(
    cfg: Config, hardware: Hardware, *, data: bool, processes: int | None = None
) -> list[Problem]:
    """All mistakes of config, files and machine that show without a model or a row being read.

    `data`: open the datasets as well, and look at their columns. A run does that anyway when it prepares them; it asks
    for it here where something else is wrong already, so that everything is told at once. `processes`: how many the run
    will have, where they do not run yet.
    """
    problems = [*_cheap(cfg, hardware, processes or world().size)]
    if data or any(p.fatal for p in problems):
        problems += [*check_hub(cfg.model.base_model), *_data(cfg)]
    return [placed(cfg, problem) for problem in problems]


def _cheap(cfg: Config, hardware: Hardware, processes: int) -> Iterator[Problem]:
    alone = several_devices_needed(cfg, processes)
    told = {key for problem in alone for key in problem.keys}
    yield from alone
    yield from (p for p in unbuilt(cfg) if not told.intersection(p.keys))
    yield from check_output(cfg)
    yield from check_folder(cfg, "dataset_prepared_path", cfg.data.dataset_prepared_path)
    yield from check_base_model(cfg.model)
    yield from check_adapter_dir(cfg.adapter)
    yield from load.check(cfg.model)
    yield from check_length(cfg)
    yield from tokenizer.check(cfg.model)
    yield from quantize.check(cfg.model, cfg.adapter)
    yield from attention.check(cfg.model, packs_rows(cfg.data), hardware)
    yield from templates.check(cfg.data)
    yield from optimizers.check(cfg.optim)
    yield from tracking.check(cfg.tracking)
    yield from arguments.check(cfg.train)
    resume = cfg.train.resume_from_checkpoint
    resuming = bool(resume or cfg.train.auto_resume_from_checkpoints)
    yield from check_upload(cfg.output.hub_model_id, resuming=resuming)
    if resume and resume.lower() not in ("true", "auto") and not Path(resume).is_dir():
        try:
            resume_folder(resume, False, Path(cfg.output.output_dir))
        except UserError as error:
            yield from error.problems


def check_length(cfg: Config) -> Iterator[Problem]:
    """A warning where rows may be longer than the positions that a model on this machine was made for."""
    folder = local_folder(cfg.model.base_model_config or cfg.model.base_model)
    if folder is None or not (folder / "config.json").is_file():
        return
    try:
        whole = read_json(folder / "config.json")
    except ModelError:
        return  # told with the model
    changed = cfg.model.overrides_of_model_config or {}
    inner = whole.get("text_config")
    facts = {**whole, **(inner if isinstance(inner, dict) else {}), **changed}
    longest = facts.get("max_position_embeddings")
    rope = facts.get("rope_scaling") or facts.get("rope_parameters")
    scaled = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) != "default"
    if not isinstance(longest, int) or scaled or cfg.data.sequence_len <= longest:
        return
    yield cfg.problem(
        f"`sequence_len` is {cfg.data.sequence_len:,}, and the model was made for {longest:,} positions "
        "(`max_position_embeddings`).",
        f"Set `sequence_len: {longest}`, or scale the positions with `overrides_of_model_config: {{rope_scaling: ...}}`.",
        "sequence_len",
        kind="warning",
    )


def _data(cfg: Config) -> Iterator[Problem]:
    entries = [(key, entry) for key, entry, _ in streamed_entries(cfg.data)]
    entries += [(f"test_datasets[{i}]", e) for i, e in enumerate(cfg.data.test_datasets)]
    for key, entry in entries:
        try:
            place = cfg.place(f"{key}.path")
            columns = list(open_source(entry, cfg.data, place, endless=streams(cfg.data)).columns)
            format_ = resolve_format(entry, columns, cfg.data, cfg.place(f"{key}.type"))
            unfit = check_fields(format_, columns, entry, cfg.place(key))
        except UserError as error:
            yield from error.problems
        else:
            yield from [unfit] if unfit else []
