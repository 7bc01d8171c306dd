"""`axolotl check`: config, files and machine, looked at without running anything."""

from __future__ import annotations

from collections.abc import Sequence

from axolotl.config import Config, unbuilt
from axolotl.data.formats import check_fields, resolve_format
from axolotl.data.sources import open_source
from axolotl.data.stream import streamed_entries, streams
from axolotl.errors import Problem, UserError
from axolotl.model.files import check_adapter_dir, check_base_model
from axolotl.model.hub import check_hub
from axolotl.run.ready import check_output


def check(cfg: Config) -> Sequence[Problem]:
    """All problems and warnings that can be seen from here."""
    problems = [
        *cfg.warnings,
        *unbuilt(cfg),
        *check_output(cfg),
        *check_base_model(cfg.model, cfg.place("base_model")),
        *check_hub(cfg.model.base_model, place=cfg.place("base_model")),
        *check_adapter_dir(cfg.adapter, cfg.place("lora_model_dir")),
    ]
    entries = [(key, entry) for key, entry, _ in streamed_entries(cfg.data)]
    entries += [(f"test_datasets[{i}]", e) for i, e in enumerate(cfg.data.test_datasets)]
    for key, entry in entries:
        try:
            columns = list(
                open_source(entry, cfg.data, cfg.place(f"{key}.path"), endless=streams(cfg.data)).columns
            )
            format_ = resolve_format(entry, columns, cfg.data, cfg.place(f"{key}.type"))
            unfit = check_fields(format_, columns, entry, cfg.place(key))
            problems += [unfit] if unfit else []
        except UserError as error:
            problems += error.problems
    return problems
