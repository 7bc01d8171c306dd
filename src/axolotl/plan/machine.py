"""`axolotl doctor`, the machine: versions, GPU, driver, memory, limits, network, optional packages."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import huggingface_hub
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from axolotl import __version__
from axolotl.config.host import bytes_as_gib, disk_free, oom_kills, open_files, ram, shared_memory_free
from axolotl.config.resolve import Hardware
from axolotl.plan.extras import UNLOCKS, bad_pairs, installed, version

State = Literal["ok", "note", "problem"]
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "trl",
    "triton",
    "bitsandbytes",
    "deepspeed",
    "flash-attn",
    "liger-kernel",
    "torchao",
)
DRIVERS = ((13, 580), (12, 525), (11, 450))
"""The oldest driver for each CUDA, by NVIDIA's table of minor version compatibility."""
FEW_FILES, LITTLE_SHM, LITTLE_DISK = 4096, 1 << 30, 20 << 30
NETWORK_SECONDS = 3.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    state: State
    text: str
    remedy: str = ""
    code: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {k: v or None for k, v in self.__dict__.items()} | {"text": self.text}


def look_at_machine(hardware: Hardware, folder: Path) -> list[Finding]:
    """Everything about this machine that a run depends on. `folder`: where it will write."""
    return [
        *_versions(),
        *_cuda(hardware),
        *_gpus(hardware),
        *_attention(hardware),
        *_memory(),
        *_limits(folder),
        *_hub(),
        *_extras(),
        *_pairs(),
    ]


def _versions() -> Iterator[Finding]:
    have = [f"{name} {found}" for name in PACKAGES if (found := version(name))]
    yield Finding(
        "versions", "ok", f"axolotl {__version__}, Python {platform.python_version()}, {', '.join(have)}"
    )
    yield Finding(
        "system",
        "ok",
        f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs",
    )


def driver_version(root: Path = Path("/")) -> str | None:
    """The NVIDIA driver's version; None where there is none. `root`: where /proc is looked for."""
    file = root / "proc/driver/nvidia/version"
    if file.is_file():
        match = re.search(
            r"Kernel Module(?: for \S+)?\s+(\d+\.\d+(?:\.\d+)?)", file.read_text(errors="replace")
        )
        if match:
            return match.group(1)
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def match_driver(built_for: str | None, driver: str | None, usable: bool) -> Finding:
    """How torch, its CUDA and the driver fit together. `usable`: torch can use a GPU here."""
    if usable:
        return Finding("CUDA", "ok", f"torch is built for CUDA {built_for}, driver {driver or 'unknown'}")
    if driver is None:
        if built_for is None:
            return Finding("CUDA", "note", "no NVIDIA driver; torch is built for the CPU")
        return Finding(
            "CUDA", "note", f"no NVIDIA driver; torch is built for CUDA {built_for} and runs on the CPU"
        )
    if built_for is None:
        return Finding(
            "CUDA",
            "problem",
            f"there is an NVIDIA driver ({driver}), but torch is built for the CPU, so the GPU is not used.",
            "Install torch from PyPI without `--index-url .../cpu`.",
            "AX1409",
        )
    needed = next((d for cuda, d in DRIVERS if int(built_for.split(".")[0]) >= cuda), 0)
    if int(driver.split(".")[0]) < needed:
        return Finding(
            "CUDA",
            "problem",
            f"torch is built for CUDA {built_for}, which needs driver {needed} or newer; this one is {driver}.",
            "Update the driver, or install a torch for an older CUDA.",
            "AX1409",
        )
    return Finding(
        "CUDA",
        "problem",
        f"torch (CUDA {built_for}) finds no GPU although driver {driver} is there.",
        "In a container: start it with the GPUs (`--gpus all`). Else look at CUDA_VISIBLE_DEVICES and `nvidia-smi`.",
        "AX1409",
    )


