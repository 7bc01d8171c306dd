"""DeepSpeed's configuration: read with the place of each key, compared with the YAML, and completed from it.

The YAML decides. In the JSON, `auto` and what is left out are filled in from it; what says something else is an error.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl.config.config import Config
from axolotl.config.keys import did_you_mean, nearest
from axolotl.config.resolve import Hardware
from axolotl.config.yaml_file import Path as KeyPath
from axolotl.config.yaml_file import excerpt, parse
from axolotl.distributed.zero_keys import CHOICES, COUNTS, ELSEWHERE, GONE, KEYS, OLD_COMPILE, SWITCHES
from axolotl.errors import ConfigError, Place, Problem
from axolotl.registry import PACKAGE_ROOT, missing_extra

SHIPPED = PACKAGE_ROOT / "assets" / "deepspeed_configs"
GATHER = "stage3_gather_16bit_weights_on_model_save"
SCHEDULES = {
    "WarmupDecayLR": ("linear",),
    "WarmupLR": ("constant_with_warmup",),
    "WarmupCosineLR": ("cosine",),
}
"""DeepSpeed's schedules, and ours that have the same course."""


@dataclass(frozen=True)
class ZeroConfig:
    """What `deepspeed:` of the YAML holds or points to."""

    values: dict[str, Any]
    where: Callable[[KeyPath], Place]
    """Where a key stands, in the JSON file or in the YAML."""
    lines: Mapping[str, list[str]]
    """The lines of these files."""
    problems: tuple[Problem, ...] = ()

    def get(self, name: str, default: Any = None) -> Any:
        """The value at `zero_optimization.stage`; the default where it is not written."""
        found: Any = self.values
        for part in name.split("."):
            if not isinstance(found, dict) or part not in found:
                return default
            found = found[part]
        return found

    @property
    def stage(self) -> int:
        """1, 2 or 3: what is divided; 0 where that is not said."""
        found = self.get("zero_optimization.stage", 0)
        return found if isinstance(found, int) else 0

    def offloads(self, what: str) -> bool:
        """Whether `offload_optimizer` or `offload_param` keeps it in CPU memory or on a disk."""
        return self.get(f"zero_optimization.{what}.device", "none") not in ("none", None)

    def problem(self, name: str, message: str, remedy: str, kind: Any = "invalid_value") -> Problem:
        """A mistake at a key of the JSON."""
        place = self.where(tuple(name.split(".")) if name else ())
        shown = excerpt(self.lines.get(place.file, []), place)
        return Problem(message, remedy, kind, ("deepspeed",), (place,), shown)


def read_zero(cfg: Config) -> ZeroConfig | None:
    """What `deepspeed` says; None without it. Raises ConfigError for a file that is missing or is no JSON object."""
    written = cfg.distributed.deepspeed
    if not written:
        return None
    if isinstance(written, dict):

        def in_yaml(path: KeyPath) -> Place:
            return cfg.key_place(".".join(["deepspeed", *map(str, path)]))

        return ZeroConfig(copy.deepcopy(written), in_yaml, cfg.lines)
    return _read_file(cfg, written)


def _read_file(cfg: Config, name: str) -> ZeroConfig:
    file = Path(name).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = (
            "is not a text file"
            if isinstance(error, UnicodeDecodeError)
            else f"cannot be read: {error.strerror}"
        )
        remedy = "Write the path of a DeepSpeed config, as seen from where you start `axolotl`."
        if (SHIPPED / file.name).is_file():
            remedy = "`axolotl fetch deepspeed_configs` copies it into this folder."
        elif near := nearest(file.name, [each.name for each in SHIPPED.glob("*.json")]):
            remedy = f"{did_you_mean(near)} `axolotl fetch deepspeed_configs` brings it."
        raise ConfigError(
            cfg.problem(f"`deepspeed: {name}` {why}.", remedy, "deepspeed", kind="path")
        ) from None
    lines = text.splitlines()
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        place = Place(name, error.lineno, error.colno)
        raise ConfigError(
            Problem(
                f"{name} is not JSON: {error.msg}.",
                "Most often a comma or a quote is missing in this line or the one before, or one is too many.",
                "syntax",
                ("deepspeed",),
                (place,),
                excerpt(lines, place),
            )
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            Problem(
                f"{name} holds no JSON object.",
                "A DeepSpeed config begins with `{`.",
                "syntax",
                ("deepspeed",),
                (Place(name, 1, 1),),
            )
        )
    # JSON is YAML but for tabs between values.
    document = parse(text.replace("\t", " "), name)

    def in_file(path: KeyPath) -> Place:
        while path:
            if path in document.spots:
                return document.spots[path].key
            path = path[:-1]
        return Place(name, 1, 1)

    return ZeroConfig(values, in_file, {name: lines}, tuple(document.problems))


