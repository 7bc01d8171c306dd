"""Rules about batch, optimizer, schedule, evaluation and saving."""

from __future__ import annotations

from collections.abc import Iterator

from axolotl.config.config import Config
from axolotl.config.rules.rulebook import TRAINING, conflict, rule, warning
from axolotl.errors import Problem

_TRAINS = ("train", "check", "plan", "doctor")


def _streamed(cfg: Config) -> bool:
    return bool(cfg.data.streaming or cfg.data.pretraining_dataset)


def _evaluates(cfg: Config) -> bool:
    return bool(cfg.data.test_datasets or (cfg.data.val_set_size and not _streamed(cfg)))


@rule("learning_rate", verbs=_TRAINS)
def learning_rate_is_there(cfg: Config) -> Iterator[Problem]:
    """No default fits every model and method."""
    if not cfg.optim.learning_rate:
        yield conflict(
            "`learning_rate` is missing.",
            "Add `learning_rate:`; 2e-4 is usual for LoRA, 2e-5 for all weights.",
            "learning_rate",
            kind="missing",
        )


@rule("batch_size", "gradient_accumulation_steps", "micro_batch_size")
def a_step_has_one_size(cfg: Config) -> Iterator[Problem]:
    """batch_size is the older way to write gradient_accumulation_steps."""
    train = cfg.train
    if train.batch_size is None:
        return
    if train.micro_batch_size == "auto":
        return  # then it says of how many rows a step is made
    if cfg.is_set("gradient_accumulation_steps"):
        yield conflict(
            "`batch_size` and `gradient_accumulation_steps` both decide how many rows a step has.",
            "Delete `batch_size`.",
            "batch_size",
            "gradient_accumulation_steps",
        )
    elif train.batch_size < train.micro_batch_size:
        yield conflict(
            f"`batch_size` is `{train.batch_size}`, less than `micro_batch_size` ({train.micro_batch_size}).",
            "Write a multiple of `micro_batch_size`, or use `gradient_accumulation_steps`.",
            "batch_size",
            "micro_batch_size",
        )
    else:
        steps, rest = divmod(train.batch_size, train.micro_batch_size)
        rounded = f"; it is rounded down to {train.batch_size - rest}" if rest else ""
        yield warning(
            f"`batch_size` is an older way to write `gradient_accumulation_steps`{rounded}.",
            f"Write `gradient_accumulation_steps: {steps}` instead.",
            "batch_size",
        )


@rule("dataloader_prefetch_factor", "dataloader_num_workers")
def loading_ahead_needs_workers(cfg: Config) -> Iterator[Problem]:
    """Only worker processes load ahead."""
    if cfg.train.dataloader_prefetch_factor and not cfg.train.dataloader_num_workers:
        yield conflict(
            "`dataloader_prefetch_factor` needs processes that load ahead, and `dataloader_num_workers` gives none.",
            "Set `dataloader_num_workers`, or delete `dataloader_prefetch_factor`.",
            "dataloader_prefetch_factor",
            "dataloader_num_workers",
        )


@rule("warmup_steps", "warmup_ratio")
def one_length_of_warmup(cfg: Config) -> Iterator[Problem]:
    """Warmup is given in steps or as a share."""
    if cfg.optim.warmup_steps and cfg.optim.warmup_ratio:
        yield conflict(
            "`warmup_steps` and `warmup_ratio` both say how long the warmup is.",
            "Keep one of them.",
            "warmup_steps",
            "warmup_ratio",
        )


@rule("lr_groups")
def groups_have_names_of_their_own(cfg: Config) -> Iterator[Problem]:
    """Logs tell groups apart by name."""
    seen: dict[str, int] = {}
    for index, group in enumerate(cfg.optim.lr_groups or ()):
        if group.name in seen:
            yield conflict(
                f"`lr_groups[{index}].name` is `{group.name}`, as that of `lr_groups[{seen[group.name]}]`.",
                "Give each group a name of its own.",
                f"lr_groups[{index}].name",
                f"lr_groups[{seen[group.name]}].name",
            )
        seen.setdefault(group.name, index)


@rule("embedding_lr", "embedding_lr_scale")
def one_learning_rate_of_embeddings(cfg: Config) -> Iterator[Problem]:
    """The embeddings' learning rate is a number or a multiple; the multiple goes first."""
    if cfg.optim.embedding_lr and cfg.optim.embedding_lr_scale:
        yield warning(
            "`embedding_lr` has no effect beside `embedding_lr_scale`.",
            "Delete one of them.",
            "embedding_lr",
            "embedding_lr_scale",
        )


@rule("optim_args")
def optim_args_are_pairs(cfg: Config) -> Iterator[Problem]:
    """As text, optim_args reads `name=value,name=value`."""
    args = cfg.optim.optim_args
    if isinstance(args, str) and not all("=" in part for part in args.split(",") if part.strip()):
        yield conflict(
            f"`optim_args` is `{args}`; it takes `name=value,name=value`, or a mapping.",
            "Write a mapping of names to values.",
            "optim_args",
            kind="invalid_value",
        )


