"""Which way of packed attention is fastest for a run: a short measurement on its own shapes, kept for the next run."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from axolotl.model.trust import LIMITS
from axolotl.model.varlen import VARLEN, Run, kernel, unusable

PACKAGES = ("torch", "flash-attn", "flash-attn-3", "flash-attn-4")
REPEATS, WARM = 5, 2


@dataclass(frozen=True)
class Work:
    """The attention of one layer and batch of a run."""

    device: str
    dtype: torch.dtype
    heads: int
    key_heads: int
    width: int
    borders: tuple[int, ...]
    """Where the documents of a typical batch begin, and the end of the last."""
    window: int | None = None


@dataclass(frozen=True)
class Timing:
    """One way's figures: milliseconds of a forward and backward pass, or why it was not taken."""

    name: str
    milliseconds: float | None
    why_not: str = ""


def measure(work: Work, names: Sequence[str] | None = None) -> list[Timing]:
    """Every way that can do the work, fastest first, then those that cannot, with the reason.

    Each has to give outputs and gradients of one document at a time, within what its number type allows.
    """
    tensors = _tensors(work)
    reference = _pass(_by_document(work), work, tensors)
    found = []
    for name in names if names is not None else VARLEN:
        why = unusable(name, work.device, work.dtype, work.width, work.window)
        if why:
            found.append(Timing(name, None, why))
            continue
        if name == "flex" and any(each.milliseconds is not None for each in found):
            found.append(
                Timing(name, None, "it is compiled anew for other lengths, where others are at hand")
            )
            continue
        run = kernel(name)
        assert run is not None
        try:
            off = _difference(_pass(run, work, tensors), reference)
            if not off <= LIMITS.get(work.dtype, 1e-4):
                found.append(Timing(name, None, f"its results differ by {off:.1%}"))
                continue
            for _ in range(WARM - 1):
                _pass(run, work, tensors)
            found.append(Timing(name, _milliseconds(run, work, tensors)))
        except torch.OutOfMemoryError:
            found.append(Timing(name, None, "it needs more memory than there is"))
        except Exception as error:  # a compiler's errors have no common base
            found.append(Timing(name, None, f"{type(error).__name__}: {str(error).strip()[:120]}"))
    return sorted(found, key=lambda t: (t.milliseconds is None, t.milliseconds or 0.0))


def fastest(
    work: Work, cache: Path | None = None, measured: Callable[..., list[Timing]] = measure
) -> tuple[str, list[Timing], bool]:
    """The way to take, all figures, and whether they come from an earlier run on the same machine and shapes."""
    file = cache_file() if cache is None else cache
    key = _key(work)
    known = _read(file)
    if key in known:
        timings = [Timing(**each) for each in known[key]]
        name = timings[0].name
        if not unusable(name, work.device, work.dtype, work.width, work.window):
            return name, timings, True
    timings = measured(work)
    if not timings or timings[0].milliseconds is None:
        return "documents", timings, False
    _write(file, _read(file) | {key: [asdict(t) for t in timings]})
    return timings[0].name, timings, False


def describe(timings: Sequence[Timing]) -> str:
    """The figures in one line."""
    shown = [f"{t.name} {t.milliseconds:.3g} ms" for t in timings if t.milliseconds is not None]
    return ", ".join(shown)


def cache_file() -> Path:
    """Where figures are kept, below XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "axolotl" / "attention.json"


def _key(work: Work) -> str:
    gpu = torch.cuda.get_device_name() if work.device == "cuda" else "cpu"
    versions = []
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    lengths = [b - a for a, b in zip(work.borders, work.borders[1:], strict=False)]
    # Batches are never quite alike: what counts is how many tokens, in how many documents, and how long the longest is.
    shape = (work.borders[-1], len(lengths).bit_length(), max(lengths, default=0).bit_length())
    said = (
        gpu,
        versions,
        str(work.dtype),
        work.heads,
        work.key_heads,
        work.width,
        shape,
        work.window,
        REPEATS,
    )
    return hashlib.sha256(repr(said).encode()).hexdigest()[:24]


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: Path, content: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
        aside.replace(file)


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _tensors(work: Work) -> Tensors:
    """q, k, v, the incoming gradient, and the borders."""
    draw = torch.Generator(work.device).manual_seed(0)
    N = work.borders[-1]

    def random(heads: int) -> torch.Tensor:
        made = torch.randn(N, heads, work.width, generator=draw, device=work.device)
        return made.to(work.dtype)

    q, k, v = (random(n).requires_grad_() for n in (work.heads, work.key_heads, work.key_heads))
    cu = torch.tensor(work.borders, dtype=torch.int32, device=work.device)
    return q, k, v, random(work.heads), cu


def _by_document(work: Work) -> Run:
    if not work.window:
        run = kernel("documents")
        assert run is not None
        return run

    def windowed(q: Any, k: Any, v: Any, cu: Any, longest: int, scale: Any, window: Any) -> torch.Tensor:
        outs = []
        for a, b in zip(work.borders, work.borders[1:], strict=False):
            at = torch.arange(b - a, device=q.device)
            apart = at[:, None] - at[None, :]
            seen = (apart >= 0) & (apart < window)
            q1, k1, v1 = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q1, k1, v1, attn_mask=seen, enable_gqa=grouped)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return windowed


def _pass(run: Run, work: Work, tensors: Tensors) -> list[torch.Tensor]:
    q, k, v, incoming, cu = tensors
    longest = max((b - a for a, b in zip(work.borders, work.borders[1:], strict=False)), default=0)
    with torch.enable_grad():
        out = run(q, k, v, cu, longest, None, work.window)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), incoming)]


def _difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(
        float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-20))
        for a, b in zip(found, expected, strict=True)
    )


def _milliseconds(run: Run, work: Work, tensors: Tensors) -> float:
    times = []
    for _ in range(REPEATS):
        _wait(work)
        started = time.perf_counter()
        _pass(run, work, tensors)
        _wait(work)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def _wait(work: Work) -> None:
    if work.device == "cuda":
        torch.cuda.synchronize()