def check(cfg: Config, hardware: Hardware, processes: int, *, installed: bool = True) -> Iterator[Problem]:
    """Everything about DeepSpeed that is wrong with config, JSON file and machine; imports no DeepSpeed.

    `processes`: below 2 where their number is not known here. `installed`: look whether the package is there.
    """
    try:
        zero = read_zero(cfg)
    except ConfigError as error:
        yield from error.problems
        return
    if zero is None:
        return
    yield from zero.problems
    yield from _known(zero)
    yield from _values(zero)
    yield from _agrees(cfg, zero, hardware, processes)
    yield from _fits(cfg, zero)
    if installed:
        yield from missing_extra("deepspeed", "deepspeed", "`deepspeed:`", "deepspeed")


def _known(zero: ZeroConfig) -> Iterator[Problem]:
    for block, known in KEYS.items():
        inside = zero.get(block) if block else zero.values
        if inside is None:
            continue
        if not isinstance(inside, dict):
            yield zero.problem(block, f"`{block}` of a DeepSpeed config is a mapping.", "Write `{...}`.")
            continue
        for key in inside:
            name = f"{block}.{key}" if block else str(key)
            if key in known:
                continue
            if not block and key in GONE:
                yield zero.problem(name, f"DeepSpeed has no `{key}` any more.", "Delete it.", "removed")
            elif not block and key in ELSEWHERE:
                yield zero.problem(
                    name, f"`{key}` cannot be used here.", f"{ELSEWHERE[key]} Delete it.", "conflict"
                )
            else:
                hint = did_you_mean(nearest(str(key), known)) or "Delete it."
                yield zero.problem(name, f"DeepSpeed knows no `{name}`.", hint, "unknown_key")


def _values(zero: ZeroConfig) -> Iterator[Problem]:
    if not isinstance(zero.get("zero_optimization"), dict) or zero.get("zero_optimization.stage") is None:
        yield zero.problem(
            "zero_optimization",
            "This DeepSpeed config does not say what is divided.",
            'Write `"zero_optimization": {"stage": 2}`; stage 1 divides the optimizer\'s states, 2 gradients as well, 3 '
            "the weights as well.",
            "missing",
        )
    elif zero.get("zero_optimization.stage") == 0:
        yield zero.problem(
            "zero_optimization.stage",
            "Stage 0 divides nothing.",
            "Write stage 1, 2 or 3, or delete `deepspeed:` from the YAML.",
        )
    if zero.get("bf16.check_grad_overflow") is False:
        yield zero.problem(
            "bf16.check_grad_overflow",
            "`check_grad_overflow: false` lets a step whose gradient is no number into the weights.",
            "Delete the line: such a step is left out then, and told.",
        )
    if zero.get("compile.deepcompile"):
        yield zero.problem(
            "compile.deepcompile", "DeepCompile is not available yet.", "Delete the line.", "unavailable"
        )
    for name, taken in CHOICES.items():
        value = zero.get(name)
        if value is not None and value not in taken and value != 0:
            shown = ", ".join(f"`{each}`" for each in taken)
            yield zero.problem(
                name, f"`{name}` is `{json.dumps(value)}`; it takes {shown}.", "Write one of them."
            )
    for name in COUNTS:
        value = zero.get(name)
        if value is not None and value != "auto" and not _count(value):
            yield zero.problem(
                name,
                f"`{name}` is `{json.dumps(value)}`; it takes a whole number.",
                'Write a number, or "auto".',
            )
    for name in SWITCHES:
        value = zero.get(name)
        if value is not None and value != "auto" and not isinstance(value, bool):
            yield zero.problem(
                name, f"`{name}` is `{json.dumps(value)}`; it takes true or false.", "Write true or false."
            )


def _count(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == int(value)
    )


