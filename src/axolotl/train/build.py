"""From a config, a model and data to a trainer that is ready to go."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import uuid
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from axolotl.config import Config
from axolotl.config.axes import Axes, axes_of
from axolotl.config.data import DataSection
from axolotl.config.distributed import DistributedSection, FsdpConfig
from axolotl.config.model import ModelSection
from axolotl.config.resolve import Hardware
from axolotl.console import detail, note, warn
from axolotl.data.stream import Stream
from axolotl.distributed.deepspeed import divided
from axolotl.distributed.failure import launch_name
from axolotl.distributed.fsdp import Sharding, give_back, mesh_for, norms_in_float32, shard_model
from axolotl.distributed.world import world
from axolotl.errors import ModelError, Problem
from axolotl.methods.registry import Method, method_of
from axolotl.model.attention import AttentionChoice, choose_attention, set_attention
from axolotl.model.context import SharedRows, share_rows
from axolotl.model.empty import fill, put_on_meta, source_of, take_out
from axolotl.model.float8 import train_in_float8
from axolotl.model.patch import Bench, apply_kernels
from axolotl.model.recompute import recompute_of
from axolotl.model.replace import Replacements
from axolotl.model.sparing import in_words, spare_memory
from axolotl.registry import require_extra
from axolotl.train.advice import LossAdvice
from axolotl.train.anomalies import SpikeWatch
from axolotl.train.arguments import build_arguments
from axolotl.train.attention import choose_kernel
from axolotl.train.batches import BatchSource, build_batches
from axolotl.train.cadence import Cadence
from axolotl.train.callbacks import (
    AtSteps,
    CheckpointOnRequest,
    CollectGarbage,
    EarlyStopping,
    EpochOrder,
    LossWatch,
    Profile,
    Signals,
)
from axolotl.train.checkpoint import RUN, differences, read_json, read_state
from axolotl.train.probe import documents_stay_apart, loss_takes_tokens
from axolotl.train.progress import ProgressLine, RunLog
from axolotl.train.record import asked, describe
from axolotl.train.samples import Samples
from axolotl.train.saving import SaveCare
from axolotl.train.shared import check_sharing, shared_rows_of, with_parts
from axolotl.train.steps import StepCheck
from axolotl.train.streamed import StreamSource, stream_batches
from axolotl.train.tracking import guarded, start_tracking
from axolotl.train.trainer import CausalTrainer, Parts, TrainerMixin, token_loss
from axolotl.train.watch import HangWatch, TimeLimit
from axolotl.weights.publish import Uploads


def attention_for(
    model: ModelSection, data: DataSection, hardware: Hardware, distributed: DistributedSection | None = None
) -> AttentionChoice:
    """The attention of a training run: what the model has to be loaded with."""
    shared = distributed is not None and (distributed.context_parallel_size or 1) > 1
    return choose_attention(model, packs_rows(data), hardware, shared)


def packs_rows(data: DataSection) -> bool:
    """Whether several documents share a row, in training or in evaluation."""
    return bool(data.sample_packing or data.eval_sample_packing or data.batch_flattening is True)


def build_trainer(
    cfg: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: datasets.Dataset | Stream,
    eval_dataset: datasets.Dataset | None,
    hardware: Hardware,
    resume: Path | None = None,
) -> Trainer:
    """A trainer for the config's method. `model` is resized, quantised, frozen and adapted already.

    `train_dataset` (unless it is a stream) and `eval_dataset` hold prepared rows. `resume` is the checkpoint that training will continue from
    (see `axolotl.train.session.resume_point`). Raises a UserError where the config asks for what model, data or
    machine cannot do.
    """
    method = method_of(cfg.method)
    attention = attention_for(cfg.model, cfg.data, hardware, cfg.distributed)
    inner: Any = model
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    attention = _apply_attention(inner, attention, cfg)
    sharding = _sharded(inner, cfg, hardware)
    alignment = 8 if hardware.device == "cuda" else None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batches: BatchSource | StreamSource
    if isinstance(train_dataset, Stream):
        batches = stream_batches(
            train_dataset, cfg.data, cfg.train, attention, pad_token_id=pad, alignment=alignment
        )
    else:
        batches = build_batches(
            train_dataset, cfg.data, cfg.train, attention, pad_token_id=pad, alignment=alignment
        )
    if resume is not None:
        batches.go_to(resume)
    evaluated = eval_dataset if eval_dataset is not None and len(eval_dataset) else None
    eval_batches = evaluated and build_batches(
        evaluated, cfg.data, cfg.train, attention, pad_token_id=pad, evaluation=True, alignment=alignment
    )
    place = world()
    axes = axes_of(cfg.distributed, place.size) or Axes(place.size)
    shared = shared_rows_of(axes, hardware.device, inner, packs_rows(cfg.data)) if axes.context > 1 else None
    if shared is not None:
        batches = with_parts(batches, shared)
        eval_batches = eval_batches and with_parts(eval_batches, shared)
    volume = batches.volume(cfg.train, axes.data_ranks)
    arguments, cadence = build_arguments(
        cfg,
        volume,
        hardware,
        has_eval_data=evaluated is not None,
        resuming=resume is not None,
        arguments_class=_named(method.arguments, method),
        more=method.options(cfg.method),
    )
    kernel = choose_kernel(inner, cfg, attention, batches, hardware)
    start_tracking(cfg.tracking, cfg.output)
    signals, limit = Signals(), TimeLimit(cfg.train)
    output_dir = Path(cfg.output.output_dir)
    parts = Parts(
        optim=cfg.optim,
        adapter=cfg.adapter,
        train=cfg.train,
        batches=batches,
        eval_batches=eval_batches,
        volume=volume,
        cadence=cadence,
        output_dir=output_dir,
        run_id=_run_id(output_dir, resume),
        plan=batches.digest(),
        # DeepSpeed holds the whole model in bfloat16 itself, beside float32 copies that are trained.
        autocast=torch.bfloat16
        if cfg.model.bf16 in (True, "full") and not cfg.distributed.deepspeed
        else None,
        interrupted=lambda: signals() or limit(),
        asked=asked(cfg),
        axes=axes,
        distributed=cfg.distributed,
        sharding=sharding,
    )
    parts.run = {
        "run_id": parts.run_id,
        "config": config_digest(cfg),
        "complete": False,
        "launch": launch_name(),
        "total_steps": volume.total_steps,
        "data": {
            "steps_per_epoch": volume.steps_per_epoch,
            "epochs": volume.epochs,
            "tokens_per_epoch": volume.tokens_per_epoch,
            "packing": volume.efficiency,
            "plan": parts.plan,
        },
        **describe(cfg, hardware),
        "attention": {"name": attention.name, "kernel": kernel},
    }
    if resume is not None and has_to_evaluate(resume, cadence):
        arguments.eval_on_start = True
    tracked, arguments.report_to = list(arguments.report_to or []), []
    inner.config.use_cache = False
    parts.replaced = _fused(inner, cfg)
    if cfg.model.fp8 and sharding is None:
        train_in_float8(inner, parts.replaced)
    device = next(inner.parameters()).device if sharding is None else _home(hardware)
    parts.recomputing = spare_memory(
        inner,
        cfg.train,
        cfg.kernels,
        device,
        parts.replaced,
        output_dir=output_dir,
        strict=cfg.output.strict,
    )
    parts.run["recompute"] = in_words(recompute_of(cfg.train), parts.recomputing)
    trainer = _trainer_class(method)(
        model=model,
        args=arguments,
        data_collator=batches.collator,
        train_dataset=batches.rows,
        eval_dataset=None if eval_batches is None else eval_batches.rows,
        processing_class=tokenizer,
        parts=parts,
    )
    signals.trainer = limit.trainer = trainer
    run_log = RunLog(output_dir / "run.jsonl")

    def tell(message: str) -> None:
        warn(message)
        run_log.event(trainer.state.global_step, trainer.state.epoch, message)

    trainer.tell = tell
    if cfg.output.hub_model_id and place.is_main:
        parts.uploads = Uploads(cfg.output, tell)
    _probe(trainer, model, attention, parts, cfg, shared)
    give_back(model)
    # Not before: trials and rehearsals give the model whole rows.
    share_rows(shared)
    trackers = guarded(tracked, cfg.tracking, _facts(parts), tell)
    if trainer.saves_in_background:
        for each in trackers:
            each.deferred = True
            trainer.published.append(lambda state, e=each: e.saved(trainer.args, state, trainer.control))
    for callback in (
        SaveCare(trainer),
        EpochOrder(trainer),
        StepCheck(trainer),
        AtSteps(cadence),
        CheckpointOnRequest(cfg.train, output_dir),
        run_log,
        ProgressLine(volume.total_steps),
        LossAdvice(trainer, cfg),
        Samples(trainer, cfg.train, run_log),
        LossWatch(cfg.train, numbers=not trainer.checks_steps),
        EarlyStopping(cfg.train),
        CollectGarbage(cfg.train),
        Profile(cfg.train, output_dir),
        HangWatch(cfg.train, output_dir),
        limit,
        signals,
        *trackers,
    ):
        trainer.add_callback(callback)
    if resume is not None:
        _compare(trainer, resume)
    _say(cfg, trainer, attention)
    return trainer


def _sharded(model: PreTrainedModel, cfg: Config, hardware: Hardware) -> Sharding | None:
    """Divides the model over the processes, where the config asks for it and there are several."""
    options, tensor = cfg.distributed.fsdp_config, cfg.distributed.tensor_parallel_size or 1
    if world().size <= 1 or (options is None and tensor <= 1):
        return None
    # Without `fsdp_config` the rest holds copies: there is nothing to gather.
    options = options or FsdpConfig(reshard_after_forward=False)
    if cfg.model.fp32_norms:
        names = norms_in_float32(model, cfg.model.fp32_norm_classes or ())
        note(f"Held in float32: {', '.join(names)}.")
    if cfg.model.fp8:
        # Before the model is divided: these layers take the places of others, for good.
        train_in_float8(model, Replacements())
    source, held = source_of(model), None
    if source is not None:
        held = take_out(model) if source.files is None and source.seed is None and world().is_main else None
        put_on_meta(model)
    sharding = shard_model(model, options, mesh_for(cfg.distributed, hardware.device))
    if source is not None:
        fill(model, source, torch.device("cpu") if options.offload_params else _home(hardware), held)
    axes, units = sharding.mesh.axes, ", ".join(sharding.units) or "the whole model"
    if (products := sharding.products) is not None:
        ends = f"; embedding and head are whole: {products.whole}" if products.whole else ""
        note(f"{axes.tensor} processes share the products of {products.divided} matrices{ends}.")
    if cfg.distributed.fsdp_config is None:
        return sharding
    copies = f", {axes.replicate} copies of it" if axes.replicate > 1 else ""
    old = " in place of version 1" if cfg.distributed.fsdp_version == 1 else ""
    note(f"FSDP2{old}: each weight in {axes.weight_shards} parts{copies}; gathered by {units}.")
    return sharding


def _home(hardware: Hardware) -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", world().local_rank) if hardware.device == "cuda" else torch.device("cpu")


def _facts(parts: Parts) -> dict[str, Any]:
    """What trackers record about a run."""
    return {"run_id": parts.run_id, "config": parts.asked} | {
        key: parts.run[key] for key in ("data", "environment")
    }


def _named(name: str, method: Method) -> Any:
    """A class by its dotted name."""
    module, _, attribute = name.rpartition(".")
    if method.extra:
        return getattr(require_extra(module, method.extra, f"`rl: {method.name}`"), attribute)
    return getattr(importlib.import_module(module), attribute)


def _trainer_class(method: Method) -> type[Any]:
    base = _named(method.trainer, method)
    return CausalTrainer if base is Trainer else type(f"Our{base.__name__}", (TrainerMixin, base), {})


def _apply_attention(model: PreTrainedModel, choice: AttentionChoice, cfg: Config) -> AttentionChoice:
    """Gives the model the attention chosen; where its code cannot take ours, transformers' own."""
    if set_attention(model, choice.name):
        return choice
    if choice.joined and set_attention(model, "sdpa"):
        note(f"{type(model).__name__} takes no other attention than its own: packed rows go through sdpa.")
        return AttentionChoice("sdpa", "the model takes no other", joined=False)
    if cfg.data.sample_packing:
        raise ModelError(_packing_problem(model, choice))
    return AttentionChoice(model.config._attn_implementation, "the model takes no other", joined=False)


