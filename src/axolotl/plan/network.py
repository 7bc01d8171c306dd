"""What a run on several devices needs of its machines: environment, shared memory, files, links."""

from __future__ import annotations

import os
import socket
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

from axolotl.config.host import bytes_as_gib, open_files, shared_memory_free
from axolotl.distributed.diagnose import Links
from axolotl.plan.machine import FEW_FILES, LITTLE_SHM, Finding

SLOW = 0.5
"""A link that is slower than so much of the middle one is told."""
_TOLD = {
    "NCCL_P2P_DISABLE": "GPUs send to each other through RAM",
    "NCCL_SHM_DISABLE": "processes of a machine talk through the network",
    "NCCL_IB_DISABLE": "machines talk over Ethernet instead of InfiniBand",
}
_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCHELASTIC_", "MASTER_", "UCX_")
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES")


def look_at_environment(given: Mapping[str, str], interfaces: list[str]) -> Iterator[Finding]:
    """Findings about variables that NCCL, gloo and torch read."""
    named = {k: v for k, v in sorted(given.items()) if k.startswith(_PREFIXES) or k in _PLACE}
    text = ", ".join(f"{k}={v}" for k, v in named.items()) or "none that NCCL, gloo or torch read is set"
    yield Finding("environment", "ok", text)
    for name, what in _TOLD.items():
        if named.get(name, "0") not in ("", "0"):
            yield Finding(
                "environment", "note", f"{name} is set: {what}", f"Unset it unless you know why: unset {name}"
            )
    if named.get("NCCL_NVLS_ENABLE", "0") not in ("", "0"):
        yield Finding(
            "environment",
            "note",
            "NCCL_NVLS_ENABLE is set: NVLink multicast keeps NCCL from starting where another program holds its memory",
            "Set it to 0 where NCCL does not start.",
        )
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if named.get(name) and not _names_one(named[name], interfaces):
            yield Finding(
                "environment",
                "problem",
                f"{name}={named[name]}, but the interfaces here are {', '.join(interfaces)}",
                f"Name one of them, or unset {name}.",
            )
    address = named.get("MASTER_ADDR")
    if address and not resolves(address):
        yield Finding(
            "environment",
            "problem",
            f"MASTER_ADDR={address} is no name that this machine knows",
            "Give the address of the first machine in numbers.",
        )
    port = named.get("MASTER_PORT")
    if port and not (port.isdigit() and 0 < int(port) < 65536):
        yield Finding("environment", "problem", f"MASTER_PORT={port} is no port", "It takes 1 to 65535.")
    if ("RANK" in named) != ("WORLD_SIZE" in named):
        one = "RANK" if "RANK" in named else "WORLD_SIZE"
        yield Finding(
            "environment",
            "problem",
            f"{one} is set without its companion: a launcher's variable was left behind",
            f"unset {one}",
        )


def _names_one(value: str, interfaces: list[str]) -> bool:
    """Whether a list as NCCL takes it (`eth,ib`, `=eth0`, `^docker`) leaves any interface."""
    exact, without = value.startswith(("=", "^=")), value.startswith("^")
    names = value.lstrip("^=").split(",")
    hit = [i for i in interfaces if any(i == n if exact else i.startswith(n) for n in names if n)]
    return len(hit) < len(interfaces) if without else bool(hit)


def resolves(name: str) -> bool:
    """Whether a name of a machine can be turned into an address."""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True


def look_at_limits(gpus: int) -> Iterator[Finding]:
    """Findings about shared memory, open files, locked memory, and the machine's own name."""
    free = shared_memory_free()
    if free is not None:
        little = free < LITTLE_SHM
        yield Finding(
            "shared memory",
            "problem" if little and gpus > 1 else "note" if little else "ok",
            f"{bytes_as_gib(free)} free in /dev/shm, through which NCCL and loader processes pass tensors",
            "In a container: `docker run --shm-size=8g`, or `--ipc=host`." if little else "",
        )
    files = open_files()
    if files is not None:
        soft, hard = files
        few = soft < FEW_FILES
        yield Finding(
            "open files",
            "note" if few else "ok",
            f"a process may hold {soft:,} (at most {hard:,})",
            f"`ulimit -n {FEW_FILES}` or more: each link takes some." if few else "",
        )
    if not resolves(socket.gethostname()) and not os.environ.get("GLOO_SOCKET_IFNAME"):
        yield Finding(
            "name",
            "note",
            f"this machine does not know the address of its own name, {socket.gethostname()}",
            "For several machines, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between them.",
        )
    devices = sorted(p.name for p in Path("/sys/class/infiniband").glob("*"))
    if devices:
        yield Finding("InfiniBand", "ok", ", ".join(devices))


def interfaces_here() -> list[str]:
    """Names of the network interfaces."""
    try:
        return [name for _, name in socket.if_nameindex()]
    except OSError:
        return []


def look_at_links(links: Links) -> Iterator[Finding]:
    """Findings about what was measured between the processes."""
    machines = len(set(links.hosts))
    yield Finding(
        "all-reduce",
        "ok",
        f"{links.all_reduce:.2f} GB/s over {links.processes} processes on {machines} machine"
        f"{'s' if machines > 1 else ''} ({links.backend}, {links.megabytes} MiB, bus bandwidth)",
    )
    for what in links.wrong:
        yield Finding(
            "all-reduce",
            "problem",
            f"{what} gave wrong numbers",
            "Memory or a link is broken: take this device out of the run.",
        )
    # What crosses machines is another kind of link.
    kinds: dict[bool, list[tuple[int, int, float]]] = {}
    for a, b, rate in links.pairs:
        kinds.setdefault(links.hosts[a] != links.hosts[b], []).append((a, b, rate))
    for between, pairs in sorted(kinds.items()):
        middle = statistics.median(rate for _, _, rate in pairs)
        for a, b, rate in pairs:
            slow = rate < SLOW * middle
            # On CPUs other programs take their share of the time.
            state = "ok" if not slow else "problem" if links.backend == "nccl" else "note"
            where = f" ({links.hosts[a]} to {links.hosts[b]})" if between else ""
            yield Finding(
                "link",
                state,  # type: ignore[arg-type]
                f"ranks {a} and {b}{where}: {rate:.2f} GB/s"
                + (f", the middle link has {middle:.2f}" if slow else ""),
                "Look at `nvidia-smi topo -m`, or at the cable or port between these machines."
                if slow
                else "",
            )
    if links.no_peer_access:
        pairs_ = ", ".join(f"{a}-{b}" for a, b in links.no_peer_access)
        yield Finding(
            "peer access",
            "note",
            f"GPUs {pairs_} cannot read each other's memory; they talk through RAM",
            "In a virtual machine, ACS or the IOMMU may forbid it.",
        )
    elif links.backend == "nccl":
        yield Finding("peer access", "ok", "every GPU reads every other one's memory")
