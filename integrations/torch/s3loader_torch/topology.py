"""Which rank and worker this process is: asked when an iteration begins, never earlier."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.utils.data import get_worker_info

from s3loader.errors import ConfigError
from s3loader.plan import Topology

__all__ = ["Ranks", "current_topology"]


class Ranks(NamedTuple):
    """What the user said of ranks; anything but None beats what is found."""

    rank: int | None = None
    world_size: int | None = None
    device_mesh: Any = None
    mesh_dim: str | None = None

    def resolve(self) -> tuple[int, int]:
        """(rank, world size): arguments, then the device mesh, then `torch.distributed`, then ``RANK`` and ``WORLD_SIZE``.

        Of a mesh with several dimensions the data-parallel one counts: peers along the others get the same samples.

        Raises:
            ConfigError: only one of rank and world size is known, or the mesh needs a dimension's name.
        """
        if self.rank is not None or self.world_size is not None:
            if self.rank is None or self.world_size is None:
                raise ConfigError("rank and world_size belong together", hint="give both, or neither")
            return self.rank, self.world_size
        if self.device_mesh is not None:
            return self._of_mesh()
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if rank is not None and world_size is not None:
            return int(rank), int(world_size)
        return 0, 1

    def _of_mesh(self) -> tuple[int, int]:
        mesh, name = self.device_mesh, self.mesh_dim
        names = mesh.mesh_dim_names or ()
        if name is None and mesh.ndim > 1:
            name = next((known for known in ("dp", "data", "data_parallel", "dp_shard", "batch") if known in names), None)
            if name is None:
                raise ConfigError(
                    f"which dimension of the device mesh {tuple(names)} is data parallel?", hint="give mesh_dim= its name"
                )
        part = mesh if name is None else mesh[name]
        return part.get_local_rank(), part.size()


def current_topology(rank: int, world_size: int) -> Topology:
    """The topology of this process: a DataLoader worker, or the training process itself."""
    info = get_worker_info()
    return Topology(rank, world_size, info.id, info.num_workers) if info is not None else Topology(rank, world_size)