def _packing_problem(model: PreTrainedModel, choice: AttentionChoice) -> Problem:
    return Problem(
        f"`sample_packing: true`: in {type(model).__name__} with {choice.name} attention, packed documents would see "
        "each other.",
        "Set `sample_packing: false`, or another `attn_implementation`.",
        "model",
        ("sample_packing", "attn_implementation"),
    )


def _fused(model: PreTrainedModel, cfg: Config) -> Replacements:
    """Gives the model the kernels that the config asks for."""
    distributed = cfg.distributed
    shards = distributed.fsdp_config or distributed.deepspeed or (distributed.tensor_parallel_size or 1) > 1
    why = (
        "the weights are sharded"
        if shards
        else "torch.compile is on"
        if cfg.train.torch_compile is True
        else ""
    )
    kernels = cfg.kernels
    if cfg.train.torch_compile is True:
        # Norms, rotary embedding and gates are fused where they stand by torch.compile, which cannot look into ours.
        left = {
            k: None for k in ("liger_rms_norm", "liger_rope", "liger_glu_activation") if getattr(kernels, k)
        }
        kernels = kernels.model_copy(update=left)
        if left:
            note(f"{', '.join(f'`{k}`' for k in left)}: torch.compile fuses these itself.")
    first = next(model.parameters())
    dtype = torch.bfloat16 if cfg.model.bf16 in (True, "full") or cfg.model.bfloat16 else torch.float32
    bench = Bench(
        model,
        kernels,
        first.device,
        torch.float16 if cfg.model.fp16 or cfg.model.float16 else dtype,
        cfg.data.sequence_len * cfg.train.rows_at_once,
        why,
        cfg.output.strict,
    )
    return apply_kernels(bench)


