"""How the processes of a run are divided: which of them share rows, matrix products, or a copy of the model.

Four axes, the outermost first: `replicate` (copies of a sharded model), `shard` (processes that divide one copy),
`context` (processes that share each row), `tensor` (processes that share each matrix product). Ranks are counted along the
last axis first, so that those who talk most are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from axolotl.config.config import Config
from axolotl.config.distributed import DistributedSection
from axolotl.errors import Problem

NAMES = ("dp_replicate", "dp_shard", "cp", "tp")
"""The axes as the device mesh calls them."""
_KEYS = ("dp_replicate_size", "dp_shard_size", "context_parallel_size", "tensor_parallel_size")


@dataclass(frozen=True)
class Axes:
    """Sizes of the four axes; their product is the number of processes."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """In the order of `NAMES`."""
        return self.replicate, self.shard, self.context, self.tensor

    @property
    def processes(self) -> int:
        """All processes of the run."""
        return prod(self.sizes)

    @property
    def data_ranks(self) -> int:
        """Groups of processes with rows of their own: by these a step's rows are divided."""
        return self.replicate * self.shard

    @property
    def weight_shards(self) -> int:
        """Parts into which FSDP divides each weight (that a tensor axis may have divided before)."""
        return self.shard * self.context

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """Place of a process on the axes, in the order of `NAMES`."""
        found = []
        for size in reversed(self.sizes):
            rank, place = divmod(rank, size)
            found.append(place)
        replicate, shard, context, tensor = reversed(found)
        return replicate, shard, context, tensor

    def rank(self, replicate: int, shard: int, context: int, tensor: int) -> int:
        """The process at a place: the inverse of `coordinates`."""
        return ((replicate * self.shard + shard) * self.context + context) * self.tensor + tensor

    def data_rank(self, rank: int) -> int:
        """Which rows a process gets: the same number for all that share rows."""
        return rank // (self.context * self.tensor)


def axes_of(distributed: DistributedSection, processes: int) -> Axes | None:
    """The axes of a run in so many processes; None where they cannot be divided so (`axes_problems` tells why).

    What is not named is worked out: with `fsdp_config` the rest shards the model, else the rest holds copies of it.
    """
    named = distributed.dp_replicate_size
    shard = distributed.dp_shard_size
    context, tensor = distributed.context_parallel_size or 1, distributed.tensor_parallel_size or 1
    rest, odd = divmod(processes, context * tensor)
    if odd or not rest:
        return None
    if not distributed.fsdp_config:
        # DeepSpeed has its own way of dividing: for the rows its processes are as copies.
        return Axes(rest, 1, context, tensor) if named in (None, rest) and shard in (None, -1, 1) else None
    if shard in (None, -1, 0):
        shard, odd = divmod(rest, named or 1)
        named = named or 1
    else:
        assert shard is not None
        named = named or max(1, rest // shard)
    found = Axes(named, shard, context, tensor)
    return found if found.processes == processes else None


def axes_problems(cfg: Config, processes: int) -> list[Problem]:
    """Why the axes that a config names do not fit this number of processes."""
    if axes_of(cfg.distributed, processes) is not None:
        return []
    values = {key: getattr(cfg.distributed, key) for key in _KEYS}
    told = {key: value for key, value in values.items() if value not in (None, -1, 0)}
    keys = tuple(told)
    if not cfg.distributed.fsdp_config and (told.get("dp_shard_size") or 1) > 1:
        return []  # the rules tell that it needs `fsdp_config`
    product = prod(told.values())
    words = " × ".join(f"`{key}: {value}`" for key, value in told.items())
    count = f"{processes} process{'es' if processes > 1 else ''}"
    remedy = f"Start {product} processes, or choose sizes whose product is {processes}; one that is left out takes the rest."
    return [cfg.problem(f"{words} is {product}, and there are {count}.", remedy, *keys)]
