"""The values of `attn_implementation`: what each stands for. Rules and the model's loading read this one table."""

from __future__ import annotations

from dataclasses import dataclass

PACKED = "axolotl_packed"
"""Our own attention over packed rows, as transformers' registry calls it."""


@dataclass(frozen=True)
class Backend:
    """How one value of `attn_implementation` is carried out: packed and unpacked, and where it cannot run."""

    packed: str
    unpacked: str
    cuda_only: str = ""
    """Why it needs a GPU, for the error message; empty: runs everywhere."""
    package: str = ""
    """The module that brings it; empty: torch itself does."""
    short: tuple[str, ...] = ()
    """What people write for it."""


def _ours(package: str, *short: str) -> Backend:
    return Backend(PACKED, "sdpa", package=package, short=short)


BACKENDS: dict[str, Backend] = {
    "eager": Backend("eager", "eager"),
    "sdpa": Backend("sdpa", "sdpa", short=("sdp",)),
    "flash_attention_2": _ours(
        "flash_attn", "flash", "flash_attention", "flash_attn", "flash_attn_2", "flash_2", "fa2"
    ),
    "flash_attention_3": _ours("flash_attn_interface", "flash_attn_3", "fa3"),
    "flash_attention_4": _ours("flash_attn.cute", "flash_attn_4", "fa4"),
    "flex_attention": Backend(
        "flex_attention",
        "flex_attention",
        "flex attention has no backward pass on the CPU",
        short=("flex",),
    ),
    "xformers": _ours("xformers"),
}
"""The names that a config may write; a name with a slash is a kernel on the Hub."""

LATER = ("sage", "fp8")
"""Names that are known and cannot be used yet."""

SHORT = {word: name for name, backend in BACKENDS.items() for word in backend.short}


def backend_of(name: str) -> Backend | None:
    """What carries a name out, kernels on the Hub and our own included; None for an unknown one."""
    if name == PACKED:
        return Backend(PACKED, PACKED)
    return _ours("") if "/" in name else BACKENDS.get(name)