def _probe(
    trainer: Any,
    model: PreTrainedModel,
    attention: AttentionChoice,
    parts: Parts,
    cfg: Config,
    shared: SharedRows | None,
) -> None:
    if not hasattr(model.config, "vocab_size") or divided():
        return
    device = trainer.args.device
    autocast = torch.autocast(device.type, parts.autocast) if parts.autocast else contextlib.nullcontext()
    with autocast:
        if (cfg.data.sample_packing or cfg.data.eval_sample_packing) and not documents_stay_apart(
            model, attention, device
        ):
            raise ModelError(_packing_problem(trainer.model, attention))
        if trainer.compute_loss_func is None and not loss_takes_tokens(model, attention, device):
            trainer.compute_loss_func = token_loss
        if shared is not None:
            check_sharing(model, attention, shared, device, own_loss=trainer.compute_loss_func is not None)


def config_digest(cfg: Config) -> str:
    """A hash of all that was asked for, apart from how to resume: equal digests are the same command."""
    return hashlib.sha256(json.dumps(asked(cfg), sort_keys=True).encode()).hexdigest()[:16]


def has_to_evaluate(resume: Path, cadence: Cadence) -> bool:
    """Whether the run was broken off between the checkpoint of a step and the evaluation due there."""
    state = read_json(resume / "trainer_state.json")
    step = state.get("global_step")
    seen = {
        line.get("step") for line in state.get("log_history", []) if any(k.startswith("eval_") for k in line)
    }
    return step in cadence.evaluate and step not in seen


