"""`S3IterableDataset`: the loader as a torch `IterableDataset`, right in any `DataLoader`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from s3loader.errors import ConfigError, S3LoaderError, SampleError
from s3loader.loader import (
    Batch,
    FromSources,
    Loader,
    LoaderKeywords,
    LoaderOptions,
    LoaderStats,
    Quarantined,
    Source,
    open_source,
)
from s3loader.loader.position import checked_epoch
from s3loader.loader.samples import batch_error
from s3loader.plan import Plan, PlanState, Schedule, Topology
from s3loader_torch.compat import DatasetKeywords, without_connector
from s3loader_torch.convert import ReturnType, convert_batch, pack, to_return_type, to_tensors, torch_collate
from s3loader_torch.topology import Ranks, current_topology

__all__ = ["S3IterableDataset"]

_FLAT_BATCH = 32
"""Neighbours in the sequence that one worker takes where torch makes the batches."""


class Delivery(NamedTuple):
    """What a worker of `S3DataLoader` hands over with each batch."""

    consumed: int
    data: Any
    worker: int
    stats: LoaderStats
    quarantine: tuple[Quarantined, ...]
    error: S3LoaderError | None
    empty: bool = False
    """All samples of this step were skipped; there is no batch."""


def _shared(values: list[int]) -> torch.Tensor:
    tensor = torch.tensor(values, dtype=torch.int64)
    tensor.share_memory_()  # type: ignore[no-untyped-call]  # torch does not annotate it
    return tensor


class _Options(LoaderKeywords, DatasetKeywords, total=False):
    pass


class S3IterableDataset(IterableDataset[Any], FromSources):
    """Samples or batches of a dataset, in one exactly resumable order, shared out to ranks and workers.

    With `batch_size` it yields whole batches: use ``DataLoader(dataset, batch_size=None, num_workers=k)``, or `S3DataLoader`,
    which also counts what was delivered. Without it, it yields single samples for ``DataLoader(dataset, batch_size=...)``;
    torch does not tell a dataset its batch size, so such a run has no exact state to resume from, and workers share blocks.

    `from_prefix` and `from_objects` take s3torchconnector's keywords, and do as it does unless told otherwise: readers, in the
    order listed.

    Ranks are found when an iteration begins: arguments, device mesh, `torch.distributed`, or ``RANK`` and ``WORLD_SIZE``.

    Args:
        dataset: What `s3loader.open_dataset` returns, or a URL for it.
        batch_size: Samples per batch and rank.
        rank: This rank, if it is not to be found by itself.
        world_size: Number of ranks.
        device_mesh: A `DeviceMesh`; peers along other than its data-parallel dimension get the same samples.
        mesh_dim: Name of that dimension.
        return_type: What raw bytes become: ``"tensor"``, ``"bytes"``, ``"reader"`` or ``"sample"``.
        enable_sharding: False gives every rank and worker all samples, as s3torchconnector does by default.
        options: See `s3loader.LoaderOptions`; with a URL also those of `s3loader.open_dataset` and `open_store`.

    Raises:
        ConfigError: an option is unusable.
    """

    object_defaults: ClassVar[Mapping[str, Any]] = {"return_type": "reader", "shuffle": "none"}

    def __init__(
        self,
        dataset: Source,
        *,
        batch_size: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        device_mesh: Any = None,
        mesh_dim: str | None = None,
        return_type: ReturnType = "tensor",
        enable_sharding: bool = True,
        **options: Unpack[_Options],
    ) -> None:
        super().__init__()
        self.source, rest = open_source(dataset, without_connector(options))
        self.batch_size = batch_size
        self.return_type: ReturnType = return_type
        self._ranks = Ranks(rank, world_size, device_mesh, mesh_dim)
        self._sharded = enable_sharding
        bucket = self.source.store.url.partition("://")[2].partition("/")[0]
        transform, collate = rest.get("transform"), rest.get("collate")
        convert = to_return_type(return_type, transform, bucket)
        # Where no function of the user's sees single samples, a whole batch is converted at a time.
        self._late = transform is None and return_type != "reader" and not callable(collate)
        self._options = {
            **rest,
            "batch_size": _FLAT_BATCH if batch_size is None else batch_size,
            "transform": None if self._late else convert,
            "collate": torch_collate(collate),
            "transform_key": return_type == "reader",
        }
        LoaderOptions.of(self._options)
        # Epoch and start of the next iteration, seen by workers that live already.
        self._shared = _shared([0, 0])
        self._state: PlanState | None = None
        self._first_step = 0
        self._next_step = 0
        self._allow_changed = False
        self._live: Loader | None = None
        self._planned: tuple[Any, Plan] | None = None
        self._begun = (0, 0)
        self._deliveries = False
        self._found: tuple[int, int] | None = None

    # -- epochs and state --------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, also in workers that live already. A loaded position in it is kept."""
        if checked_epoch(epoch) != int(self._shared[0]):
            self._shared[0], self._shared[1] = epoch, 0
            self._first_step = 0

    @property
    def epoch(self) -> int:
        """The epoch that `set_epoch` or a loaded state chose."""
        return int(self._shared[0])

    @property
    def start(self) -> int:
        """Positions of that epoch that are consumed before the next iteration begins."""
        return int(self._shared[1])

    def begin_at(self, epoch: int, consumed: int, *, apart: bool = False) -> None:
        """Choose epoch and start of the next iteration, also in workers that live already; `apart`: not in those."""
        if apart:  # another iteration's workers may just be starting
            self._shared = _shared([epoch, consumed])
        self._shared[0], self._shared[1] = epoch, consumed
        self._first_step = 0

    def for_deliveries(self) -> S3IterableDataset:
        """The same dataset with an epoch of its own, yielding `Delivery` in place of batches: for `S3DataLoader`."""
        twin = copy.copy(self)
        twin._shared = _shared(self._shared.tolist())
        twin._deliveries = True
        return twin

    def load_state_dict(self, state: Mapping[str, Any], *, allow_changed: bool = False) -> None:
        """Begin the next iterations at `state`. Call it before workers are started, or use `S3DataLoader`.

        Raises:
            StateMismatchError: the state belongs to other data, seed or options.
        """
        loaded, before = PlanState.from_dict(state), (self._state, self._allow_changed)
        self._state, self._allow_changed = loaded, allow_changed
        try:
            size = self.loader(self.whole_rank()).plan.size  # refuses a wrong state here, not in a worker
        except S3LoaderError:
            self._state, self._allow_changed = before
            raise
        self.begin_at(loaded.epoch, min(loaded.consumed, size))
        self._first_step = int(state.get("worker_step", 0))

    def state_dict(self) -> dict[str, Any]:
        """Where this process stands in the sequence: for `torchdata`'s StatefulDataLoader, which asks each worker.

        In a plain `DataLoader` the training process cannot know what its workers have delivered: use `state_after`,
        or `S3DataLoader`.
        """
        self._need_batch_size()
        loader = self._live if self._live is not None else self.loader(self.whole_rank())
        if get_worker_info() is None or self._live is None:
            return loader.state_dict()
        epoch, consumed = self._begun
        state = loader.plan.state(epoch, consumed).as_dict()
        return {**state, "worker_step": self._next_step}

    def state_after(self, batches: int) -> dict[str, Any]:
        """The state when this rank has got `batches` batches of the current epoch (since the loaded state, if any)."""
        self._need_batch_size()
        plan, epoch = self.plan, self.epoch
        schedule = self.schedule(epoch, self.start)
        return plan.state(epoch, plan.base(epoch, schedule.consumed_after(batches))).as_dict()

    def schedule(self, epoch: int, consumed: int) -> Schedule:
        """How an epoch, from `consumed` on, is cut into batches for all ranks."""
        size, tail = self._options["batch_size"], self._options.get("tail", "short")
        return self.plan.schedule(epoch, size, world_size=self.whole_rank().world_size, tail=tail, consumed=consumed)

    def _need_batch_size(self) -> None:
        if self.batch_size is None:
            raise ConfigError(
                "an exact state needs the dataset to know the batch size",
                hint="give S3IterableDataset(..., batch_size=B) and DataLoader(..., batch_size=None)",
            )

    def __len__(self) -> int:
        """Batches (without `batch_size`: samples) of a whole epoch for this rank, over all its workers."""
        rank, schedule = self.whole_rank().rank, self.schedule(self.epoch, self.start)
        steps = schedule.steps(rank)
        return steps if self.batch_size is not None else int(schedule.positions(rank, range(steps))[1].sum())

    # -- iteration ---------------------------------------------------------------------------

    def whole_rank(self) -> Topology:
        """The topology of the whole rank, workers not told apart."""
        return Topology(*self._resolve())

    def _resolve(self) -> tuple[int, int]:
        if not self._sharded:
            return 0, 1
        return self._found if self._found is not None else self._ranks.resolve()

    def _to_pass_on(self) -> tuple[int, int] | None:
        """Ranks that a spawned worker could not find itself."""
        known_here = self._ranks.device_mesh is not None or (dist.is_available() and dist.is_initialized())
        return self._resolve() if self._sharded and known_here else self._found

    @property
    def plan(self) -> Plan:
        """The order of samples for the ranks there are now."""
        key = (self._resolve()[1] if self._sharded else 1, self._state, self._allow_changed)
        if self._planned is None or self._planned[0] != key:
            self._planned = (key, self.loader(self.whole_rank()).plan)
        return self._planned[1]

    def loader(self, topology: Topology) -> Loader:
        """The engine for one process, at the current epoch and start."""
        loader = Loader(
            self.source,
            rank=topology.rank,
            world_size=topology.world_size,
            worker=topology.worker,
            workers=topology.workers,
            epoch=int(self._shared[0]),
            first_epoch=0,
            **self._options,
        )
        if self._state is not None:
            loader.load_state_dict(self._state.as_dict(), allow_changed=self._allow_changed)
        loader.position.load(int(self._shared[0]), int(self._shared[1]))
        return loader

    def __iter__(self) -> Iterator[Any]:
        topology = current_topology(*self._resolve()) if self._sharded else Topology()
        loader = self._live = self.loader(topology)
        in_worker = get_worker_info() is not None
        self._begun = (loader.epoch, loader.position.start)
        # Taken, not only read: another iterator over this dataset begins at its own first step.
        first_step, self._first_step = self._first_step, 0
        self._next_step = first_step
        # torch asks the workers in turn, so a step of which nothing is left must take its turn too.
        batches = loader.iter_batches(first_step=first_step, with_empty=self._deliveries)
        noted = 0
        try:
            while True:
                try:
                    batch = next(batches, None)
                    none = batch is None or batch.empty or self.batch_size is None
                    data = None if batch is None or none else self._converted(batch, in_worker)
                except S3LoaderError as error:
                    if not self._deliveries:
                        raise
                    # torch would rebuild the exception from its text alone and lose what it knows.
                    yield Delivery(0, None, topology.worker, loader.stats, tuple(loader.quarantine[noted:]), error)
                    return
                new = tuple(loader.quarantine[noted:])
                noted = len(loader.quarantine)
                if batch is None:
                    return
                self._next_step = batch.step + topology.workers
                if self.batch_size is None:
                    yield from convert_batch(batch.data, self._plain)
                    continue
                if self._deliveries:
                    yield Delivery(batch.consumed, data, topology.worker, loader.stats, new, None, batch.empty)
                else:
                    yield data
        finally:
            batches.close()
            self._next_step = 0

    @property
    def _plain(self) -> ReturnType:
        """The return type for a plain DataLoader: it takes a memoryview for a sequence, and makes a list of ints of it."""
        return "bytes" if self.return_type == "sample" and not self._deliveries else self.return_type

    def _converted(self, batch: Batch, in_worker: bool) -> Any:
        data = batch.data
        if in_worker:
            try:
                return pack(to_tensors(data), self.return_type)
            except SampleError as error:
                raise batch_error("sending", error, self.source, batch.epoch, batch.samples, batch.positions) from error
        return convert_batch(data, self._plain) if self._late else to_tensors(data)

    def __getstate__(self) -> dict[str, Any]:
        """Pickled when spawned workers start: they cannot ask `torch.distributed`, so the ranks go with it."""
        state = {name: value for name, value in vars(self).items() if name not in ("_live", "_planned")}
        state["_found"] = self._to_pass_on()
        state["_ranks"] = self._ranks._replace(device_mesh=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._live = self._planned = None
