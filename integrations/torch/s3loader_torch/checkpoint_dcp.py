"""`torch.distributed.checkpoint` on s3loader's checkpoints: same calls, but atomic, verified, and without pickle in the store.

What is saved is an ordinary s3loader checkpoint: tensors in safetensors files under their paths in the state dict, the rest
as JSON. `s3loader.checkpoint` reads it too, and DCP reads what a `CheckpointManager` has saved.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from s3loader.checkpoint import Checkpoint, CheckpointManager, CheckpointOptions, KeepPolicy, LatestN, dcp
from s3loader.checkpoint.dcp import PartWriter, Ticket, Writing
from s3loader.checkpoint.format.records import box_of
from s3loader.checkpoint.locating import telling
from s3loader.checkpoint.meeting import Box
from s3loader.checkpoint.protocol.session import Identity, identify
from s3loader.checkpoint.state import tree
from s3loader.checkpoint.state.leaves import LeafAdapter, Target, adapter_of_kind
from s3loader.errors import CheckpointError, ConfigError
from s3loader_torch.checkpoint_state import TORCH, torch_dtype

__all__ = ["S3StorageReader", "S3StorageWriter"]


def _done(value: Any) -> Any:
    future: Any = Future()
    future.set_result(value)
    return future


class S3StorageWriter(StorageWriter):
    """A `StorageWriter` for ``torch.distributed.checkpoint.save`` and ``async_save``.

    One conditional write makes the whole checkpoint appear, after every rank's data is durable and the parts tile every
    tensor; a failure on any rank is raised on all and leaves what was there before.

    Args:
        path: Folder of the checkpoint (or of a run, with `step`); ``checkpoint_id`` of the call beats it.
        step: Save as this step of a run, and leave its other steps alone. Default: in the place of what `path` holds.
        keep: Which steps to keep afterwards; default: all where `step` is given, else only the new one.
        region: As in s3torchconnector.
        options: See `CheckpointOptions`.
        world_size: Only with ``use_collectives=False``: how many ranks save together; default: those of the default process
            group. Give it where the save has a smaller group, and 1 with ``no_dist=True`` in a process that has a group.
        job: Only with ``use_collectives=False`` and several ranks: a name for this incarnation of the job, the same on all
            ranks and new at every start; default: what torchrun or Slurm say.
        store_options: Passed on to `open_store`: ``endpoint_url``, ...

    With ``use_collectives=False`` the ranks meet in the store: what several have is still written once, and one conditional
    write still makes all of it appear. Every rank must save then, in the same order.

    What is no tensor must be JSON-like (see `CheckpointManager.save`): nothing is pickled.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        step: int | None = None,
        keep: KeepPolicy | None = None,
        region: str | None = None,
        options: CheckpointOptions | None = None,
        world_size: int | None = None,
        job: str = "",
        **store_options: Any,
    ) -> None:
        super().__init__()
        self.checkpoint_id: str | os.PathLike[str] | None = path
        self._step, self._keep, self._options = step, keep, options
        self._world, self._job = world_size, job
        self._meets: Identity | None = None
        self._store_options = {**store_options, **({"region": region} if region else {})}
        self._writing: Writing | None = None
        self._coordinator = False

    @property
    def _where(self) -> str:
        return str(self.checkpoint_id or "")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """See `StorageWriter.reset`."""
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id
        self._close()

    @telling("save")
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See `StorageWriter.set_up_storage_writer`.

        Raises:
            ConfigError: no path; or ``use_collectives=False`` with several ranks, and no name for the job.
        """
        if self.checkpoint_id is None:
            raise ConfigError("no checkpoint path", hint="pass path=... or checkpoint_id=...")
        self._coordinator = is_coordinator
        self._meets = self._identity(kwargs.get("rank") or 0) if kwargs.get("use_collectives", True) is False else None
        keep = self._keep if self._keep is not None or self._step is not None else LatestN(1)
        manager = CheckpointManager(self.checkpoint_id, keep=keep, options=self._options, **self._store_options)
        self._writing = Writing(manager, self._step)

    @telling("plan")
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """See `StorageWriter.prepare_local_plan`; without collectives, the ranks meet here."""
        if self._meets is None:
            return plan
        if not getattr(plan, "usable", True):
            raise ConfigError(
                "a planner that caches plans gives none to divide among the ranks",
                url=str(self.checkpoint_id),
                hint="enable_plan_caching=False, or use_collectives=True",
            )
        ticket, own = self._need().meet(self._meets, [_box(item) for item in plan.items])
        return replace(plan, items=[plan.items[place] for place in own], storage_data=ticket)

    @telling("plan")
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin the attempt, and tell every rank of it."""
        if self._meets is not None:
            return plans
        tickets = self._need().begin(len(plans))
        return [replace(plan, storage_data=ticket) for plan, ticket in zip(plans, tickets, strict=True)]

    @telling("save")
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """Upload this rank's tensors, then its part manifest."""
        ticket: Ticket = plan.storage_data
        paths: Mapping[str, Sequence[str | int]] = plan.planner_data or {}
        part = self._need().part(ticket)
        try:
            self._collect(plan, planner, part, paths)
            sizes = part.upload()
        except Exception as error:
            if self._meets is not None:  # no collective tells the others
                part.give_up(error)
            raise
        return _done([WriteResult(item.index, sizes.get(item.index.fqn, 0), None) for item in plan.items])

    def _collect(
        self, plan: SavePlan, planner: SavePlanner, part: PartWriter, paths: Mapping[str, Sequence[str | int]]
    ) -> None:
        for item in plan.items:
            fqn = item.index.fqn
            path = list(paths.get(fqn, (fqn,)))
            if item.type == WriteItemType.BYTE_IO:
                part.add_value(fqn, path, _plain_object(planner, item))
            else:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor)
                assert item.tensor_data is not None
                box = item.tensor_data.chunk
                part.add_box(fqn, path, TORCH.source(tensor.detach()), tuple(item.tensor_data.size), tuple(box.offsets))

    @telling("save")
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publish; called by the coordinator when every rank has written."""
        written = {(r.index.fqn, r.index.offset) for rank in results for r in rank}
        planned = {
            (fqn, chunk.offsets)
            for fqn, told in metadata.state_dict_metadata.items()
            if isinstance(told, TensorStorageMetadata)
            for chunk in told.chunks
        }
        lost = {fqn for fqn, offset in planned if (fqn, offset) not in written and (fqn, None) not in written}
        if lost:
            raise CheckpointError(
                f"{len(lost)} tensors were planned and not written: {sorted(lost)[:5]}",
                url=str(self.checkpoint_id),
                hint="the planner's finish_plan must keep every item of the plan",
            )
        if self._meets is not None:
            self._need().publish_or_wait()
        else:
            self._need().publish()
        self._close()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a URL or path we know."""
        return dcp.known_url(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        """See `StorageWriter.storage_meta`."""
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    def _need(self) -> Writing:
        if self._writing is None:
            raise CheckpointError(
                "set_up_storage_writer was not called",
                url=str(self.checkpoint_id),
                hint="pass it to dcp.save(storage_writer=...)",
            )
        return self._writing

    def _identity(self, rank: int) -> Identity:
        world = self._world
        if world is None:
            world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return Identity(rank, world, self._job or identify(os.environ))

    def _close(self) -> None:
        if self._writing is not None:
            self._writing.close()
            self._writing = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writing": None}


def _box(item: WriteItem) -> Box:
    told = item.tensor_data
    if told is None:
        return Box(item.index.fqn, (), (), 0)
    chunk = told.chunk
    size = math.prod(chunk.sizes) * told.properties.dtype.itemsize
    return Box(item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes), size)


