"""Which rank and worker this process is: asked when an iteration begins, never earlier."""

from __future__ import annotations

import os
import sys
from multiprocessing import util
from typing import Any, Final, NamedTuple

from torch.utils.data import get_worker_info

from s3loader import ConfigError
from s3loader.adapters import Topology, find_ranks

__all__ = ["Ranks", "current_topology", "end_with_parent", "is_shared_out_by_caller"]

_SHARE_OUT: Final = {"DataLoaderDispatcher", "IterableDatasetShard"}
"""Classes of Accelerate and transformers that read everything and give each process its part."""


class Ranks(NamedTuple):
    """What the user said of ranks; anything but None beats what is found."""

    rank: int | None = None
    world_size: int | None = None
    device_mesh: Any = None
    mesh_dim: str | None = None

    def resolve(self) -> tuple[int, int]:
        """(rank, world size): arguments, then the device mesh, then what is found: `torch.distributed`, ``RANK`` and
        ``WORLD_SIZE``, a Slurm job step.

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
        found = find_ranks()
        return found.rank, found.world_size

    def refuse_given(self) -> None:
        """Refuse ranks that the user gave, where another shares out what the dataset gives.

        Raises:
            ConfigError: there are some.
        """
        if (self.rank, self.world_size, self.device_mesh) != (None, None, None):
            raise ConfigError(
                "Accelerate shares out what the dataset gives, so ranks given to the dataset would share it out twice",
                hint="leave rank, world_size and device_mesh out, or use prepare_loader(accelerator, S3DataLoader(...))",
            )

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


_ends_with_parent: set[int] = set()
"""Process ids of workers that are prepared already; a set, since a forked child inherits it."""


def end_with_parent() -> None:
    """A DataLoader worker whose training process was killed will end, though nobody reads what it still has to give.

    At its end a worker waits until its last batches are read. The other workers hold the reading end of its pipe too, so
    where the training process is gone nothing wakes it, and its memory and standard output stay taken for ever.
    """
    if get_worker_info() is not None and os.getpid() not in _ends_with_parent:
        _ends_with_parent.add(os.getpid())
        util.Finalize(None, _end_orphan, (os.getppid(),), exitpriority=100)  # before the queue's own, which waits


def _end_orphan(parent: int) -> None:
    if os.getppid() != parent:
        os._exit(1)


def is_shared_out_by_caller() -> bool:
    """Whether this is asked on behalf of Accelerate or transformers, for a loader that shares out by itself.

    They do not tell the dataset, which would share out a second time and lose samples; so it looks who calls. Forked workers
    inherit the calls of their parent.
    """
    if "accelerate" not in sys.modules and "transformers" not in sys.modules:
        return False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_qualname.partition(".")[0] in _SHARE_OUT:
            module = frame.f_globals.get("__name__", "")
            if module.partition(".")[0] in ("accelerate", "transformers"):
                return True
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    return False