def _cuda(hardware: Hardware) -> Iterator[Finding]:
    if getattr(torch.version, "hip", None):
        yield Finding("ROCm", "ok", f"torch is built for ROCm {torch.version.hip}")
        return
    yield match_driver(torch.version.cuda, driver_version(), hardware.device == "cuda")


def _gpus(hardware: Hardware) -> Iterator[Finding]:
    if hardware.device != "cuda":
        yield Finding("GPU", "note", f"none: training runs on {hardware.device}")
        return
    archs = torch.cuda.get_arch_list()
    for i, name in enumerate(hardware.gpu_names):
        capability = torch.cuda.get_device_capability(i)
        try:
            free, total = torch.cuda.mem_get_info(i)
        except RuntimeError as error:
            # Asking makes a context, for which a full GPU has no room.
            yield Finding(
                "GPU",
                "problem",
                f"{i}: {name} cannot be used: {str(error).splitlines()[0]}",
                "See `nvidia-smi`: other programs may hold all of its memory, or the whole GPU.",
                "AX1409",
            )
            continue
        kind = ".".join(map(str, capability))
        yield Finding(
            "GPU",
            "ok",
            f"{i}: {name}, capability {kind}, {bytes_as_gib(free)} of {bytes_as_gib(total)} free; {allows(capability)}",
        )
        if not built_for(capability, archs):
            yield Finding(
                "GPU",
                "problem",
                f"{i}: torch {torch.__version__} has no code for capability {kind} (it has {', '.join(archs)}).",
                "Install a torch that is built for this GPU.",
                "AX1409",
            )
        if free < 0.5 * total:
            yield Finding(
                "GPU", "note", f"{i}: other programs hold {bytes_as_gib(total - free)}.", "See `nvidia-smi`."
            )
    if len(set(hardware.gpu_names)) > 1:
        yield Finding(
            "GPU",
            "note",
            "the GPUs differ: a run over all of them goes at the pace, and in the memory, of the least.",
        )


def built_for(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """Whether a torch with this list of architectures (`sm_90`, `compute_90`) runs on a GPU; an empty list says nothing.

    Machine code runs on GPUs of its own generation that are as new or newer; `compute_` is compiled for any newer one.
    """
    for arch in archs:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch)
        if match is None:
            return True  # not of NVIDIA's, such as gfx942
        major, minor = int(match.group(2)), int(match.group(3))
        newer = (major, minor) <= capability
        if newer and (match.group(1) == "compute" or major == capability[0]):
            return True
    return not archs


def allows(capability: tuple[int, int]) -> str:
    """What a compute capability can do."""
    found = [
        f"bf16 {'yes' if capability >= (8, 0) else 'no (fp16 instead)'}",
        f"fp8 {'yes' if capability >= (8, 9) else 'no'}",
        f"flash attention {'yes' if capability >= (8, 0) else 'no'}",
    ]
    return ", ".join(found)


def attention_backends(device: str, dtype: torch.dtype) -> dict[str, float | None]:
    """Which backends of PyTorch's attention run here, forward and backward: milliseconds, or None for one that does not.

    On a GPU: a causal row of 2,048 tokens, 16 heads of 64; else a small one.
    """
    tokens = 2048 if device == "cuda" else 64
    found: dict[str, float | None] = {}
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ):
        name = backend.name.removesuffix("_ATTENTION").lower()
        # A backend that cannot says so by warnings before the error.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                q = torch.zeros(1, 16, tokens, 64, device=device, dtype=dtype, requires_grad=True)
                found[name] = min(_pass(q, backend) for _ in range(3))
            except RuntimeError:
                found[name] = None
    return found


def _pass(q: torch.Tensor, backend: SDPBackend) -> float:
    """Milliseconds of one forward and backward pass."""
    started = time.perf_counter()
    with sdpa_kernel(backend):
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    if q.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1000


