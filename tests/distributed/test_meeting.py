"""Processes of one round find each other in a store that holds what earlier rounds have left."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.distributed import meeting
from axolotl.distributed.meeting import agent_store, of_this_round


def _server() -> dist.TCPStore:
    return dist.TCPStore(
        "127.0.0.1", 0, None, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )


def _meet(port: int, ranks: list[int], size: int, timeout: float = 20) -> dict[int, str]:
    """What each rank calls the round: the value of a key that rank 0 leaves in its part. Only these ranks come."""
    found: dict[int, str] = {}

    def one(rank: int) -> None:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
        try:
            part = of_this_round(store, rank, size, timeout)
        except TimeoutError as error:
            found[rank] = str(error)
            return
        if rank == 0:
            part.set("mark", f"{threading.get_ident()}")
        found[rank] = part.get("mark").decode()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@settings(max_examples=8, deadline=None)
@given(
    st.integers(2, 4).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.permutations(range(n)), min_size=2, max_size=4))
    )
)
def test_each_round_is_its_own(drawn: tuple[int, list[list[int]]]) -> None:
    size, rounds = drawn
    server = _server()
    for order in rounds:
        found = _meet(server.port, order, size)
        assert sorted(found) == list(range(size))
        assert len(set(found.values())) == 1, found


def test_who_is_missing_is_named_and_the_next_round_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "POLL", 0.01)
    server = _server()
    _meet(server.port, [0, 1, 2], 3)
    # The second process died before it came: neither of the others may take the old answer of it.
    found = _meet(server.port, [0, 2], 3, timeout=0.5)
    assert "rank 1 of 3" in found[0]
    assert "rank 0 of 3" in found[2]
    # One that comes late, after those, still finds the round in which all are there.
    assert len(set(_meet(server.port, [2, 0, 1], 3).values())) == 1


def test_only_under_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert agent_store(1) is None
    server = _server()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    store = agent_store(5)
    assert store is not None
    store.set("a", "b")
    assert server.get("a") == b"b"