def _run_id(output_dir: Path, resume: Path | None) -> str:
    """The id of the run that is continued, or a new one."""
    if resume is not None:
        saved = read_state(resume)
        found = saved.run_id if saved else read_json(output_dir / RUN).get("run_id")
        if found:
            return str(found)
    return uuid.uuid4().hex[:12]


def _compare(trainer: Any, resume: Path) -> None:
    saved = read_state(resume)
    if saved is None:
        return
    trainer.trained_tokens = saved.trained_tokens
    trainer.bad_steps, trainer.bad_streak, trainer.split = saved.bad_steps, saved.bad_streak, saved.split
    trainer.spikes = SpikeWatch(trainer.parts.train.spike_threshold, saved.losses, saved.norms)
    trainer.spikes.count, trainer.spikes.streak = saved.spikes, saved.spike_streak
    for change in differences(saved, trainer.run_state()):
        warn(f"Since {resume.name} was saved, {change}.")


def _say(cfg: Config, trainer: Any, attention: AttentionChoice) -> None:
    volume, train, batches = trainer.parts.volume, cfg.train, trainer.parts.batches
    packed = f", packed {volume.efficiency:.1%} full" if cfg.data.sample_packing else ""
    axes = trainer.parts.axes
    ranks = f" × {axes.data_ranks} processes" if axes.data_ranks > 1 else ""
    together = axes.context * axes.tensor
    if together > 1:
        words = [
            f"{size} share each {what}"
            for size, what in ((axes.context, "row"), (axes.tensor, "matrix product"))
            if size > 1
        ]
        ranks = f" × {axes.data_ranks} groups of {together} processes, of which {' and '.join(words)}"
    steps = f"{volume.total_steps:,} steps of {train.micro_batch_size} × {train.gradient_accumulation_steps}{ranks}"
    if isinstance(batches, StreamSource):
        note(f"Streaming {batches.rows.stream.name}: {steps}.")
    else:
        rows = f"{len(batches.rows):,} rows, {volume.tokens_per_epoch:,} tokens{packed}"
        note(f"{rows}: {steps} in {volume.epochs:.4g} epochs.")
    detail(f"attention: {attention.name} ({attention.reason})")
    if words := trainer.parts.run["recompute"]:
        note(f"{words[0].upper()}{words[1:]}.")
