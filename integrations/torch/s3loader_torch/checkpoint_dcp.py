"""`torch.distributed.checkpoint` on s3loader's checkpoints: same calls, but atomic, verified, and without pickle in the store.

What is saved is an ordinary s3loader checkpoint: tensors in safetensors files under their paths in the state dict, the rest
as JSON. `s3loader.checkpoint` reads it too, and DCP reads what a `CheckpointManager` has saved.
"""

from __future__ import annotations

import io
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

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

from s3loader import Checkpoint, CheckpointError, CheckpointManager, CheckpointOptions, ConfigError, KeepPolicy, LatestN
from s3loader.adapters import (
    Box,
    Identity,
    LeafAdapter,
    PartWriter,
    Target,
    Ticket,
    Writing,
    adapter_of_kind,
    box_of,
    checked,
    find_ranks,
    flat_entries,
    known_url,
    leaf_names,
    with_error_context,
)
from s3loader_torch.checkpoint_state import TORCH, torch_dtype
from s3loader_torch.compat import manager_keywords

__all__ = ["S3StorageReader", "S3StorageWriter"]

_WRITER: Final = ("path", "step", "keep", "options", "world_size", "job", "overwrite", "thread_count")
_READER: Final = ("path", "step", "verify")


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
        options: A `CheckpointOptions`: budgets in bytes, concurrency, deadlines in seconds; default: its defaults.
        world_size: Only with ``use_collectives=False``: how many ranks save together; default: those of the default process
            group. Give it where the save has a smaller group, and 1 with ``no_dist=True`` in a process that has a group.
        job: Only with ``use_collectives=False`` and several ranks: a name for this incarnation of the job, the same on all
            ranks and new at every start; default: as for `CheckpointManager`.
        overwrite: Whether to replace what is committed: at `step`, or, without one, at `path`. Default: without a `step`
            only. False raises `StepExistsError` before anything is written.
        thread_count: Parts uploaded at a time, as `CheckpointOptions` has it (`concurrency`).
        endpoint: As `endpoint_url`.
        s3client_config: An `S3ClientConfig` of s3torchconnector.
        store_options: Passed on to `open_store`: ``endpoint_url``, ...

    With ``use_collectives=False`` the ranks meet in the store: what several have is still written once, and one conditional
    write still makes all of it appear. Every rank must save then, in the same order.

    What is no tensor must be JSON-like (or made of arrays): nothing is pickled.

    Raises:
        ConfigError: an option that neither we nor `open_store` know, or have a use for; the hint says what to do.
    """

    @checked
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
        overwrite: bool | None = None,
        thread_count: int | None = None,
        endpoint: str | None = None,
        s3client_config: Any = None,
        **store_options: Any,
    ) -> None:
        super().__init__()
        self.checkpoint_id: str | os.PathLike[str] | None = path
        words = {"endpoint": endpoint, "s3client_config": s3client_config, **store_options}
        self._store_options = manager_keywords(type(self).__name__, region, words, _WRITER)
        if thread_count is not None:
            options = (options or CheckpointOptions()).replace(concurrency=thread_count)
        self._step, self._keep, self._options, self._overwrite = step, keep, options, overwrite
        self._world, self._job = world_size, job
        self._meets: Identity | None = None
        self._writing: Writing | None = None
        self._ticket: Ticket | None = None
        self._rank = 0
        self._save_id = uuid.uuid4().hex

    @property
    def _where(self) -> str:
        return str(self.checkpoint_id or "")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save, at `checkpoint_id` where it is given."""
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id
        self._save_id = uuid.uuid4().hex
        self._close()

    @with_error_context("save")
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Open the run; DCP calls it on every rank.

        Raises:
            ConfigError: no path; or ``use_collectives=False`` with several ranks, and no name for the job.
        """
        if self.checkpoint_id is None:
            raise ConfigError("no checkpoint path", hint="pass path=... or checkpoint_id=...")
        self._rank, self._ticket = kwargs.get("rank") or 0, None
        self._meets = self._identity(kwargs.get("rank") or 0) if kwargs.get("use_collectives", True) is False else None
        keep = self._keep if self._keep is not None or self._step is not None else LatestN(1)
        manager = CheckpointManager(
            self.checkpoint_id, keep=keep, rank=0, world_size=1, options=self._options, **self._store_options
        )
        if self._overwrite and self._step is not None and self._meets is not None and self._meets.world > 1:
            manager.close()
            raise ConfigError(
                f"step {self._step} cannot be replaced by ranks that meet in the store",
                url=str(self.checkpoint_id),
                hint="use_collectives=True, or delete the step first: `s3loader ckpt delete`",
            )
        self._writing = Writing(manager, self._step, self._overwrite)

    @with_error_context("plan")
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """This rank's plan, as it is; without collectives, the ranks meet here."""
        if self._meets is None:
            return plan
        if not getattr(plan, "usable", True):
            raise ConfigError(
                "a planner that caches plans gives none to divide among the ranks",
                url=str(self.checkpoint_id),
                hint="enable_plan_caching=False, or use_collectives=True",
            )
        self._ticket, own = self._need().meet(self._meets, [_box(item) for item in plan.items])
        return replace(plan, items=[plan.items[place] for place in own])

    @with_error_context("plan")
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin the attempt. Planners keep what is returned from save to save, so it says nothing of it."""
        if self._meets is not None:
            return plans
        seats = self._need().begin(len(plans))
        return [replace(plan, storage_data=seat) for plan, seat in zip(plans, seats, strict=True)]

    @with_error_context("save")
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """Upload this rank's tensors, then its part manifest."""
        ticket = self._ticket or self._need().ticket(plan.storage_data, self._rank)
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

    @with_error_context("save")
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publish; called by the coordinator when every rank has written."""
        metadata.storage_meta = self.storage_meta()
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
        return known_url(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        """The checkpoint's id; with every save another ``save_id``."""
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self._save_id)

    def _need(self) -> Writing:
        if self._writing is None:
            raise CheckpointError(
                "set_up_storage_writer was not called",
                url=str(self.checkpoint_id),
                hint="pass it to dcp.save(storage_writer=...)",
            )
        return self._writing

    def _identity(self, rank: int) -> Identity:
        if self._world is not None:
            return Identity(rank, self._world, self._job)
        found = find_ranks()
        if found.source != "torch.distributed":  # then DCP counts one rank
            return Identity(rank, 1, self._job)
        return Identity(rank, found.world_size, self._job, found.source)

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
        endpoint: As `endpoint_url`.
        s3client_config: An `S3ClientConfig` of s3torchconnector.
        reader_constructor: Means nothing here: what a plan wants is fetched in large ranges.
        store_options: Passed on to `open_store`: ``endpoint_url``, ...

    Raises:
        ConfigError: an option that neither we nor `open_store` know.
    """

    @checked
    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        step: int | None = None,
        region: str | None = None,
        verify: bool = True,
        endpoint: str | None = None,
        s3client_config: Any = None,
        reader_constructor: Any = None,
        **store_options: Any,
    ) -> None:
        super().__init__()
        self.checkpoint_id: str | os.PathLike[str] | None = path
        self._step, self._verify = step, verify
        words = {"endpoint": endpoint, "s3client_config": s3client_config, **store_options}
        self._store_options = manager_keywords(type(self).__name__, region, words, _READER)
        self._manager: CheckpointManager | None = None
        self._found: Checkpoint | None = None
        self._names: dict[str, str] = {}
        self._values: dict[str, Any] = {}

    @property
    def _where(self) -> str:
        return str(self.checkpoint_id or "")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another restore, of `checkpoint_id` where it is given."""
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id
        self._close()

    @with_error_context("load")
    def read_metadata(self) -> Metadata:
        """The checkpoint's index, as DCP wants it.

        Raises:
            CheckpointNotFoundError: there is none.
        """
        if self.checkpoint_id is None:
            raise ConfigError("no checkpoint path", hint="pass path=... or checkpoint_id=...")
        self._close()
        self._manager = CheckpointManager(self.checkpoint_id, rank=0, world_size=1, **self._store_options)
        self._found = found = self._manager.open(self._step)
        told: dict[str, Any] = {}
        paths: dict[str, tuple[str | int, ...]] = {}
        for entry in flat_entries(found, self._tensor):
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
        return Metadata(
            state_dict_metadata=told,
            planner_data=paths,
            storage_data={},
            storage_meta=StorageMeta(
                checkpoint_id=self.checkpoint_id, save_id=str(found.info["attempt"]), load_id=uuid.uuid4().hex
            ),
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: `read_metadata` has opened the checkpoint."""

    @with_error_context("plan")
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Note which checkpoint this rank has opened."""
        return replace(plan, storage_data=(self._need().step, self._need().info["attempt"]))

    @with_error_context("plan")
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Make sure that every rank reads the same checkpoint."""
        seen = {plan.storage_data for plan in plans}
        if len(seen) > 1:
            raise CheckpointError(
                f"a new checkpoint was committed while ranks were looking: {sorted(seen)}", hint="pass step=..."
            )
        return plans

    @with_error_context("load")
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        """Read everything the plan wants."""
        wanted: list[tuple[str, Target]] = []
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                self._load_value(item, planner)
            else:
                wanted.append((self._names[item.storage_index.fqn], self._target(item, planner)))
        self._need().read(wanted, verify=self._verify)
        return _done(None)

    def _load_value(self, item: ReadItem, planner: LoadPlanner) -> None:
        """Planners unpickle what they get: this is our own."""
        fqn = item.storage_index.fqn
        value, place = self._values[fqn], getattr(planner, "state_dict", {}).get(item.dest_index.fqn)
        if isinstance(place, torch.Tensor):
            raise CheckpointError(
                f"{fqn!r} is a {type(value).__qualname__} in the checkpoint, a tensor in the target",
                hint="give a value of the kind that was saved in its place, and convert what comes back",
            )
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        planner.load_bytes(item, buffer)

    def _tensor(self, name: str) -> Any:
        first = self._need().chunks(name)[0]
        adapter = adapter_of_kind(dict(leaf_names(self._need().tree))[name])
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
        return known_url(checkpoint_id)

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