def _agrees(cfg: Config, zero: ZeroConfig, hardware: Hardware, processes: int) -> Iterator[Problem]:
    """What the JSON says otherwise than the YAML."""
    wanted = from_yaml(cfg, hardware, processes)
    keys = {
        "train_micro_batch_size_per_gpu": "micro_batch_size",
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "train_batch_size": "micro_batch_size × gradient_accumulation_steps × processes",
        "gradient_clipping": "max_grad_norm",
        "bf16.enabled": "bf16",
        "fp16.enabled": "fp16",
    }
    for name, key in keys.items():
        value, ours = zero.get(name), wanted[name]
        if value in (None, "auto") or ours is None or value == ours:
            continue
        if isinstance(value, bool) and cfg.get(key) in ("auto", None):
            # The JSON decides where the YAML leaves it open; a number type that this machine lacks is asked for there.
            mine = f"this machine has no {key}" if value else f"`{key}` is on by itself"
            remedy = f'Write "auto" in the JSON, or `{key}: {json.dumps(value)}` in the YAML.'
        else:
            shown = json.dumps(ours) if isinstance(ours, bool) else ours
            mine, remedy = (
                f"the YAML says {shown} (`{key}`)",
                'Write "auto" in the JSON: then the YAML decides.',
            )
        yield zero.problem(name, f"`{name}` is {json.dumps(value)}, and {mine}.", remedy, "conflict")
    yield from _optimizer(cfg, zero)
    yield from _schedule(cfg, zero)


def _optimizer(cfg: Config, zero: ZeroConfig) -> Iterator[Problem]:
    written = zero.get("optimizer")
    if not isinstance(written, dict):
        return
    name, ours = str(written.get("type", "")), str(cfg.optim.optimizer)
    if name.lower() not in ("adam", "adamw") or not ours.startswith("adamw"):
        yield zero.problem(
            "optimizer",
            f"`optimizer` is `{name}` here, and `{ours}` in the YAML.",
            "Delete the block from the JSON: the YAML's optimizer is used.",
            "conflict",
        )
        return
    optim = cfg.optim
    known = {
        "lr": optim.learning_rate,
        "weight_decay": optim.weight_decay or 0.0,
        "eps": optim.adam_epsilon or 1e-8,
        "betas": [optim.adam_beta1 or 0.9, optim.adam_beta2 or 0.999],
    }
    params = written.get("params")
    for key, value in (params if isinstance(params, dict) else {}).items():
        if key in ("torch_adam", "adam_w_mode") or value == "auto" or value == known.get(key):
            continue
        said = f"and the YAML says {known[key]}" if key in known else "which is not passed on"
        yield zero.problem(
            f"optimizer.params.{key}",
            f"`optimizer.params.{key}` is {json.dumps(value)}, {said}.",
            "Delete the block `optimizer` from the JSON: the YAML's optimizer is used.",
            "conflict",
        )


def _schedule(cfg: Config, zero: ZeroConfig) -> Iterator[Problem]:
    written = zero.get("scheduler")
    if not isinstance(written, dict):
        return
    params = written.get("params")
    open_ = all(value in ("auto", 0) for value in (params if isinstance(params, dict) else {}).values())
    ours = cfg.optim.lr_scheduler
    if open_ and ours in SCHEDULES.get(str(written.get("type")), ()):
        return
    yield zero.problem(
        "scheduler",
        f"`scheduler` is `{written.get('type')}` here, and the YAML says `lr_scheduler: {ours}`.",
        "Delete the block from the JSON: the YAML's schedule is used.",
        "conflict",
    )


def _fits(cfg: Config, zero: ZeroConfig) -> Iterator[Problem]:
    """What this use of DeepSpeed cannot do together with other keys of the YAML."""
    three, model, train = zero.stage == 3, cfg.model, cfg.train
    if three:
        for key in (
            "load_in_4bit",
            "load_in_8bit",
            "device_map",
            "max_memory",
            "gpu_memory_limit",
            "fix_untrained_tokens",
        ):
            if cfg.is_set(key) and cfg.get(key) not in (None, False):
                yield cfg.problem(
                    f"`{key}` does not work with ZeRO stage 3, which divides the weights while they are loaded.",
                    f"Delete `{key}`, or take stage 2.",
                    key,
                    "deepspeed",
                    kind="conflict",
                )
    elif zero.offloads("offload_param"):
        yield zero.problem(
            "zero_optimization.offload_param",
            f"`offload_param` has no effect in stage {zero.stage}: weights are divided in stage 3.",
            'Write `"stage": 3`, or delete the block.',
            "conflict",
        )
    name = str(cfg.optim.optimizer)
    if zero.offloads("offload_optimizer") and ("8bit" in name or "4bit" in name or "fp8" in name):
        yield cfg.problem(
            f"`optimizer: {name}` has no states that `offload_optimizer` could keep in CPU memory.",
            "Choose `adamw_torch`, or delete `offload_optimizer` from the JSON.",
            "optimizer",
            "deepspeed",
            kind="conflict",
        )
    if train.save_only_model and train.load_best_model_at_end:
        yield cfg.problem(
            "`load_best_model_at_end` needs DeepSpeed's states, which `save_only_model` leaves out.",
            "Delete one of them.",
            "load_best_model_at_end",
            "save_only_model",
            kind="conflict",
        )
    if train.torch_compile is False and _compiles(zero):
        yield zero.problem(
            "compile",
            "`compile` is on here, and the YAML says `torch_compile: false`.",
            "Delete one of them.",
            "conflict",
        )
    if model.bf16 not in (True, "full", "auto") and model.bfloat16:
        yield cfg.problem(
            "`bfloat16: true` holds weights in bfloat16, of which DeepSpeed knows nothing.",
            "Write `bf16: true`.",
            "bfloat16",
            "deepspeed",
            kind="conflict",
        )


