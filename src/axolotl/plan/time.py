"""How long a step takes: each operation of a rehearsal against the roofline of a GPU.

An operation takes as long as its arithmetic or its traffic, whichever is longer, at the share of the data sheet that was
measured (gpus.json). See Williams, Waterman, Patterson: Roofline (2009).
"""

from __future__ import annotations

from dataclasses import dataclass

from axolotl.plan.gpus import Gpu
from axolotl.plan.ledger import Account, Work

INTERCONNECT = 300e9
"""Bytes per second that each GPU of a machine is taken to exchange (NVLink of an HGX machine, measured nowhere here)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on one GPU."""

    matmul: float
    attention: float
    memory: float
    optimizer: float
    exchange: float
    """Gathering and reducing between GPUs, as if nothing of it were hidden behind computing."""
    host: float
    """What the program itself needs; counts only where it is more than the device's part."""
    total: float


def step_time(
    micro: Account,
    gpu: Gpu,
    *,
    accumulation: int,
    bits16: bool,
    update_bytes: float,
    exchanged: float,
    shared: int = 1,
) -> StepTime:
    """Seconds of a step of `accumulation` micro batches, each as in the rehearsal `micro`.

    `update_bytes`: read and written by the optimizer; `exchanged`: bytes that this GPU sends or gets in a step; `shared`:
    GPUs that share each matrix product, and the heads of each attention.
    """
    share = gpu.efficiency
    kinds = {"matmul": 0.0, "attention": 0.0, "memory": 0.0}
    operations = 0
    for phase, table in micro.work.items():
        if phase != "start":
            operations += micro.operations[phase]
            for work in table.values():
                # Attention is attention, however it is reached, and a product a product.
                kinds[work.kind.split()[-1]] += work.count * seconds(work, gpu, bits16)
    for kind in ("matmul", "attention"):
        kinds[kind] /= shared
    optimizer = update_bytes / (gpu.bandwidth * share.memory)
    exchange = exchanged / INTERCONNECT
    host = accumulation * operations * share.host_us * 1e-6
    device = share.rest * (accumulation * sum(kinds.values()) + optimizer)
    matmul, attention, memory = (
        accumulation * share.rest * kinds[kind] for kind in ("matmul", "attention", "memory")
    )
    return StepTime(
        matmul, attention, memory, share.rest * optimizer, exchange, host, max(device, host) + exchange
    )


def seconds(work: Work, gpu: Gpu, bits16: bool) -> float:
    """Seconds of one operation on the device."""
    share = gpu.efficiency
    traffic = work.moved / (gpu.bandwidth * share.memory)
    if work.kind == "memory":
        return max(traffic, share.launch_us * 1e-6)
    if work.kind == "fp8 matmul":
        # Twice the 16-bit rate in the data sheets of all that have it; no product of its own was timed.
        reached = 2.0 * gpu.peak(True) * share.matmul
    else:
        of_peak: float = getattr(share, work.kind.replace(" ", "_"))
        reached = gpu.peak(bits16) * of_peak
    return max(work.flops / reached, traffic, share.launch_us * 1e-6)
