"""The processes of a run as a mesh of four axes (see `axolotl.config.axes`), and the parts of it that work together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from axolotl.config.axes import Axes

WEIGHTS = "dp_shard_cp"
"""The axis over which FSDP divides weights: processes that share a row are like others for it."""


@dataclass(frozen=True)
class Mesh:
    """A run's processes, in two views of the same ranks."""

    axes: Axes
    root: DeviceMesh
    """`dp_replicate` × `dp_shard_cp` × `tp`: what weights are divided over. Sharded tensors belong to slices of it."""
    whole: DeviceMesh
    """`dp_replicate` × `dp_shard` × `cp` × `tp`: for groups along `dp_shard` or `cp` alone."""

    @property
    def weights(self) -> DeviceMesh:
        """The part for `fully_shard`: one axis, or two (copies × shards) with `dp_replicate_size`."""
        if self.axes.replicate > 1:
            return self.root["dp_replicate", WEIGHTS]
        return self.root[WEIGHTS]

    @property
    def tensor(self) -> DeviceMesh:
        """The processes that share this one's matrix products."""
        return self.root["tp"]

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes that differ from this one along `axis` alone (`dp_replicate`, `dp_shard`, `cp`, `tp`)."""
        return (self.root if axis == WEIGHTS else self.whole)[axis].get_group()

    @property
    def place(self) -> tuple[int, int, int, int]:
        """This process's coordinates on the four axes."""
        return self.axes.coordinates(dist.get_rank())

    @property
    def data_rank(self) -> int:
        """Which rows this process gets; the same for all that share rows or products."""
        return self.axes.data_rank(dist.get_rank())


@cache
def build_mesh(axes: Axes, device: str) -> Mesh:
    """The mesh of the whole run, on `cuda` or `cpu`. Every process has to call it: each axis becomes a group, once."""
    sizes = (axes.replicate, axes.weight_shards, axes.tensor)
    root = init_device_mesh(device, sizes, mesh_dim_names=("dp_replicate", WEIGHTS, "tp"))
    whole = root._unflatten(1, (axes.shard, axes.context), ("dp_shard", "cp"))
    return Mesh(axes, root, whole)