@rule("lr_scheduler", "cosine_min_lr_ratio", "cosine_constant_lr_ratio")
def a_constant_end_needs_its_height(cfg: Config) -> Iterator[Problem]:
    """Cosine can stay at its minimum before the end, where there is one."""
    optim = cfg.optim
    if (
        optim.cosine_constant_lr_ratio is not None
        and optim.cosine_min_lr_ratio is None
        and optim.lr_scheduler == "cosine"
    ):
        yield conflict(
            "`cosine_constant_lr_ratio` holds the learning rate at its minimum, which is not given.",
            "Add `cosine_min_lr_ratio`.",
            "cosine_constant_lr_ratio",
            "cosine_min_lr_ratio",
        )


@rule("eval_strategy", "eval_steps", "evals_per_epoch")
def one_rhythm_of_evaluation(cfg: Config) -> Iterator[Problem]:
    """Evaluation comes every so many steps, so often in an epoch, or as a strategy says."""
    train = cfg.train
    if train.evals_per_epoch and train.eval_steps:
        yield conflict(
            "`evals_per_epoch` and `eval_steps` both say when to evaluate.",
            "Keep one of them.",
            "evals_per_epoch",
            "eval_steps",
        )
    for key, value in (("eval_steps", train.eval_steps), ("evals_per_epoch", train.evals_per_epoch)):
        if value and train.eval_strategy not in (None, "steps"):
            yield conflict(
                f"`{key}` needs `eval_strategy: steps`, but it is `{train.eval_strategy}`.",
                f"Delete one of `{key}` and `eval_strategy`.",
                key,
                "eval_strategy",
            )


@rule("save_strategy", "save_steps", "saves_per_epoch")
def one_rhythm_of_saving(cfg: Config) -> Iterator[Problem]:
    """Checkpoints come every so many steps, so often in an epoch, or as a strategy says."""
    train = cfg.train
    if train.saves_per_epoch and train.save_steps:
        yield conflict(
            "`saves_per_epoch` and `save_steps` both say when to save.",
            "Keep one of them.",
            "saves_per_epoch",
            "save_steps",
        )
    if train.save_steps and train.save_strategy not in (None, "steps"):
        yield conflict(
            f"`save_steps` needs `save_strategy: steps`, but it is `{train.save_strategy}`.",
            "Delete one of `save_steps` and `save_strategy`.",
            "save_steps",
            "save_strategy",
        )
    if train.saves_per_epoch and train.save_strategy == "no":
        yield warning(
            "`save_strategy: no` saves no checkpoint, whatever `saves_per_epoch` says.",
            "Delete one of them.",
            "save_strategy",
            "saves_per_epoch",
        )


@rule("evals_per_epoch", "eval_steps", "eval_strategy", "val_set_size", "test_datasets", verbs=TRAINING)
def evaluation_needs_rows(cfg: Config) -> Iterator[Problem]:
    """Without a share or datasets for it, nothing is evaluated: a contradiction where `val_set_size: 0` is written."""
    if _evaluates(cfg):
        return
    train = cfg.train
    remedy = "Add `test_datasets`." if _streamed(cfg) else "Set `val_set_size`, or add `test_datasets`."
    if train.evals_per_epoch:
        yield warning(
            "`evals_per_epoch` has no effect: there is nothing to evaluate on.",
            remedy,
            "evals_per_epoch",
            "val_set_size",
        )
    key = "eval_strategy" if train.eval_strategy not in (None, "no") else "eval_steps"
    if key == "eval_steps" and not train.eval_steps:
        return
    if cfg.is_set("val_set_size") and not _streamed(cfg):
        yield conflict(
            f"`{key}` asks for an evaluation, but `val_set_size` is 0 and there are no `test_datasets`.",
            remedy,
            key,
            "val_set_size",
        )
    else:
        yield warning(f"`{key}` has no effect: there is nothing to evaluate on.", remedy, key, "val_set_size")