def _attention(hardware: Hardware) -> Iterator[Finding]:
    gpu = hardware.device == "cuda"
    dtype = (torch.bfloat16 if hardware.bf16 else torch.float16) if gpu else torch.float32
    tried = attention_backends("cuda" if gpu else "cpu", dtype)
    runs = sorted((ms, name) for name, ms in tried.items() if ms is not None)
    listed = ", ".join(f"{name} {ms:.1f} ms" for ms, name in runs)
    not_here = ", ".join(name for name, ms in tried.items() if ms is None)
    packages = [p for p in ("flash_attn", "flash_attn_interface", "xformers") if installed(p)]
    more = f"; not here: {not_here}" if not_here else ""
    more += f"; packages: {', '.join(packages)}" if packages else ""
    yield Finding(
        "attention", "ok" if runs else "problem", f"forward and backward: {listed or 'nothing works'}{more}"
    )


def _memory() -> Iterator[Finding]:
    now = ram()
    little = now.total and now.free < 4 << 30
    yield Finding(
        "RAM",
        "note" if little else "ok",
        f"{bytes_as_gib(now.free)} of {bytes_as_gib(now.total)} free (limit of the {now.limit})",
        "Large datasets and models need more." if little else "",
        "AX1405" if little else "",
    )
    if oom_kills():
        yield Finding(
            "RAM",
            "note",
            f"the kernel has ended {oom_kills()} processes of this container, or machine, for want of memory.",
            "",
            "AX1405",
        )


def _limits(folder: Path) -> Iterator[Finding]:
    for what, place in (("disk", folder), ("Hub cache", Path(huggingface_hub.constants.HF_HUB_CACHE))):
        free = disk_free(place)
        little = free < LITTLE_DISK
        yield Finding(
            what,
            "note" if little else "ok",
            f"{bytes_as_gib(free)} free",
            "Models and checkpoints are large." if little else "",
        )
    shm = shared_memory_free()
    if shm is not None:
        little = shm < LITTLE_SHM
        remedy = (
            "Start the container with `--shm-size=16g`: loader processes and NCCL need it." if little else ""
        )
        yield Finding(
            "shared memory", "note" if little else "ok", f"{bytes_as_gib(shm)} free in /dev/shm", remedy
        )
    files = open_files()
    if files is not None:
        few = 0 <= files[0] < FEW_FILES
        remedy = f"`ulimit -n {FEW_FILES}` or more." if few else ""
        yield Finding(
            "open files", "note" if few else "ok", f"at most {files[0]:,} (hard limit {files[1]:,})", remedy
        )


def _hub() -> Iterator[Finding]:
    endpoint = urlsplit(huggingface_hub.constants.ENDPOINT)
    token = (
        "a token is set"
        if huggingface_hub.get_token()
        else "no token is set (needed for gated and private models)"
    )
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        yield Finding("Hub", "note", f"HF_HUB_OFFLINE forbids it; {token}")
        return
    try:
        port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
        with socket.create_connection((endpoint.hostname or "", port), timeout=NETWORK_SECONDS):
            yield Finding("Hub", "ok", f"{endpoint.hostname} is reached; {token}")
    except OSError as error:
        yield Finding(
            "Hub",
            "note",
            f"{endpoint.hostname} is not reached ({error.strerror or type(error).__name__}); {token}",
            "Local folders work all the same. A proxy is set with HTTPS_PROXY, a mirror with HF_ENDPOINT.",
        )


def _extras() -> Iterator[Finding]:
    have = [name for name, (module, _) in UNLOCKS.items() if installed(module)]
    lack = [f"{name} ({what})" for name, (module, what) in UNLOCKS.items() if not installed(module)]
    yield Finding("extras here", "ok", ", ".join(have) or "none")
    yield Finding(
        "extras not here",
        "ok",
        "; ".join(lack) or "none",
        "Install one by its name in brackets, as in the error that asks for it." if lack else "",
    )


def _pairs() -> Iterator[Finding]:
    for pair in bad_pairs():
        found = ", ".join(f"{name} {version(name)}" for name, _ in (pair.one, pair.other))
        yield Finding("versions", "problem", f"{found}: {pair.what}.", pair.remedy, "AX1409")
