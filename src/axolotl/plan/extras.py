"""The optional packages: what each extra unlocks, and versions that are known not to work together."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

UNLOCKS: Mapping[str, tuple[str, str]] = {
    "flash-attn": ("kernels", "ready-built flash attention kernels"),
    "kernels": ("kernels", "kernels from the Hub"),
    "hub": ("huggingface_hub", "models and datasets from the Hub"),
    "deepspeed": ("deepspeed", "ZeRO: models divided among GPUs, offloading"),
    "bitsandbytes": ("bitsandbytes", "QLoRA, 8-bit bases, 8-bit optimizers"),
    "liger": ("liger_kernel", "Liger's fused kernels"),
    "torchao": ("torchao", "8-bit and 4-bit AdamW, training in 8-bit floats, quantisation"),
    "optimizers": ("schedulefree", "schedule-free, optimi, CAME, GrokAdamW"),
    "rl": ("trl", "preference tuning and reinforcement learning"),
    "gradio": ("gradio", "`inference --gradio`: a page in the browser"),
    "ray": ("ray", "training on a Ray cluster"),
    "wandb": ("wandb", "logging to Weights & Biases"),
    "mlflow": ("mlflow", "logging to MLflow"),
    "comet": ("comet_ml", "logging to Comet"),
    "swanlab": ("swanlab", "logging to SwanLab"),
    "tensorboard": ("tensorboard", "logging for TensorBoard"),
    "trackio": ("trackio", "logging to Trackio"),
    "opentelemetry": ("opentelemetry", "metrics by OpenTelemetry"),
    "s3": ("s3fs", "datasets from S3"),
    "gcs": ("gcsfs", "datasets from Google Cloud"),
    "azure": ("adlfs", "datasets from Azure"),
    "oci": ("ocifs", "datasets from Oracle Cloud"),
    "gguf": ("gguf", "`axolotl export`: the finished model as one file for llama.cpp"),
    "lm-eval": ("lm_eval", "benchmarks of lm-evaluation-harness"),
    "vllm": ("vllm", "fast generation for reinforcement learning"),
    "mistral": ("mistral_common", "Mistral's own tokenizer"),
    "sentencepiece": ("sentencepiece", "tokenizers that come as tokenizer.model"),
    "vision": ("PIL", "images"),
    "dev": ("pytest", "the tests"),
}
"""Each extra of the package, the module by which it is found, and what it is for."""


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def version(package: str) -> str | None:
    """The version of an installed package, without its local part; None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


Range = tuple[str, str]
"""From this version on, and below that one; an empty text is no limit."""


@dataclass(frozen=True)
class BadPair:
    """Two packages that fail together in these versions."""

    one: tuple[str, Range]
    other: tuple[str, Range]
    what: str
    remedy: str


BAD_PAIRS: tuple[BadPair, ...] = (
    BadPair(
        ("transformers", ("5", "")),
        ("peft", ("", "0.18")),
        "peft before 0.18 does not know transformers 5",
        "pip install 'peft>=0.18'",
    ),
    BadPair(
        ("numpy", ("2", "")),
        ("torch", ("", "2.3")),
        "torch before 2.3 was built for numpy 1",
        "pip install 'torch>=2.9'",
    ),
    BadPair(
        ("numpy", ("2.4", "")),
        ("triton", ("3.6", "3.7")),
        "Triton 3.6's interpreter fails with numpy 2.4 (kernels tested on the CPU)",
        "pip install 'triton>=3.7' (a GPU is not affected)",
    ),
    BadPair(
        ("flash-attn-4", ("4.0.0b36", "4.0.0b37")),
        ("torch", ("2.11", "2.12")),
        "torch 2.11 cannot activate this flash-attn-4",
        "leave `attn_implementation` out: PyTorch's own kernels are used",
    ),
    BadPair(
        ("gradio", ("5", "")),
        ("pillow", ("13", "")),
        "gradio wants pillow before 13",
        "pip install 'pillow<13'",
    ),
)


def bad_pairs(of: Callable[[str], str | None] = version) -> list[BadPair]:
    """The pairs that are installed here in versions that fail."""
    return [
        pair
        for pair in BAD_PAIRS
        if all(_within(of(name), limits) for name, limits in (pair.one, pair.other))
    ]


def _within(found: str | None, limits: Range) -> bool:
    if found is None:
        return False
    low, high = limits
    return (not low or _key(found) >= _key(low)) and (not high or _key(found) < _key(high))


def _key(text: str) -> tuple[tuple[int, int], ...]:
    """A version as numbers; a pre-release (b36) counts as below the release."""
    parts: list[tuple[int, int]] = []
    for piece in text.split("+")[0].split("."):
        match = re.match(r"(\d+)(?:[a-z]+(\d+))?", piece)
        if match:
            parts.append((int(match.group(1)), int(match.group(2)) if match.group(2) else 1 << 20))
    while parts and parts[-1] == (0, 1 << 20):
        parts.pop()
    return tuple(parts)
