"""The run report: one self-contained HTML file about a run, finished or not, from run.json and run.jsonl."""

from __future__ import annotations

import datetime
import json
import math
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from axolotl.errors import EnvironmentProblem
from axolotl.report.curves import Curve, Point, curve
from axolotl.train.checkpoint import RUN, damage, list_checkpoints, read_json

REPORT = "run_report.html"
_TEMPLATE = Path(__file__).with_name("run.html.jinja")
_SHOWN = (
    ("loss", "Loss", "mean over trained tokens"),
    ("learning_rate", "Learning rate", ""),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("tokens_per_second", "Tokens per second", "without padding, all ranks"),
    ("peak_memory_gib", "Peak memory", "GiB"),
)
_SPENT = ("data", "forward", "backward", "optimizer", "save", "evaluate")


@dataclass(frozen=True)
class Share:
    """What a part of the time went into."""

    name: str
    seconds: float
    share: float
    width: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint, and what is wrong with it."""

    name: str
    damage: str | None


def write_run_report(output_dir: Path, file: Path | None = None) -> Path:
    """Writes the report into `output_dir` (or `file`) and returns its path.

    Raises EnvironmentProblem where there is no run, or the file cannot be written.
    """
    text = render_run_report(output_dir)
    file = file or output_dir / REPORT
    try:
        aside = file.with_name(f".{file.name}.tmp")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, file)
    except OSError as error:
        raise EnvironmentProblem(
            f"the report cannot be written to `{file}`: {error.strerror}.", "Name another file with --output."
        ) from error
    return file


def render_run_report(output_dir: Path) -> str:
    """The report as HTML. Raises EnvironmentProblem for a folder without a run."""
    run = read_json(output_dir / RUN)
    lines = read_log(output_dir / "run.jsonl")
    if not run and not lines:
        raise EnvironmentProblem(
            f"`{output_dir}` holds no run: neither {RUN} nor run.jsonl is there.",
            "Name the `output_dir` of a training run.",
        )
    train = [line for line in lines if line["kind"] == "train"]
    evals = [line for line in lines if line["kind"] == "eval"]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["n"] = lambda value: f"{value:,}"
    environment.filters["share"] = lambda value: f"{value:.1%}"
    environment.filters["px"] = lambda value: f"{value:.1f}"
    environment.filters["figure"] = _figure
    asked = run.get("asked", {})
    origins = run.get("origins", {})
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        name=output_dir.resolve().name,
        folder=str(output_dir),
        state=_state(run, train),
        step=train[-1]["step"] if train else 0,
        total=run.get("total_steps", 0),
        first=train[0] if train else {},
        last=train[-1] if train else {},
        last_eval=evals[-1] if evals else {},
        best=min(
            (line for line in evals if line.get("eval_loss") is not None),
            key=lambda line: line["eval_loss"],
            default=None,
        ),
        evals=evals,
        eval_columns=_columns(evals),
        samples=_last_samples(lines),
        curves=_curves(train, evals),
        spent=_spent(lines),
        config=[(key, _text(value), origins.get(key, "")) for key, value in asked.items()],
        data=_data(run),
        machine=run.get("environment", {}),
        told=[
            *run.get("warnings", []),
            *(f"step {e['step']}: {e['message']}" for e in lines if e["kind"] == "event"),
        ],
        checkpoints=[Saved(p.name, damage(p, thorough=False)) for p in list_checkpoints(output_dir)],
        commands=_commands(run, output_dir),
    )


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of run.jsonl; one that is cut off, because the run is writing it, is left out."""
    found = []
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for each in text.splitlines():
        try:
            line = json.loads(each)
        except ValueError:
            continue
        if isinstance(line, dict) and "kind" in line and "step" in line:
            found.append(line)
    return found


def _points(lines: Iterable[dict[str, Any]], key: str) -> list[Point]:
    return [(x["step"], math.nan if x[key] is None else float(x[key])) for x in lines if key in x]


def _curves(train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> list[Curve]:
    made = [
        curve(name, unit, _points(train, key), _points(evals, "eval_loss") if key == "loss" else ())
        for key, name, unit in _SHOWN
    ]
    return [each for each in made if each is not None]


def _spent(lines: list[dict[str, Any]], width: int = 420) -> list[Share]:
    seconds = {name: sum(line.get(f"{name}_seconds") or 0.0 for line in lines) for name in _SPENT}
    whole, most = sum(seconds.values()), max(seconds.values())
    if not whole:
        return []
    return [Share(name, s, s / whole, width * s / most) for name, s in seconds.items()]


def _last_samples(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Generated answers of the last evaluation."""
    samples = [line for line in lines if line["kind"] == "sample"]
    return [line for line in samples if line["step"] == samples[-1]["step"]]


def _state(run: dict[str, Any], train: list[dict[str, Any]]) -> str:
    if run.get("complete"):
        return "complete"
    if not train:
        return "no step logged yet"
    try:
        last = f"{datetime.datetime.fromtimestamp(train[-1]['time']):%Y-%m-%d %H:%M}"
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        last = "at a time that no clock shows"
    return f"not complete; the last step was logged {last}"


def _columns(evals: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(key for line in evals for key in line)
    return [name for name in names if name.startswith("eval_")]


def _data(run: dict[str, Any]) -> list[tuple[str, str]]:
    data, asked = run.get("data", {}), run.get("asked", {})
    found = [
        (f"dataset {number}", entry.get("path", "") if isinstance(entry, dict) else str(entry))
        for number, entry in enumerate(asked.get("datasets") or [], 1)
    ]
    names = {
        "tokens_per_epoch": "tokens of an epoch",
        "steps_per_epoch": "steps of an epoch",
        "epochs": "epochs",
        "packing": "share of each batch that is no padding",
        "plan": "digest of rows and order",
    }
    for key, name in names.items():
        if data.get(key):
            found.append((name, f"{data[key]:.1%}" if key == "packing" else _figure(data[key])))
    return found


def _commands(run: dict[str, Any], output_dir: Path) -> list[tuple[str, str]]:
    sources = run.get("sources") or ["config.yml"]
    config, folder = shlex.join(sources), shlex.quote(str(output_dir))
    adapter = run.get("asked", {}).get("adapter")
    model = f"--lora-model-dir {folder}" if adapter else f"--base-model {folder}"
    found = []
    if not run.get("complete"):
        words = shlex.join(run.get("words") or sources)
        launch = shlex.join(run.get("launch_options") or [])
        found.append(("resume", f"axolotl train {words} --auto-resume-from-checkpoints {launch}".rstrip()))
    if adapter:
        found.append(("merge", f"axolotl merge-lora {config} --lora-model-dir {folder}"))
    found.append(("chat", f"axolotl inference {config} {model} --chat"))
    found.append(("evaluate", f"axolotl evaluate {config} {model}"))
    return found


def _figure(value: Any) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