def _compiles(zero: ZeroConfig) -> bool:
    block = zero.get("compile")
    return (
        isinstance(block, dict)
        and any(key in block for key in OLD_COMPILE)
        and block.get("disable") is not True
    )


def compiling(cfg: Config) -> Config:
    """The config with `torch_compile` on, where DeepSpeed's asks for that in the way it was once written."""
    zero = read_zero(cfg)
    if zero is None or not _compiles(zero):
        return cfg
    values = {
        "torch_compile": True,
        "torch_compile_backend": cfg.train.torch_compile_backend or zero.get("compile.backend", "inductor"),
    }
    return cfg.with_values(values, dict.fromkeys(values, "`compile` of the DeepSpeed config"))


def from_yaml(cfg: Config, hardware: Hardware, processes: int) -> dict[str, Any]:
    """What the YAML says of the values that both files hold, by DeepSpeed's names. None: not known yet."""
    train, model = cfg.train, cfg.model
    micro = None if train.micro_batch_size == "auto" else train.micro_batch_size
    steps = train.gradient_accumulation_steps or 1
    if micro and train.batch_size is not None and not cfg.is_set("gradient_accumulation_steps"):
        steps = max(1, train.batch_size // micro)
    bf16 = hardware.bf16 and not model.fp16 if model.bf16 == "auto" else model.bf16 in (True, "full")
    clip = 1.0 if cfg.optim.max_grad_norm is None else cfg.optim.max_grad_norm
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "train_batch_size": micro * steps * processes if micro and processes > 1 else None,
        "gradient_clipping": float(clip),
        "bf16.enabled": bf16,
        "fp16.enabled": bool(model.fp16),
    }


def completed(cfg: Config, zero: ZeroConfig, hardware: Hardware, processes: int) -> dict[str, Any]:
    """The configuration that DeepSpeed gets: each `auto` and each gap filled from the YAML.

    What depends on the width of the model (`reduce_bucket_size: auto`) stays `auto`: transformers fills it in.
    """
    values = copy.deepcopy(zero.values)
    for name, value in from_yaml(cfg, hardware, processes).items():
        block, _, key = name.rpartition(".")
        inside = values.setdefault(block, {}) if block else values
        inside[key] = value
    # Optimizer and schedule are ours: what the JSON says of them agrees with the YAML, or was refused.
    for block in ("optimizer", "scheduler"):
        values.pop(block, None)
    for key in OLD_COMPILE:
        values.get("compile", {}).pop(key, None)
    zeros = values["zero_optimization"]
    if zero.stage == 3:
        zeros.setdefault(GATHER, True)
    if zero.offloads("offload_optimizer") and not str(cfg.optim.optimizer).startswith("adamw_"):
        # accelerate puts DeepSpeed's Adam in the place of any other optimizer.
        values.setdefault("zero_force_ds_cpu_optimizer", False)
    values["zero_allow_untested_optimizer"] = True
    values.setdefault("steps_per_print", 1 << 60)
    return _whole(values)


def _whole(value: Any) -> Any:
    """DeepSpeed takes 500000000 where people write 5e8."""
    if isinstance(value, dict):
        return {key: each if key == "gradient_clipping" else _whole(each) for key, each in value.items()}
    return int(value) if isinstance(value, float) and value > 1000 and value == int(value) else value
