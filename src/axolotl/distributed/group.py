"""The processes of a run as a group: how it starts, and how all agree on what one of them found out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from axolotl.config.resolve import Hardware
from axolotl.distributed.failure import tell_failure
from axolotl.distributed.meeting import agent_store, of_this_round
from axolotl.distributed.peers import PeerWatch, end_stuck_agent, own_connection, silence_allowed
from axolotl.distributed.witness import farewell
from axolotl.distributed.world import world
from axolotl.errors import EnvironmentProblem

T = TypeVar("T")
TIMEOUT = 1800  # seconds, as transformers has it


def start_group(hardware: Hardware, timeout: int | None = None) -> None:
    """Lets the processes of the run meet, where there are several. Each GPU belongs to one process from here on.

    `timeout`: seconds that one waits for the others before it gives up.
    """
    place = world()
    if place.size <= 1:
        return
    backend = "gloo"
    if hardware.device == "cuda":
        torch.cuda.set_device(place.local_rank)
        # gloo carries what is in CPU memory: offloaded weights, objects.
        backend = "cpu:gloo,cuda:nccl"
    if dist.is_initialized():
        return  # Ray has done it
    seconds = timeout or TIMEOUT
    given: dict[str, Any] = {}
    store = agent_store(seconds)
    if store is not None:
        store = of_this_round(store, place.rank, place.size, seconds)
        given = {"store": store, "rank": place.rank, "world_size": place.size}
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds), **given)
    if store is not None and place.machines > 1 and (silence := silence_allowed()):
        # The group's own connection may be waiting for an answer.
        _watches.append(
            PeerWatch(
                own_connection(store),
                place.machine,
                place.machines,
                speaks=place.local_rank == 0,
                lost=end_from_thread,
                silence=silence,
            )
        )


_watches: list[PeerWatch] = []


def end_from_thread(error: EnvironmentProblem) -> None:
    """Ends this process from a thread, with its exit code: the others may hang in a collective."""
    code = tell_failure(error)
    sys.stdout.flush()
    sys.stderr.flush()
    end_stuck_agent()
    farewell()
    os._exit(code)


def leave_group(exit_code: int = 0) -> None:
    """Ends the group for this process, which has done its part. Only the first one comes back from here.

    The others have nothing left to write, and a thread of a library that is in C++ when Python ends would turn their
    success into an abort.
    """
    if not dist.is_initialized():
        return
    while _watches:
        _watches.pop().leave()
    dist.destroy_process_group()
    if not world().is_main:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in all of them; it is called there alone.

    The value travels pickled. Where it raises in the first process, the others are ended by their launcher.
    """
    place = world()
    if place.size <= 1 or not dist.is_initialized():
        return make()
    box: list[T | None] = [make() if place.is_main else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def over_all(value: bool) -> bool:
    """Whether a thing is so in any process."""
    if world().size <= 1 or not dist.is_initialized():
        return value
    found = [False] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return any(found)
