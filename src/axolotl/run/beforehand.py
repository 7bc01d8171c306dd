"""Everything that can be wrong with a run and be seen before any work: one list, for `check` and for `train`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from axolotl.config import Config, Hardware, unbuilt
from axolotl.config.axes import axes_problems
from axolotl.config.rules.devices import several_devices_needed
from axolotl.data import templates
from axolotl.distributed import zero
from axolotl.distributed.world import world
from axolotl.errors import Problem, UserError
from axolotl.inference.benchmarks import check_tasks
from axolotl.model import attention, float8, load, quantize, tokenizer
from axolotl.model.files import check_adapter_dir, check_base_model
from axolotl.model.hub import check_hub, check_upload
from axolotl.optim import registry as optimizers
from axolotl.registry import missing_extra
from axolotl.run.parallel_beforehand import check_heads
from axolotl.run.ready import check_folder, check_output, placed
from axolotl.run.rows_beforehand import check_length, dataset_problems
from axolotl.train import arguments, tracking
from axolotl.train.build import packs_rows
from axolotl.train.checkpoint import resume_folder


def problems_beforehand(
    cfg: Config, hardware: Hardware, *, data: bool, processes: int | None = None
) -> list[Problem]:
    """All mistakes of config, files and machine that show before a model is loaded and before data is prepared.

    `data`: open the datasets as well, and look at their columns and first rows. A run does that anyway when it prepares them; it asks
    for it here where something else is wrong already, so that everything is told at once. `processes`: how many the run
    will have, where they do not run yet; 0 where another program decides that.
    """
    if processes is None:
        ray = cfg.distributed.use_ray
        processes = cfg.distributed.ray_num_workers if ray else world().size
    problems = [*_cheap(cfg, hardware, processes)]
    if data or any(p.fatal for p in problems):
        problems += [*check_hub(cfg.model.base_model), *dataset_problems(cfg)]
    return [placed(cfg, problem) for problem in problems]


def _cheap(cfg: Config, hardware: Hardware, processes: int) -> Iterator[Problem]:
    alone = several_devices_needed(cfg, processes) if processes else []
    told = {key for problem in alone for key in problem.keys}
    yield from alone
    yield from axes_problems(cfg, processes) if processes > 1 else ()
    if cfg.distributed.use_ray:
        yield from missing_extra("ray", "ray", "`use_ray: true`", "use_ray")
    yield from zero.check(cfg, hardware, processes, installed="deepspeed" not in told)
    yield from (p for p in unbuilt(cfg) if not told.intersection(p.keys))
    yield from check_output(cfg)
    yield from check_folder(cfg, "dataset_prepared_path", cfg.data.dataset_prepared_path)
    yield from check_base_model(cfg.model)
    yield from check_adapter_dir(cfg.adapter)
    yield from load.check(cfg.model)
    yield from check_length(cfg)
    yield from check_heads(cfg)
    yield from tokenizer.check(cfg.model)
    yield from quantize.check(cfg.model, cfg.adapter)
    yield from quantize.check_files(cfg.model, cfg.adapter, hardware.device)
    yield from float8.check(cfg.model, hardware)
    yield from attention.check(cfg.model, packs_rows(cfg.data), hardware)
    yield from templates.check(cfg.data)
    yield from optimizers.check(cfg.optim)
    yield from tracking.check(cfg.tracking)
    yield from arguments.check(cfg.train)
    yield from check_tasks(cfg.method.lm_eval_tasks if cfg.method.lm_eval_post_train else None)
    resume = cfg.train.resume_from_checkpoint
    resuming = bool(resume or cfg.train.auto_resume_from_checkpoints)
    yield from check_upload(cfg.output.hub_model_id, resuming=resuming)
    if resume and resume.lower() not in ("true", "auto") and not Path(resume).is_dir():
        try:
            resume_folder(resume, False, Path(cfg.output.output_dir))
        except UserError as error:
            yield from error.problems
