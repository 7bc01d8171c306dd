"""Measures the links between processes: each pair, and all together. Also a program: `-m axolotl.distributed.diagnose`.

It is started by `axolotl doctor --distributed` in several processes, or by torchrun on several machines. A process that hangs
prints what its threads are doing, and ends.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import itertools
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from axolotl.distributed.failure import end_with_parent
from axolotl.distributed.group import start_group
from axolotl.distributed.world import detect_hardware, world

REPEATS = 5
MOST_PAIRED = 16
"""With more processes only neighbours are paired: all pairs would take minutes."""
GPU_BYTES, CPU_BYTES = 64 << 20, 4 << 20


@dataclass
class Links:
    """What was measured."""

    processes: int
    backend: str
    hosts: list[str]
    """Name of the machine of each rank."""
    megabytes: int = 0
    all_reduce: float = 0.0
    """GB/s per process of an all-reduce over all, as NCCL's tests count it (bus bandwidth)."""
    pairs: list[tuple[int, int, float]] = field(default_factory=list)
    """(rank, rank, GB/s) of an all-reduce between two."""
    wrong: list[str] = field(default_factory=list)
    """What came out as another number than the sum."""
    no_peer_access: list[tuple[int, int]] = field(default_factory=list)
    """GPUs of this machine that cannot read each other's memory."""


def measure(say: Callable[[str], None], seconds: int) -> Links:
    """Meets the others and measures; every process of the run has to call it. `say` hears each stage."""
    hardware, place = detect_hardware(), world()
    say("meeting the others")
    start_group(hardware, seconds)
    cuda = hardware.device == "cuda"
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    bytes_ = GPU_BYTES if cuda else CPU_BYTES
    names: list[Any] = [None] * place.size
    say("exchanging names")
    dist.all_gather_object(names, socket.gethostname())
    links = Links(place.size, "nccl" if cuda else "gloo", names, bytes_ >> 20)
    say("an all-reduce over all")
    rate, right = _all_reduce(None, place.size, device, bytes_)
    links.all_reduce = rate
    wrong = [] if right else ["all-reduce over all"]
    pairs: list[tuple[int, int]] = list(itertools.combinations(range(place.size), 2))
    if place.size > MOST_PAIRED:
        pairs = [(a, a + 1) for a in range(place.size - 1)]
    mine = []
    for a, b in pairs if place.size > 2 else ():
        say(f"an all-reduce between ranks {a} and {b}")
        group = dist.new_group([a, b], timeout=timedelta(seconds=seconds))
        if place.rank in (a, b):
            rate, right = _all_reduce(group, 2, device, bytes_)
            wrong += [] if right else [f"all-reduce between ranks {a} and {b}"]
            mine.append((a, b, rate))
        dist.barrier()
    if place.size == 2:
        mine = [(0, 1, links.all_reduce)]
    say("collecting the figures")
    found: list[Any] = [None] * place.size
    dist.all_gather_object(found, (mine if place.rank in {a for a, _, _ in mine} else [], wrong))
    links.pairs = sorted({(a, b): (a, b, r) for part, _ in found for a, b, r in part}.values())
    links.wrong = sorted({line for _, part in found for line in part})
    if cuda:
        count = torch.cuda.device_count()
        links.no_peer_access = [
            (a, b)
            for a, b in itertools.combinations(range(count), 2)
            if not (torch.cuda.can_device_access_peer(a, b) and torch.cuda.can_device_access_peer(b, a))
        ]
    say("done")
    return links


def _all_reduce(group: Any, size: int, device: torch.device, bytes_: int) -> tuple[float, bool]:
    """(bus bandwidth in GB/s, whether the sum was right)."""
    times, right = [], True
    for _ in range(REPEATS + 1):
        x = torch.ones(bytes_ // 4, device=device)
        _wait(device)
        at = time.perf_counter()
        dist.all_reduce(x, group=group)
        _wait(device)
        times.append(time.perf_counter() - at)
        right &= bool((x == size).all())
    # The first one builds connections.
    seconds = statistics.median(times[1:])
    return bytes_ * 2 * (size - 1) / size / seconds / 1e9, right


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(folder: str, seconds: str) -> None:
    """Measures as one process of several; rank 0 leaves `links.json` in the folder, each its stage in `stage-RANK`."""
    end_with_parent()
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    place = world()
    stage = Path(folder) / f"stage-{place.rank}"

    def say(text: str) -> None:
        stage.write_text(text)

    links = measure(say, int(float(seconds)))
    if place.is_main:
        (Path(folder) / "links.json").write_text(json.dumps(dataclasses.asdict(links)))
    sys.stdout.flush()
    # A thread of gloo that is in C++ when Python ends would abort.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
