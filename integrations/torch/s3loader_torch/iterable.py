"""`S3IterableDataset`: the loader as a torch `IterableDataset`, right in any `DataLoader`."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, TypeAlias, Unpack, cast

import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from s3loader import (
    Batch,
    Collate,
    ConfigError,
    Explanation,
    Loader,
    LoaderOptions,
    Place,
    Plan,
    S3LoaderError,
    SampleError,
    StateMismatchError,
)
from s3loader.adapters import (
    DatasetSource,
    FromSources,
    LoaderKeywords,
    PlanState,
    Schedule,
    Tail,
    Topology,
    batch_error,
    checked,
    make_collate,
    open_source,
)
from s3loader_torch.compat import DatasetKeywords, without_connector
from s3loader_torch.convert import ReturnType, convert_batch, pack_batch, to_return_type, to_tensors, torch_collate
from s3loader_torch.iteration import Iteration, Progress
from s3loader_torch.start import SharedStart, iteration_name
from s3loader_torch.topology import Ranks, current_topology, end_with_parent, is_shared_out_by_caller

__all__ = ["BatchOf", "S3IterableDataset", "Yields"]

Yields: TypeAlias = Literal["batches", "samples"]

_FLAT_BATCH = 32
"""Neighbours in the sequence that one worker takes where torch makes the batches."""


class _Options(LoaderKeywords, DatasetKeywords, total=False):
    pass


@checked
class S3IterableDataset(IterableDataset[Any], FromSources):
    """Batches or samples of a dataset, in one exactly resumable order, shared out to ranks and workers.

    With `batch_size` it gives whole batches: use ``DataLoader(dataset, batch_size=None, num_workers=k)``, or `S3DataLoader`,
    which also counts what was delivered. With ``yields="samples"`` it gives single samples, for who makes batches of the same
    size of them, ``DataLoader(dataset, batch_size=B)``; these are then the same batches. Without a `batch_size` it gives single
    samples for batches of any size: workers share blocks, and the number of batches is not known before.

    In a plain `DataLoader` every iteration is of the epoch that `set_epoch` chose. A loaded state is where one iteration
    begins; those after it are whole. (torch's seed of an iteration tells workers which one they are of.)

    `from_prefix` and `from_objects` take s3torchconnector's keywords, and do as it does unless told otherwise: readers, in the
    order listed.

    Ranks are found when an iteration begins: arguments, device mesh, `torch.distributed`, or ``RANK`` and ``WORLD_SIZE``. For
    Accelerate and transformers, which share out themselves what a dataset gives, it gives everything.

    Args:
        dataset: What `s3loader.open_dataset` returns, or a URL for it.
        batch_size: Samples per batch and rank.
        yields: ``"batches"``, or ``"samples"`` where the DataLoader makes batches of `batch_size`. Default: what `batch_size`
            says.
        rank: This rank, if it is not to be found by itself.
        world_size: Number of ranks.
        device_mesh: A `DeviceMesh`; peers along other than its data-parallel dimension get the same samples.
        mesh_dim: Name of that dimension.
        return_type: What raw bytes become: ``"tensor"``, ``"bytes"``, ``"reader"`` or ``"sample"``.
        enable_sharding: False gives every rank and worker all samples, as s3torchconnector does by default.
        options: The fields of `s3loader.LoaderOptions` (`on_break` is `S3DataLoader`'s); with a URL also those of
            `s3loader.open_dataset` and `open_store`.

    Raises:
        ConfigError: an option is unusable.
    """

    object_defaults: ClassVar[Mapping[str, Any]] = {"return_type": "reader", "shuffle": "none"}

    def __init__(
        self,
        dataset: DatasetSource,
        *,
        batch_size: int | None = None,
        yields: Yields | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        device_mesh: Any = None,
        mesh_dim: str | None = None,
        return_type: ReturnType = "tensor",
        enable_sharding: bool = True,
        **options: Unpack[_Options],
    ) -> None:
        super().__init__()
        self.source, self._given = open_source(dataset, without_connector(options))
        self.batch_size = batch_size
        self.yields: Yields = yields or ("samples" if batch_size is None else "batches")
        self.gives: Literal["batches", "samples", "deliveries"] = self.yields
        self.return_type: ReturnType = return_type
        self._ranks = Ranks(rank, world_size, device_mesh, mesh_dim)
        self._sharded = enable_sharding
        self._refuse_odd_options(yields)
        self._settle()
        self._start = SharedStart()
        self._state: PlanState | None = None
        self._allow_changed = False
        self._own: tuple[int, Progress] | None = None
        """The process that a worker's own state was loaded in, and what it says."""
        self._begun = 0
        self._live: Iteration | None = None
        self._planned: tuple[Any, Loader] | None = None
        self._found: tuple[int, int] | None = None

    def _refuse_odd_options(self, yields: Any) -> None:
        if yields not in ("batches", "samples", None):
            raise ConfigError(f"unknown yields {yields!r}", hint='use "batches" or "samples"')
        if yields == "batches" and self.batch_size is None:
            raise ConfigError('yields="batches" needs a batch size', hint="give batch_size=")
        if self.yields == "samples" and self._given.get("collate") is not None:
            raise ConfigError(
                "collate= makes a batch, and this dataset yields samples",
                hint="give the function to the DataLoader, as collate_fn=, or a batch_size to the dataset",
            )
        if "on_break" in self._given:
            raise ConfigError(
                "a plain DataLoader keeps the epoch that set_epoch chose, whatever was broken off",
                hint="give on_break= to S3DataLoader",
            )

    def _settle(self) -> None:
        """Options of the engine, for what this is to give."""
        bucket = self.source.store.url.partition("://")[2].partition("/")[0]
        transform, collate = self._given.get("transform"), self._given.get("collate")
        convert = to_return_type(self.return_type, transform, bucket)
        # Where no function of the user's sees single samples, a whole batch is converted at a time.
        self._late = transform is None and self.return_type != "reader" and not callable(collate)
        self._options = {
            **self._given,
            "batch_size": self.block,
            "transform": None if self._late else convert,
            "collate": None if self.gives == "samples" else torch_collate(collate),
            "transform_key": self.return_type == "reader",
        }
        LoaderOptions.of(self._options)

    @property
    def block(self) -> int:
        """Neighbours in the sequence that one worker takes at a time."""
        return _FLAT_BATCH if self.batch_size is None else self.batch_size

    @property
    def tail(self) -> Tail:
        """What happens to samples that fill no batch on every rank: ``"drop"``, ``"pad"`` or ``"short"``."""
        return cast("Tail", self._options.get("tail", "short"))

    # -- twins -------------------------------------------------------------------------------

    def _twin(self, **changes: Any) -> S3IterableDataset:
        """The same dataset with changes, and an epoch and start of its own."""
        twin = copy.copy(self)
        vars(twin).update(changes)
        twin._start = self._start.copy()
        twin._live = twin._planned = None
        twin._settle()
        return twin

    def for_deliveries(self) -> S3IterableDataset:
        """The same dataset, yielding `Delivery` in place of batches: for `S3DataLoader`."""
        return self._twin(gives="deliveries")

    def for_samples(self) -> S3IterableDataset:
        """The same dataset, yielding single samples: what a `DataLoader` calls its dataset."""
        return self._twin(yields="samples", gives="samples")

    def in_batches(self, batch_size: int, **options: Any) -> S3IterableDataset:
        """The same dataset in batches of this size, and with other options of the loader."""
        return self._twin(batch_size=batch_size, yields="batches", gives="batches", _given={**self._given, **options})

    @property
    def collate_fn(self) -> BatchOf:
        """Makes of a list of samples what this dataset, or the one it is a twin of, calls a batch."""
        return BatchOf(self._given.get("collate"))

    # -- epochs and state --------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iterations, also in workers that live already. A loaded position in it is kept."""
        before = self._start.chosen
        self._start.set_epoch(epoch)
        if self._start.chosen != before:
            self._own = self._live = None

    @property
    def epoch(self) -> int:
        """The epoch of the next iteration."""
        return self._start.epoch

    @property
    def begins(self) -> tuple[int, int]:
        """Epoch and start in it, as they were chosen or loaded last."""
        return self._start.chosen

    def begin_at(self, epoch: int, consumed: int, *, apart: bool = False) -> None:
        """Choose epoch and start of the next iteration, also in workers that live already; `apart`: not in those."""
        if apart:  # another iteration's workers may just be starting
            self._start = SharedStart()
        self._start.choose(epoch, consumed)

    def load_state_dict(self, state: Mapping[str, Any], *, allow_changed: bool = False) -> None:
        """Begin the next iteration at `state`. Call it before workers are started, or use `S3DataLoader`.

        Raises:
            StateMismatchError: the state belongs to other data, seed or options; or to one worker of several.
        """
        workers, in_worker = int(state.get("workers", 1)), get_worker_info() is not None
        if workers > 1 and not in_worker:
            raise StateMismatchError(
                f"this is the state of one of {workers} workers",
                hint="give the StatefulDataLoader the state that it returned, with as many workers",
                differs=["workers"],
            )
        loaded = self.adopt(state, allow_changed=allow_changed)
        progress = Progress.of(state, loaded)
        self._own = (os.getpid(), progress) if in_worker or progress.step or progress.samples else None
        self._live = None
        if not in_worker:
            epoch, consumed = loaded.epoch, min(loaded.consumed, self.plan.size)
            over = consumed > 0 and self._own is None and not self.is_left(epoch, consumed)
            self._start.choose(epoch, consumed, over=over)

    def adopt(self, state: Mapping[str, Any], *, allow_changed: bool = False) -> PlanState:
        """Take the order from `state`, but no position.

        Raises:
            StateMismatchError: the state belongs to other data, seed or options.
        """
        loaded, before = PlanState.from_dict(state), (self._state, self._allow_changed)
        self._state, self._allow_changed = loaded, allow_changed
        try:
            self._whole_now()  # refuses a wrong state here, not in a worker
        except S3LoaderError:
            self._state, self._allow_changed = before
            raise
        return loaded

    def restored(self, epoch: int, name: int) -> None:
        """An iteration was restored by itself: a chosen start is void, and the iterations after it are of its epoch."""
        self._own = None
        self._start.restored(epoch, name)

    def state_dict(self) -> dict[str, Any]:
        """Where this process stands in the sequence: for `torchdata`'s StatefulDataLoader, which asks each worker.

        Raises:
            ConfigError: batches come from the workers of a plain `DataLoader`, and this process cannot know how many of them
                have arrived: use `state_after`, or `S3DataLoader`.
        """
        if self._live is not None:
            return self._live.state_dict()
        if self._start.taken and get_worker_info() is None:
            raise ConfigError(
                "workers have begun to read, and the training process cannot know what they have delivered",
                hint="use S3DataLoader, which counts; or state_after(batches), with batch_size= given to the dataset",
            )
        if self._own is not None and self._own[0] == os.getpid():
            _, (epoch, start, step, samples) = self._own
            own = {"worker_step": step, **({"worker_samples": samples} if samples else {})}
            return {**self.plan.state(epoch, start).as_dict(), **own}
        return self.plan.state(*self._start.chosen).as_dict()

    def state_after(self, batches: int) -> dict[str, Any]:
        """The state when this rank has got `batches` batches of the iteration that began last.

        After a state was loaded or an epoch chosen it is that of the next iteration.

        Raises:
            ConfigError: the dataset does not know the batch size.
        """
        if self.batch_size is None:
            raise ConfigError(
                "an exact state needs the dataset to know the batch size",
                hint='give S3IterableDataset(..., batch_size=B), and yields="samples" where the DataLoader makes the batches',
            )
        if not batches and not self._start.taken:
            return self.plan.state(*self._start.chosen).as_dict()
        epoch, start = self._start.last
        return self.plan.state(epoch, self.plan.base(epoch, self.schedule(epoch, start).consumed_after(batches))).as_dict()

    def schedule(self, epoch: int, consumed: int) -> Schedule:
        """How an epoch, from `consumed` on, is cut into batches for all ranks."""
        world_size = self.whole_rank().world_size
        return self.plan.schedule(epoch, self.block, world_size=world_size, tail=self.tail, consumed=consumed)

    def is_left(self, epoch: int, consumed: int) -> bool:
        """Whether any rank gets a batch of `epoch` behind `consumed` positions of it."""
        return self.schedule(epoch, consumed).steps(0) > 0  # the first rank is the last to get none

    def __len__(self) -> int:
        """Batches (or samples, as it yields them) of a whole epoch for this rank, over all its workers.

        Raises:
            TypeError: the batch size is not known here. How many batches a DataLoader makes of the samples depends on it and
                on the workers, and a wrong number ends epochs early.
        """
        if self.batch_size is None:
            raise TypeError(
                "an S3IterableDataset that does not know the batch size has no length: "
                'give it batch_size=, and yields="samples" where the DataLoader makes the batches'
            )
        rank, schedule = self.whole_rank().rank, self.schedule(self.epoch, 0)
        steps = schedule.steps(rank)
        return steps if self.gives != "samples" else int(schedule.positions(rank, range(steps))[1].sum())

    # -- ranks and order ---------------------------------------------------------------------

    def whole_rank(self) -> Topology:
        """The topology of the whole rank, workers not told apart."""
        return Topology(*self._resolve())

    def _resolve(self) -> tuple[int, int]:
        if not self._sharded:
            return 0, 1
        if is_shared_out_by_caller():
            self._ranks.refuse_given()
            return 0, 1
        return self._found if self._found is not None else self._ranks.resolve()

    def _to_pass_on(self) -> tuple[int, int] | None:
        """Ranks that a spawned worker could not find itself."""
        known_here = self._ranks.device_mesh is not None or (dist.is_available() and dist.is_initialized())
        return self._resolve() if self._sharded and known_here else self._found

    @property
    def plan(self) -> Plan:
        """The order of samples for the ranks there are now."""
        return self._whole.plan

    @property
    def _whole(self) -> Loader:
        """The engine of the whole rank, which nothing is read with."""
        key = (self._resolve()[1] if self._sharded else 1, self._state, self._allow_changed)
        if self._planned is None or self._planned[0] != key:
            self._planned = (key, self._whole_now())
        return self._planned[1]

    def _whole_now(self) -> Loader:
        loader = self.loader(self.whole_rank(), self._start.epoch, 0)
        _ = loader.plan  # refuses a wrong state
        return loader

    # -- provenance --------------------------------------------------------------------------

    def where(self, position: int, *, epoch: int | None = None) -> Place:
        """What stands at a position of the sequence, without running anything.

        Raises:
            PlanError: there is no such position.
        """
        return self._whole.where(position, epoch=self.epoch if epoch is None else epoch)

    def find(self, key: str, *, epoch: int | None = None) -> tuple[int, int]:
        """(step, rank) at which the sample with this key comes in a whole epoch; (-1, -1) if never.

        Raises:
            ConfigError: the dataset does not know the batch size.
            PlanError: there is no such sample.
        """
        if self.batch_size is None:
            raise ConfigError("steps are batches, and this dataset does not know their size", hint="give batch_size=")
        return self._whole.find(key, epoch=self.epoch if epoch is None else epoch)

    def explain(self, *, workers: int = 1, price_per_1000_gets: float = 0.0004, price_per_gb: float = 0.0) -> Explanation:
        """What an epoch costs over all ranks: requests, bytes, memory, price, found by a dry run of the planner.

        Args:
            workers: Processes per rank that read.
            price_per_1000_gets: Of the store; the default is S3 Standard's in us-east-1, in dollars.
            price_per_gb: Of traffic.
        """
        return self._whole.explain(workers=workers, price_per_1000_gets=price_per_1000_gets, price_per_gb=price_per_gb)

    # -- iteration ---------------------------------------------------------------------------

    def loader(self, topology: Topology, epoch: int, start: int) -> Loader:
        """The engine for one process, for one iteration."""
        loader = Loader(
            self.source,
            rank=topology.rank,
            world_size=topology.world_size,
            worker=topology.worker,
            workers=topology.workers,
            epoch=epoch,
            first_epoch=0,
            **self._options,
        )
        if self._state is not None:
            loader.load_state_dict(self._state.as_dict(), allow_changed=self._allow_changed)
        loader.cursor.load(epoch, start)
        return loader

    def __iter__(self) -> Iterator[Any]:
        """An iteration begins, of this process or this worker."""
        end_with_parent()
        topology = current_topology(*self._resolve()) if self._sharded else Topology()
        name = iteration_name(self._begun)
        self._begun += 1
        if self._own is not None and self._own[0] == os.getpid():
            progress = self._own[1]
            self.restored(progress.epoch, name)
        else:
            progress = Progress(*self._start.take(name))
        self._live = Iteration(self, topology, progress, name)
        return self._live

    def converted(self, batch: Batch) -> Any:
        """What is given of a batch of the engine."""
        data = batch.data
        # A plain DataLoader takes a memoryview for a sequence, and makes a list of ints of it.
        kind = "bytes" if self.return_type == "sample" and self.gives != "deliveries" else self.return_type
        if self.gives == "samples":
            return convert_batch(data, kind) if self._late or not callable(self._given.get("collate")) else data
        if get_worker_info() is not None:
            try:
                return pack_batch(data, kind if self._late else None)
            except SampleError as error:
                raise batch_error("sending", error, self.source, batch.epoch, batch.samples, batch.positions) from error
        return convert_batch(data, kind) if self._late else to_tensors(data)

    def __getstate__(self) -> dict[str, Any]:
        """Pickled when spawned workers start: they cannot ask `torch.distributed`, so the ranks go with it."""
        state = {name: value for name, value in vars(self).items() if name not in ("_live", "_planned")}
        state["_found"] = self._to_pass_on()
        state["_ranks"] = self._ranks._replace(device_mesh=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._live = self._planned = None


class BatchOf:
    """A `collate_fn` that makes batches as the dataset does. Picklable if its function is."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate
        """As the dataset was told."""
        self._function = make_collate(torch_collate(collate))

    def __call__(self, samples: list[Any]) -> Any:
        """A batch of `samples`."""
        return samples if self._function is None else to_tensors(self._function(samples))
