"""`axolotl train`: from a config to trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl import console
from axolotl.config import Config, Hardware
from axolotl.data.stream import Stream
from axolotl.distributed.deepspeed import begin_zero
from axolotl.distributed.failure import among_several, started_by_us
from axolotl.distributed.fsdp import loads_in_parts
from axolotl.distributed.group import from_main, start_group
from axolotl.distributed.ram_watch import within_ram
from axolotl.distributed.world import detect_hardware, only_repeatable_kernels, world
from axolotl.distributed.zero import compiling
from axolotl.errors import EnvironmentProblem, UserError
from axolotl.model.adapter import add_adapter
from axolotl.model.adapter_files import tell_other_base
from axolotl.model.attention import missing_backend
from axolotl.model.base_identity import record_base
from axolotl.model.load import load_model
from axolotl.model.tokenizer import new_token_ids
from axolotl.report.run import write_run_report
from axolotl.run.beforehand import problems_beforehand
from axolotl.run.memory import automatic, show_memory, tell_memory
from axolotl.run.merge import merge_trained
from axolotl.run.preprocess import carry_template, stop_tokens, tokenizer_of, training_data
from axolotl.run.ready import ready, refuse, told_with_places
from axolotl.train.build import attention_for, build_trainer
from axolotl.train.session import (
    ResumePoint,
    TrainResult,
    accumulation_to_go_on,
    resume_point,
    seed_everything,
)
from axolotl.train.session import train as run_trainer
from axolotl.weights.publish import open_repository


@told_with_places
def train(cfg: Config) -> TrainResult:
    """Trains what the config describes and writes the result into output_dir.

    Raises a UserError for whatever the user can mend, most of it before any model is loaded.
    """
    hardware = detect_hardware()
    alone = not among_several()
    # Who started the processes has shown the warnings and prepared the data.
    with console.silenced(started_by_us()):
        refuse(problems_beforehand(cfg, hardware, data=False))
        cfg = compiling(ready(automatic(cfg, hardware), hardware))
    attention = attention_for(cfg.model, cfg.data, hardware, cfg.distributed)
    tell_attention(cfg, hardware, attention.name)
    resume = resume_point(cfg) if alone else ResumePoint(None)
    if resume.complete:
        return _complete(cfg)
    if alone:
        _open_repository(cfg, resume)
    before = Path(cfg.adapter.lora_model_dir) if cfg.adapter.lora_model_dir else None
    with console.silenced(started_by_us()):
        if before is not None:
            tell_other_base(before, cfg.model.base_model)
        tokenizer = tokenizer_of(cfg, before)
        with within_ram("while the data is prepared"):
            rows, held_out = training_data(cfg, tokenizer)
    tell_memory(cfg, hardware, tokenizer)
    if not alone:
        start_group(hardware, cfg.distributed.ddp_timeout)
        resume = from_main(lambda: resume_point(cfg))
        if resume.complete:
            return _complete(cfg)
        from_main(lambda: _open_repository(cfg, resume))
    if resume.folder is not None:
        cfg = _going_on(cfg, resume.folder)
    seed = 42 if cfg.train.seed is None else cfg.train.seed
    if cfg.train.deterministic:
        only_repeatable_kernels()
    begin_zero(cfg, hardware)
    seed_everything(seed)
    model: Any = load_model(
        cfg.model,
        cfg.adapter,
        tokenizer,
        hardware,
        training=True,
        attn_implementation=attention.name,
        seed=seed,
        stop_tokens=stop_tokens(cfg, tokenizer),
        adapter_dir=before,
        in_parts=loads_in_parts(cfg.distributed),
    )
    if cfg.adapter.adapter is not None:
        model = add_adapter(
            model,
            cfg.adapter,
            new_tokens=new_token_ids(tokenizer),
            resume_from=before,
            seed=seed,
        )
        if world().is_main:
            record_base(Path(cfg.output.output_dir), cfg.model.base_model, model.peft_config["default"])
    carry_template(cfg, tokenizer)
    trainer = build_trainer(cfg, model, tokenizer, rows, held_out, hardware, resume=resume.folder)
    try:
        result = run_trainer(trainer, cfg, resume.folder)
    except EnvironmentProblem as error:
        if any(problem.code == "AX1403" for problem in error.problems):
            show_memory(cfg, hardware, tokenizer)
        raise
    if world().is_main:
        _report(Path(cfg.output.output_dir))
    for line in rows.summary() if isinstance(rows, Stream) else ():
        console.note(line)
    if cfg.adapter.merge_lora and result.complete and cfg.adapter.adapter is not None and world().is_main:
        merge_trained(cfg, tokenizer, Path(cfg.output.output_dir), None)
    return result


def tell_attention(cfg: Config, hardware: Hardware, chosen: str) -> None:
    """Says what runs in place of an attention that this machine does not have.

    Raises EnvironmentProblem under `strict`.
    """
    asked = cfg.model.attn_implementation
    why = missing_backend(asked, hardware)
    if why is None:
        return
    message = f"`attn_implementation: {asked}` is not here: {why}"
    if cfg.output.strict:
        remedy = "Delete the line for the best attention that is here, or set `strict: false`."
        raise EnvironmentProblem(
            cfg.problem(
                f"{message}.", remedy, "attn_implementation", "strict", kind="environment", code="AX1406"
            )
        )
    console.note(f"{message}. PyTorch's own attention ({chosen}) takes its place. [AX1406]")


def _going_on(cfg: Config, folder: Path) -> Config:
    steps = accumulation_to_go_on(cfg, folder)
    if steps == cfg.train.gradient_accumulation_steps:
        return cfg
    key = "gradient_accumulation_steps"
    return cfg.with_values({key: steps}, {key: f"as in {folder.name}, on another number of processes"})


def _complete(cfg: Config) -> TrainResult:
    console.success(f"The run in `{cfg.output.output_dir}` is complete: there is nothing left to train.")
    return TrainResult(0, True, None, {})


def _open_repository(cfg: Config, resume: ResumePoint) -> None:
    """Raises EnvironmentProblem where the Hub refuses; a run that has begun goes on, and uploads at its end."""
    if not cfg.output.hub_model_id:
        return
    try:
        open_repository(cfg.output)
    except EnvironmentProblem as error:
        if resume.folder is None:
            raise
        console.warn(error.problems[0].message)


def _report(output_dir: Path) -> None:
    """Writes the run report; a disk that refuses it is no failure of the run."""
    try:
        console.note(f"Report: {write_run_report(output_dir)}")
    except (OSError, UserError) as error:
        console.warn(f"There is no report of the run: {error}")
