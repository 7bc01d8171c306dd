"""Where processes that torch's elastic agent has started meet, also after it has started them anew.

The agent keeps one store for the whole run. What the processes before a restart have left in it (the addresses under
which gloo and NCCL found each other) has the same keys as what the new ones write, and who reads too early waits for
a process that is gone. torch holds the store to be new at every restart; its rendezvous has not made it so since
stores are shared. The number of the restart cannot tell them apart: agents of several machines count differently.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL = 0.05
_ROUND = "axolotl/round"


def agent_store(timeout: float) -> dist.Store | None:
    """The store of the agent that has started this process; None where there is no such agent."""
    if not os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=timeout),
    )


def of_this_round(store: dist.Store, rank: int, size: int, timeout: float) -> dist.Store:
    """A part of the store that only the processes see which are alive now.

    The first process draws a name for the round; each other one answers with a name of its own, and goes on when
    the first has read just that. An answer left by a process of an earlier round is thus worth nothing. Raises
    TimeoutError when not all have answered within `timeout` seconds.
    """
    end = time.monotonic() + timeout
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set(_ROUND, mine)
        answers = [f"axolotl/{mine}/{other}" for other in range(1, size)]
        while answers and not store.check(answers):
            missing = [n + 1 for n, key in enumerate(answers) if not store.check([key])]
            _wait(
                end,
                f"rank {', '.join(map(str, missing))} of {size} did not come within {timeout:.0f} seconds",
            )
        store.set(f"axolotl/{mine}/all", json.dumps([store.get(key).decode() for key in answers]))
        return dist.PrefixStore(mine, store)
    answered = ""
    while True:
        name = store.get(_ROUND).decode() if store.check([_ROUND]) else ""
        if name and name != answered:
            store.set(f"axolotl/{name}/{rank}", mine)
            answered = name
        seen = f"axolotl/{answered}/all"
        if answered and store.check([seen]) and json.loads(store.get(seen))[rank - 1] == mine:
            return dist.PrefixStore(answered, store)
        _wait(end, f"rank 0 of {size} did not answer within {timeout:.0f} seconds")


def _wait(end: float, why: str) -> None:
    if time.monotonic() > end:
        raise TimeoutError(f"The processes of the run did not find each other: {why}.")
    time.sleep(POLL)