@rule(
    "early_stopping_patience",
    "load_best_model_at_end",
    "save_strategy",
    "save_steps",
    "eval_steps",
    "metric_for_best_model",
    "val_set_size",
    verbs=_TRAINS,
)
def the_best_needs_evaluation(cfg: Config) -> Iterator[Problem]:
    """Which checkpoint is best shows in the evaluation."""
    train = cfg.train
    timed = bool(train.eval_steps or train.evals_per_epoch or train.eval_strategy in ("steps", "epoch"))
    wanting = [
        key
        for key, on in (
            ("early_stopping_patience", train.early_stopping_patience),
            ("load_best_model_at_end", train.load_best_model_at_end),
        )
        if on
    ]
    for key in wanting:
        if not _evaluates(cfg) or train.eval_strategy == "no":
            yield conflict(
                f"`{key}` goes by the evaluation, and there is none.",
                f"{'Add `test_datasets`' if _streamed(cfg) else 'Set `val_set_size`'} and `evals_per_epoch`.",
                key,
                "val_set_size",
            )
        elif not timed:
            yield conflict(
                f"`{key}` goes by the evaluation, and nothing says when to evaluate.",
                "Add `eval_steps` or `evals_per_epoch`.",
                key,
                "eval_steps",
            )
    save, evaluate = train.save_steps, train.eval_steps
    if wanting and save and evaluate and save >= 1 and evaluate >= 1 and save % evaluate:
        yield conflict(
            f"`save_steps` ({save:g}) is not a multiple of `eval_steps` ({evaluate:g}), so a saved checkpoint "
            f"may have no evaluation, which `{wanting[0]}` needs.",
            "Make it a multiple.",
            "save_steps",
            "eval_steps",
            wanting[0],
        )
    if train.save_strategy == "best" and not train.metric_for_best_model:
        yield conflict(
            "`save_strategy: best` needs to know what is best.",
            "Add `metric_for_best_model: eval_loss`.",
            "save_strategy",
            "metric_for_best_model",
            kind="missing",
        )


@rule("hub_model_id", "hub_strategy", "hub_revision", "save_strategy")
def uploads_follow_saving(cfg: Config) -> Iterator[Problem]:
    """What is not saved is not uploaded."""
    output = cfg.output
    strategy = output.hub_strategy
    if output.hub_model_id and strategy not in (None, "end") and cfg.train.save_strategy == "no":
        yield warning(
            f"`hub_strategy: {strategy}` uploads checkpoints, and `save_strategy: no` saves none: "
            "`hub_model_id` gets the finished weights only.",
            "Delete one of them.",
            "hub_strategy",
            "save_strategy",
        )
    for key in ("hub_strategy", "hub_revision"):
        if cfg.is_set(key) and cfg.get(key) and not output.hub_model_id:
            yield warning(f"`{key}` has no effect without `hub_model_id`.", "Add `hub_model_id`.", key)


@rule("resume_from_checkpoint", "auto_resume_from_checkpoints")
def one_checkpoint_to_resume(cfg: Config) -> Iterator[Problem]:
    """A named checkpoint goes before the newest one."""
    if cfg.train.resume_from_checkpoint and cfg.train.auto_resume_from_checkpoints:
        yield warning(
            "`resume_from_checkpoint` names a checkpoint, so `auto_resume_from_checkpoints` has no effect.",
            "Delete one of them.",
            "resume_from_checkpoint",
            "auto_resume_from_checkpoints",
        )


@rule("save_only_model", "auto_resume_from_checkpoints")
def resuming_needs_the_state(cfg: Config) -> Iterator[Problem]:
    """Weights alone cannot be resumed from."""
    if cfg.train.save_only_model and cfg.train.auto_resume_from_checkpoints:
        yield warning(
            "`save_only_model` saves nothing that `auto_resume_from_checkpoints` could continue from: a run that "
            "was stopped begins anew.",
            "Set one of them to false.",
            "save_only_model",
            "auto_resume_from_checkpoints",
        )


@rule("loss_watchdog_patience", "loss_watchdog_threshold")
def the_watchdog_needs_a_threshold(cfg: Config) -> Iterator[Problem]:
    """Patience with what?"""
    if cfg.train.loss_watchdog_patience and cfg.train.loss_watchdog_threshold is None:
        yield warning(
            "`loss_watchdog_patience` has no effect without `loss_watchdog_threshold`.",
            "Add `loss_watchdog_threshold`.",
            "loss_watchdog_patience",
        )


@rule("generate_samples", verbs=_TRAINS)
def samples_come_with_evaluations(cfg: Config) -> Iterator[Problem]:
    """Answers are generated at each evaluation, from rows of the evaluation data."""
    never = cfg.train.eval_strategy == "no" or cfg.train.evals_per_epoch == 0
    if cfg.train.generate_samples and (never or not _evaluates(cfg)):
        yield conflict(
            "`generate_samples` answers rows of the evaluation data at each evaluation, and there is none.",
            "Set `val_set_size` or `test_datasets`, or delete it.",
            "generate_samples",
        )


@rule("save_async", "deepspeed", "fsdp_config", "fsdp")
def sharded_states_save_themselves(cfg: Config) -> Iterator[Problem]:
    """DeepSpeed and FSDP write their own shards, all ranks together."""
    if cfg.train.save_async and (cfg.distributed.deepspeed or cfg.distributed.fsdp_config):
        yield conflict(
            "`save_async` with a sharded model is not available yet.",
            "Delete it: every save is then waited for.",
            "save_async",
            kind="unavailable",
        )