def _plain_object(planner: SavePlanner, item: WriteItem) -> Any:
    """The object behind a ``BYTE_IO`` item, which a planner would pickle."""
    lookup = getattr(planner, "lookup_object", None)
    if lookup is None:
        raise CheckpointError(
            f"{type(planner).__name__} gives {item.index.fqn!r} as pickled bytes only",
            hint="derive the planner from DefaultSavePlanner",
        )
    return lookup(item.index)


class S3StorageReader(StorageReader):
    """A `StorageReader` for ``torch.distributed.checkpoint.load``: any tiling, verified, straight into the tensors' memory.

    Args:
        path: What was given to `S3StorageWriter`, or the URL of a run that a `CheckpointManager` has saved.
        step: Which step; default: the newest.
        region: As in s3torchconnector.
        verify: Compare checksums of everything read.
        store_options: Passed on to `open_store`: ``endpoint_url``, ...
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        step: int | None = None,
        region: str | None = None,
        verify: bool = True,
        **store_options: Any,
    ) -> None:
        super().__init__()
        self.checkpoint_id: str | os.PathLike[str] | None = path
        self._step, self._verify = step, verify
        self._store_options = {**store_options, **({"region": region} if region else {})}
        self._manager: CheckpointManager | None = None
        self._found: Checkpoint | None = None
        self._names: dict[str, str] = {}
        self._values: dict[str, Any] = {}

    @property
    def _where(self) -> str:
        return str(self.checkpoint_id or "")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """See `StorageReader.reset`."""
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id
        self._close()

    @telling("load")
    def read_metadata(self) -> Metadata:
        """The checkpoint's index, as DCP wants it.

        Raises:
            CheckpointNotFoundError: there is none.
        """
        if self.checkpoint_id is None:
            raise ConfigError("no checkpoint path", hint="pass path=... or checkpoint_id=...")
        self._close()
        self._manager = CheckpointManager(self.checkpoint_id, **self._store_options)
        self._found = found = self._manager.open(self._step)
        told: dict[str, Any] = {}
        paths: dict[str, tuple[str | int, ...]] = {}
        for entry in dcp.flat_entries(found, self._tensor):
            paths[entry.fqn] = entry.path
            if not entry.is_tensor:
                told[entry.fqn] = BytesStorageMetadata()
                self._values[entry.fqn] = entry.value
                continue
            self._names[entry.fqn] = entry.name
            chunks = found.chunks(entry.name)
            boxes = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in map(box_of, chunks)]
            properties = TensorProperties(dtype=torch_dtype(chunks[0].dtype))
            told[entry.fqn] = TensorStorageMetadata(properties, torch.Size(chunks[0].shape), boxes)
        return Metadata(state_dict_metadata=told, planner_data=paths, storage_data={})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See `StorageReader.set_up_storage_reader`."""

    @telling("plan")
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Note which checkpoint this rank has opened."""
        return replace(plan, storage_data=(self._need().step, self._need().info["attempt"]))

    @telling("plan")
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Make sure that every rank reads the same checkpoint."""
        seen = {plan.storage_data for plan in plans}
        if len(seen) > 1:
            raise CheckpointError(
                f"a new checkpoint was committed while ranks were looking: {sorted(seen)}", hint="pass step=..."
            )
        return plans

    @telling("load")
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        """Read everything the plan wants."""
        wanted: list[tuple[str, Target]] = []
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                buffer = io.BytesIO()
                torch.save(self._values[item.storage_index.fqn], buffer)  # planners unpickle what they get: this is our own
                buffer.seek(0)
                planner.load_bytes(item, buffer)
            else:
                wanted.append((self._names[item.storage_index.fqn], self._target(item, planner)))
        self._need().read(wanted, verify=self._verify)
        return _done(None)

    def _tensor(self, name: str) -> Any:
        first = self._need().chunks(name)[0]
        adapter = adapter_of_kind(dict(tree.leaf_names(self._need().tree))[name])
        return self._need().read([(name, adapter.fresh(first.dtype, tuple(first.shape)))])[name]

    def _target(self, item: ReadItem, planner: LoadPlanner) -> Target:
        place = planner.resolve_tensor(item).detach()
        first = self._need().chunks(self._names[item.storage_index.fqn])[0]
        offset = item.storage_index.offset or torch.Size([0] * len(first.shape))
        begin = tuple(a + b for a, b in zip(offset, item.storage_offsets, strict=True))
        adapter: LeafAdapter = TORCH
        inner = adapter.into(place)
        direct = inner is not None and inner.dtype == first.dtype
        if inner is None or not direct:  # another type: DCP converts
            inner = adapter.fresh(first.dtype, tuple(item.lengths))
        taken = inner

        def finish() -> None:
            value = taken.finish()
            if not direct:
                with torch.no_grad():
                    place.copy_(value)
            planner.commit_tensor(item, place)

        pieces = [piece._replace(offset=begin, shape=tuple(item.lengths)) for piece in taken.pieces]
        return Target(first.dtype, tuple(first.shape), pieces, finish, direct)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a URL or path we know."""
        return dcp.known_url(checkpoint_id)

    def _need(self) -> Checkpoint:
        if self._found is None:
            raise CheckpointError("read_metadata was not called", hint="pass it to dcp.load(storage_reader=...)")
        return self._found

    def _close(self) -> None:
        if self._manager is not None:
            self._manager.close()
        self._manager = self._found = None
        self._names, self._values = {}, {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_manager": None, "_found": None, "_names": {}, "_values": {}}
