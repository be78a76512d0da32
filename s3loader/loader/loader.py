"""`Loader`: batches of a dataset in one exactly resumable order, without any framework."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Required, Unpack

from s3loader.errors import ConfigError, PlanError, StateMismatchError
from s3loader.loader.collate import make_collate
from s3loader.loader.dataset import Dataset
from s3loader.loader.options import LoaderKeywords, LoaderOptions
from s3loader.loader.position import Position
from s3loader.loader.quarantine import Quarantined, QuarantineLog
from s3loader.loader.reading import read_samples
from s3loader.loader.run import RawBatch, Run
from s3loader.loader.samples import Place, SampleWork, batch_error, place_of, refuse_all_skipped
from s3loader.loader.stats import LoaderStats
from s3loader.plan import Explanation, Plan, PlanState, Schedule, Topology, explain_plan
from s3loader.plan.permutation import Int64Array
from s3loader.transfer.diskcache import DiskCache
from s3loader.units import parse_duration, parse_size

__all__ = ["Batch", "Loader"]

_NOTHING: Final = "check the URL, where=, exclude= and skip_steps=; allow_empty=True takes an epoch without a batch"


@dataclass(slots=True, eq=False)
class Batch:
    """One batch and where it comes from."""

    data: Any
    """What `collate` made of the samples."""
    step: int
    """Number of the batch since the iteration began, the same on every rank."""
    epoch: int
    positions: Int64Array
    """Place of each sample in the global sequence (before bad ones were skipped or replaced)."""
    samples: Int64Array
    """Number of each sample in the dataset."""
    consumed: int
    """Positions of the epoch that all ranks together have consumed with this step."""
    _dataset: Dataset = field(repr=False)
    empty: bool = False
    """All of its samples were skipped (see `Loader.iter_batches`); `data` is None."""

    def places(self) -> list[Place]:
        """Key, shard, offset and length of each sample."""
        pairs = zip(self.samples.tolist(), self.positions.tolist(), strict=True)
        return [place_of(self._dataset, sample, position, self.epoch) for sample, position in pairs]


class _Options(LoaderKeywords, total=False):
    batch_size: Required[int]


class Loader:
    """Iterates over batches; each `iter` is one epoch, and the next one begins where that ended.

    The order of samples is a pure function of data, options and epoch; ranks and workers only slice it. `state_dict` says how
    far it was delivered. After `load_state_dict`, also on another number of ranks or workers or with another batch size, the
    next iteration delivers exactly what was left of that epoch.

    Args:
        dataset: What `open_dataset` and its siblings return.
        rank: This process among those that train together. Each gets other batches.
        world_size: How many there are.
        worker: This worker among those that prepare batches for this rank; it makes every `workers`-th step from `worker` on.
        workers: How many there are.
        epoch: The first epoch.
        first_epoch: The epoch that `skip_steps` means, if it is another one; a loaded state's beats it.
        options: See `LoaderOptions`; `batch_size` is required.

    Raises:
        ConfigError: an option is unusable.
        PlanError: when an iteration begins: an epoch would have no batch for some rank (see `LoaderOptions.allow_empty`).
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        rank: int = 0,
        world_size: int = 1,
        worker: int = 0,
        workers: int = 1,
        epoch: int = 0,
        first_epoch: int | None = None,
        **options: Unpack[_Options],
    ) -> None:
        self.dataset = dataset
        self.options = LoaderOptions.of(options)
        self.topology = Topology(rank, world_size, worker, workers)
        self.stats = LoaderStats()
        self._collate = make_collate(self.options.collate)
        self.quarantine: list[Quarantined] = []
        """Samples that were skipped or replaced, in the order met by this process."""
        self._log: QuarantineLog | None = None
        self.position = Position(epoch)
        self._first_epoch = epoch if first_epoch is None else first_epoch
        self._plan: Plan | None = None

    # -- the plan ----------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The order of samples; made when first needed."""
        if self._plan is None:
            spec = self.dataset.choose(self.options, self.topology.world_size)
            self._plan = self.dataset.plan(spec, skip=self._skip(), exclude=self._exclude())
        return self._plan

    def _skip(self) -> tuple[tuple[int, int, int], ...]:
        stride = self.options.batch_size * self.topology.world_size
        return tuple((self._first_epoch, first * stride, end * stride) for first, end in self.options.skip_steps)

    def _exclude(self) -> tuple[int, ...]:
        given = self.options.exclude
        if not given:
            return ()
        keys = [item.key if isinstance(item, Quarantined) else item for item in given]
        found = self.dataset.find_all(keys)
        for key, item in zip(keys, given, strict=True):
            if found[key] is None and not isinstance(item, Quarantined):
                self.dataset.find(key)  # raises
        return tuple(sorted({number for number in found.values() if number is not None}))

    def schedule(self, consumed: int = 0, *, epoch: int | None = None) -> Schedule:
        """How an epoch (default: the current one), from `consumed` on, is cut into batches."""
        options, epoch = self.options, self.position.epoch if epoch is None else epoch
        world_size = self.topology.world_size
        return self.plan.schedule(epoch, options.batch_size, world_size=world_size, tail=options.tail, consumed=consumed)

    def __len__(self) -> int:
        """Batches that the next (or running) iteration gives this rank and worker."""
        start = self.position.start
        schedule = self.schedule(start)
        if start and not schedule.steps(self.topology.rank):
            schedule = self.schedule(epoch=self.position.epoch + 1)  # the state was taken behind the last batch
        return len(schedule.worker_steps(self.topology))

    # -- epochs and state --------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch of the running iteration, or of the last one."""
        return self.position.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; a loaded position in that epoch is kept."""
        self.position.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence stands after the last batch delivered: the same on every rank."""
        return self.plan.state(self.position.epoch, self.position.consumed).as_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, allow_changed: bool = False) -> None:
        """Go on from `state` in the next iteration.

        Args:
            state: What `state_dict` returned, in whatever run.
            allow_changed: Accept a state of other data or options: epoch and count are kept, the order is this loader's.

        Raises:
            StateMismatchError: the state belongs to other data, seed or options; `.differs` names which.
        """
        loaded = PlanState.from_dict(state)
        self._first_epoch = loaded.epoch
        plan = self._plan_of(loaded, allow_changed)
        self._plan = plan
        self.position.load(loaded.epoch, min(loaded.consumed, plan.size))

    def _plan_of(self, state: PlanState, allow_changed: bool) -> Plan:
        if not allow_changed:
            self.dataset.check_spec(state.spec, self.options)
            self.dataset.plan(state.spec).check(state)
            return self._continued(state.spec, state.skip, state.exclude)
        spec = self.dataset.choose(self.options, self.topology.world_size)
        try:
            same = self.dataset.plan(state.spec)
        except StateMismatchError:
            same = None
        if same is not None and same.digest == state.plan_digest and not self._contradicts(state.spec):
            return self._continued(state.spec, state.skip, state.exclude)
        return self._continued(spec, state.skip, ())  # numbers of samples mean others now

    def _contradicts(self, spec: Mapping[str, Any]) -> bool:
        try:
            self.dataset.check_spec(spec, self.options)
        except StateMismatchError:
            return True
        return False

    def _continued(self, spec: Mapping[str, Any], skip: tuple[tuple[int, int, int], ...], exclude: tuple[int, ...]) -> Plan:
        """The plan of `spec` with what was left out before and what the options leave out."""
        return self.dataset.plan(
            spec,
            skip=tuple(dict.fromkeys((*skip, *self._skip()))),
            exclude=tuple(sorted({*exclude, *self._exclude()})),
        )

    # -- iteration ---------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        batches = self.iter_batches()
        try:
            for batch in batches:
                yield batch.data
        finally:
            batches.close()

    def iter_batches(self, *, first_step: int = 0, with_empty: bool = False) -> Generator[Batch, None, None]:
        """As iterating over the loader, with the origin of each batch.

        Args:
            first_step: Leave out the steps before this one, counted from where the iteration begins: for a worker
                that is restored by itself.
            with_empty: Give batches too of which all samples were skipped: for who takes one batch from each worker in turn.
        """
        position, plan = self.position, self.plan
        consumed = position.begin()
        turn = position.turn
        if consumed and not self.schedule(consumed).steps(self.topology.rank):
            consumed = position.skip_to_next_epoch()  # the state was taken behind the last batch
        epoch, schedule = position.epoch, self.schedule(consumed)
        whole = not consumed and not self.options.allow_empty
        if whole:
            self._refuse_empty(schedule)
        work = SampleWork(
            self.dataset, self.options, epoch=epoch, read=self._read, stats=self.stats, quarantine=self.quarantine,
            exclude=plan.exclude,
        )  # fmt: skip
        raws = iter(self._run(schedule, epoch, first_step))
        stats, clock = self.stats, time.perf_counter
        begun = clock()
        delivered = False
        try:
            for raw in raws:
                try:
                    samples = work.finish(raw.items, raw.samples, raw.positions)
                finally:
                    self._log_quarantine()
                after = plan.base(epoch, schedule.consumed_after(raw.step + 1))
                if not samples:  # all of them were skipped
                    position.move(turn, after)
                    if with_empty:
                        yield Batch(None, raw.step, epoch, raw.positions, raw.samples, after, self.dataset, empty=True)
                    continue
                data = self._collated(samples, raw, epoch)
                stats.samples += len(samples)
                stats.batches += 1
                if stats.first_batch is None:
                    stats.first_batch = clock() - begun
                given = clock()
                position.move(turn, after)
                delivered = True
                yield Batch(data, raw.step, epoch, raw.positions, raw.samples, after, self.dataset)
                stats.consumer += clock() - given
            if whole and not delivered and self.topology.workers == 1:
                refuse_all_skipped(self.quarantine, epoch)
            position.finish(turn, plan.size)
        finally:
            raws.close()
            work.close()

    def _refuse_empty(self, schedule: Schedule) -> None:
        """All ranks refuse alike an epoch that has no batch for one of them."""
        world_size, size, batch_size = self.topology.world_size, schedule.size, self.options.batch_size
        if schedule.steps(world_size - 1):  # the last rank is the first to get none
            return
        what = f"{size} samples, batch size {batch_size}, world size {world_size}"
        if not size:
            raise PlanError(f"there is nothing to load from {self.dataset.name} ({what})", hint=_NOTHING)
        if self.options.tail == "drop":
            text = f"one batch on every rank takes {schedule.stride} samples, so all of them would be dropped ({what})"
            raise PlanError(text, hint='use tail="pad" or "short", or a smaller batch size')
        raise PlanError(f"there are fewer samples than ranks, so some would get no batch ({what})", hint='use tail="pad"')

    def _collated(self, samples: list[Any], raw: RawBatch, epoch: int) -> Any:
        if self._collate is None:
            return samples
        begun = time.perf_counter()
        try:
            data = self._collate(samples)
        except Exception as error:  # of the user's code: it reaches the user with its place
            raise batch_error("collate", error, self.dataset, epoch, raw.samples, raw.positions) from error
        self.stats.decode += time.perf_counter() - begun
        return data

    def _run(self, schedule: Schedule, epoch: int, first_step: int) -> Run:
        options = self.options
        return Run(
            self.dataset,
            self.plan,
            epoch,
            schedule,
            self.plan.gaps(epoch),
            self.topology,
            first_step=first_step,
            memory_limit=self._memory_share(self.topology.workers),
            prefetch=parse_size(options.prefetch),
            driver=options.driver,
            concurrency=options.concurrency,
            verify=options.verify,
            stats=self.stats,
            cache=self._cache(),
            hedge_after=None if options.hedge_after is None else parse_duration(options.hedge_after),
        )

    def _cache(self) -> DiskCache | None:
        options = self.options
        if options.cache_dir is None:
            return None
        return DiskCache(options.cache_dir, parse_size(options.cache_limit), on_full=options.cache_on_full)

    def _log_quarantine(self) -> None:
        """What was left out goes to where the options say, if they do."""
        target, topology = self.options.quarantine, self.topology
        if target is None or not self.quarantine:
            return
        if self._log is None:
            self._log = QuarantineLog(target, self.dataset.store, topology.rank, topology.worker)
        self._log.follow(self.quarantine)

    def _memory_share(self, workers: int) -> int:
        """Bytes for one of `workers` processes of this rank."""
        return max(1, parse_size(self.options.memory_limit) // workers)

    def _read(self, samples: Int64Array) -> list[Any]:
        return read_samples(self.dataset, samples, verify=self.options.verify, stats=self.stats)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._batches_async()

    async def _batches_async(self) -> AsyncIterator[Any]:
        """The same batches, each prepared in a thread, so that the event loop goes on."""
        import asyncio

        batches = iter(self)
        end = object()
        coming: asyncio.Future[Any] | None = None
        try:
            while True:
                coming = asyncio.ensure_future(asyncio.to_thread(next, batches, end))
                batch = await asyncio.shield(coming)
                if batch is end:
                    return
                yield batch
        finally:
            if coming is not None and not coming.done():  # cancelled: the thread is in the generator still
                await asyncio.wait([coming])
            await asyncio.to_thread(batches.close)  # type: ignore[attr-defined]  # a generator

    # -- provenance --------------------------------------------------------------------------

    def where(self, position: int, *, epoch: int | None = None) -> Place:
        """What stands at a position of the sequence, without running anything.

        Raises:
            PlanError: there is no such position.
        """
        epoch = self.epoch if epoch is None else epoch
        place = self.plan.where(position, epoch)
        return place_of(self.dataset, place.sample, position, epoch)

    def find(self, key: str, *, epoch: int | None = None) -> tuple[int, int]:
        """(step, rank) at which the sample with this key comes in an epoch begun by this loader; (-1, -1) if never.

        Raises:
            PlanError: there is no such sample.
        """
        epoch = self.epoch if epoch is None else epoch
        options = self.options
        place = self.plan.find(
            self.dataset.find(key), epoch, batch_size=options.batch_size, world_size=self.topology.world_size, tail=options.tail
        )
        return (-1, -1) if place is None else (place.step, place.rank)

    def explain(
        self, *, workers: int | None = None, price_per_1000_gets: float = 0.0004, price_per_gb: float = 0.0
    ) -> Explanation:
        """What an epoch costs over all ranks: requests, bytes, memory, price; nothing is read for it, but a few indexes where
        members are left out.

        Args:
            workers: Processes per rank; default: as the loader was told.
            price_per_1000_gets: Of the store; the default is S3 Standard's in us-east-1, in dollars.
            price_per_gb: Of traffic.
        """
        options = self.options
        workers = self.topology.workers if workers is None else workers
        if workers < 1:
            raise ConfigError(
                f"there is at least one worker per rank, not {workers}", hint="a rank without workers reads itself: 1"
            )
        return explain_plan(
            self.plan,
            batch_size=options.batch_size,
            world_size=self.topology.world_size,
            workers=workers,
            tail=options.tail,
            memory_limit=self._memory_share(workers),
            prefetch=parse_size(options.prefetch),
            price_per_1000_gets=price_per_1000_gets,
            price_per_gb=price_per_gb,
            shares=self.dataset.shares,
        )
