"""`Loader`: batches of a dataset in one exactly resumable order, without any framework."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Required, TypeVar, Unpack

from s3loader.arguments import checked
from s3loader.errors import ConfigError, PlanError, S3LoaderError, StateMismatchError
from s3loader.fetch.diskcache import DiskCache
from s3loader.loader.collate import make_collate
from s3loader.loader.dataset import Dataset
from s3loader.loader.options import LoaderKeywords, LoaderOptions
from s3loader.loader.planner import Planner
from s3loader.loader.quarantine import Quarantined, QuarantineLog
from s3loader.loader.reading import read_samples
from s3loader.loader.run import RawBatch, Run
from s3loader.loader.sample_stage import Place, SampleStage, batch_error, place_of, refuse_all_skipped
from s3loader.loader.stats import LoaderStats, live_stats
from s3loader.plan import Explanation, Plan, PlanState, Schedule, Topology, explain_runs
from s3loader.plan.permutation import Int64Array
from s3loader.plan.schedule import Cursor
from s3loader.progress import Report, ShowProgress, check_progress, showing
from s3loader.ranks import ranks_on_node
from s3loader.types import NetworkState
from s3loader.units import format_duration, format_size, parse_duration, parse_size

__all__ = ["Batch", "Loader", "in_threads"]

T = TypeVar("T")

_NOTHING: Final = "check the URL, where=, exclude= and skip_steps=; allow_empty=True takes an epoch without a batch"
_DRY_SAMPLES: Final = 1 << 19
"""Samples of an epoch that `Loader.explain` plans in full; the same for shards and processes."""
_DRY_PARTS: Final = 4096
_DRY_PROCESSES: Final = 256
_DRY_SOME: Final = 8
"""Processes that it looks at where there is more."""


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
    """All of its samples were skipped (only where `iter_batches` is asked for empty batches); `data` is None."""

    def places(self) -> list[Place]:
        """Key, shard, offset and length of each sample."""
        pairs = zip(self.samples.tolist(), self.positions.tolist(), strict=True)
        return [place_of(self._dataset, sample, position, self.epoch) for sample, position in pairs]


class _Options(LoaderKeywords, total=False):
    batch_size: Required[int]


@checked
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
        progress: True shows on stderr how far the epoch is: a bar on a terminal, else a line a minute; of rank 0. A function is
            called on every rank with batches given, of how many, and bytes of their samples.
        options: The fields of `LoaderOptions` as keywords; `batch_size` is required.

    Raises:
        ConfigError: an option is unusable.
        PlanError: when an iteration begins: an epoch would have no batch for some rank (`allow_empty=True` permits it).
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
        progress: ShowProgress = None,
        **options: Unpack[_Options],
    ) -> None:
        check_progress(progress)
        self.progress: ShowProgress = progress
        self.dataset = dataset
        self.options = LoaderOptions.of(options)
        self.topology = Topology(rank, world_size, worker, workers)
        self.stats = LoaderStats()
        if workers > 1 and self.options.on_break == "rest":
            raise ConfigError(
                'on_break="rest" needs to know what all workers have delivered, and one of them does not',
                hint="break off all of them alike, and give each the state of all with load_state_dict",
            )
        self._collate = make_collate(self.options.collate)
        self.quarantine: list[Quarantined] = []
        """Samples that were skipped or replaced, in the order met by this process."""
        self._log: QuarantineLog | None = None
        self.cursor = Cursor(epoch, self.options.on_break)
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
        options, epoch = self.options, self.cursor.epoch if epoch is None else epoch
        world_size = self.topology.world_size
        return self.plan.schedule(epoch, options.batch_size, world_size=world_size, tail=options.tail, consumed=consumed)

    def is_left(self, consumed: int, *, epoch: int | None = None) -> bool:
        """Whether any rank gets a batch of an epoch (default: the current one) behind `consumed` positions of it."""
        return self.schedule(consumed, epoch=epoch).steps(0) > 0  # the first rank is the last to get none

    def __len__(self) -> int:
        """Batches that the running iteration gives this rank and worker; if there is none, the next one."""
        epoch, start = self.cursor.coming
        return len(self.schedule(start, epoch=epoch).worker_steps(self.topology))

    # -- epochs and state --------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch of the running iteration, or of the last one; before any, of the first."""
        return self.cursor.epoch + self.cursor.over

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; a loaded position in that epoch is kept."""
        self.cursor.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence stands after the last batch delivered: the same on every rank."""
        return self.plan.state(self.cursor.epoch, self.cursor.consumed).as_dict()

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
        consumed = min(loaded.consumed, plan.size)
        self.cursor.load(loaded.epoch, consumed, over=consumed > 0 and not self.is_left(consumed, epoch=loaded.epoch))

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
        cursor, plan = self.cursor, self.plan
        epoch, consumed, turn = cursor.begin(self.is_left)
        first = self.topology.rank == self.topology.worker == 0
        try:
            with showing(self.progress, f"epoch {epoch}", "batches", first=first) as report:
                yield from self._deliver(epoch, consumed, turn, first_step, report, with_empty=with_empty)
            cursor.finish(turn, plan.size)
        except Exception:
            cursor.fail(turn)
            raise

    def _deliver(
        self, epoch: int, consumed: int, turn: int, first_step: int, report: Report | None, *, with_empty: bool
    ) -> Generator[Batch, None, None]:
        cursor, plan, stats, clock = self.cursor, self.plan, self.stats, time.perf_counter
        schedule, gaps = self.schedule(consumed, epoch=epoch), plan.gaps(epoch)
        given_before, used_before = stats.batches, stats.bytes_used
        expected = 0 if report is None else sum(1 for step in schedule.worker_steps(self.topology) if step >= first_step)
        whole = not consumed and not self.options.allow_empty
        if whole:
            self._refuse_empty(schedule)
        work = SampleStage(
            self.dataset, self.options, epoch=epoch, read=self._read, stats=stats, quarantine=self.quarantine,
            exclude=plan.exclude,
        )  # fmt: skip
        raws = iter(self._run(schedule, epoch, first_step))
        steps = len(schedule.worker_steps(self.topology)) - first_step // self.topology.workers
        live = live_stats(self.dataset, self.topology, stats, self.quarantine, epoch=epoch, steps=steps)
        ended = False
        begun = clock()
        delivered = False
        try:
            for raw in raws:
                try:
                    samples = work.finish(raw.items, raw.samples, raw.positions)
                finally:
                    self._log_quarantine()
                after = gaps.position(schedule.consumed_after(raw.step + 1))
                if not samples:  # all of them were skipped
                    cursor.move(turn, after)
                    if with_empty:
                        yield Batch(None, raw.step, epoch, raw.positions, raw.samples, after, self.dataset, empty=True)
                    continue
                data = self._collated(samples, raw, epoch, work.kept)
                stats.samples += len(samples)
                stats.batches += 1
                if stats.first_batch is None:
                    stats.first_batch = clock() - begun
                given = clock()
                cursor.move(turn, after)
                if report is not None:
                    report(stats.batches - given_before, expected, stats.bytes_used - used_before)
                delivered = True
                if live is not None:
                    live.batch()
                yield Batch(data, raw.step, epoch, raw.positions, raw.samples, after, self.dataset)
                stats.consumer += clock() - given
            if whole and not delivered and self.topology.workers == 1:
                refuse_all_skipped(self.quarantine, epoch)
            ended = True
        finally:
            raws.close()
            work.close()
            if live is not None:
                live.close(sys.exc_info()[1], whole=ended)

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

    def _collated(self, samples: list[Any], raw: RawBatch, epoch: int, kept: list[int] | None) -> Any:
        if self._collate is None:
            return samples
        begun = time.perf_counter()
        try:
            data = self._collate(samples)
        except Exception as error:  # noqa: BLE001  # of the user's code: it reaches the user with its place
            numbers, positions = (raw.samples, raw.positions) if kept is None else (raw.samples[kept], raw.positions[kept])
            placed = batch_error("collate", error, self.dataset, epoch, numbers, positions)
            raise placed from (error.__cause__ if isinstance(error, S3LoaderError) else error)
        self.stats.decode += time.perf_counter() - begun
        return data

    def _planner(
        self, schedule: Schedule, epoch: int, topology: Topology, first_step: int = 0, *, from_averages: bool = False
    ) -> Planner:
        return Planner(
            self.dataset,
            self.plan,
            epoch,
            schedule,
            topology,
            first_step=first_step,
            memory_limit=self._memory_share(topology.workers),
            prefetch=parse_size(self.options.prefetch),
            from_averages=from_averages,
        )

    def _run(self, schedule: Schedule, epoch: int, first_step: int) -> Run:
        options = self.options
        self.stats.memory_limit = self._memory_share(self.topology.workers)
        return Run(
            self._planner(schedule, epoch, self.topology, first_step),
            self.dataset.store,
            grouped=self.dataset.group is not None,
            memory_limit=self.stats.memory_limit,
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
        return DiskCache(os.fspath(options.cache_dir), parse_size(options.cache_limit), on_full=options.cache_on_full)

    def _log_quarantine(self) -> None:
        """What was left out goes to where the options say, if they do."""
        target, topology = self.options.quarantine, self.topology
        if target is None or not self.quarantine:
            return
        if self._log is None:
            self._log = QuarantineLog(target, self.dataset.store, topology.rank, topology.worker)
        self._log.follow(self.quarantine)

    def _memory_share(self, workers: int) -> int:
        """Bytes for one of `workers` processes of this rank.

        Raises:
            ConfigError: the limit is a node's, and nobody says how many ranks that has.
        """
        size, of_node = self.options.memory_of_node()
        return max(1, size // (workers * (ranks_on_node() if of_node else 1)))

    def _read(self, samples: Int64Array) -> list[Any]:
        return read_samples(self.dataset, samples, verify=self.options.verify, stats=self.stats)

    def __aiter__(self) -> AsyncIterator[Any]:
        """The same batches, each prepared in a thread, so that the event loop goes on."""
        return in_threads(self)

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
        self,
        *,
        workers: int | None = None,
        epoch: int | None = None,
        price_per_1000_gets: float = 0.0004,
        price_per_gb: float = 0.0,
    ) -> Explanation:
        """What a whole epoch costs over all ranks: requests, bytes, memory, price.

        The planner of each process is run without reading samples; the indexes of shards are read for it. So requests and
        bytes are those that `stats` will show, unless something has to be fetched twice. Of an epoch of more than half a
        million samples, 4,096 parts or 256 processes some are planned, with average sizes and without reading indexes, and the
        rest is extrapolated; a note says so.

        Args:
            workers: Processes per rank; default: as the loader was told.
            epoch: Which; default: that of the running iteration; if there is none, of the next one.
            price_per_1000_gets: Of the store; the default is S3 Standard's in us-east-1, in dollars.
            price_per_gb: Of traffic.
        """
        options, world_size = self.options, self.topology.world_size
        epoch = self.cursor.coming[0] if epoch is None else epoch
        workers = self.topology.workers if workers is None else workers
        if workers < 1:
            raise ConfigError(
                f"there is at least one worker per rank, not {workers}", hint="a rank without workers reads itself: 1"
            )
        schedule = self.plan.schedule(epoch, options.batch_size, world_size=world_size, tail=options.tail)
        processes = [Topology(rank, world_size, worker, workers) for rank in range(world_size) for worker in range(workers)]
        samples = sum(schedule.samples_in(one.rank, schedule.worker_steps(one)) for one in processes)
        estimated = samples > _DRY_SAMPLES or len(self.dataset.parts) > _DRY_PARTS or len(processes) > _DRY_PROCESSES
        if estimated:
            processes = processes[:: -(-len(processes) // _DRY_SOME)]
        most = _DRY_SAMPLES // len(processes) if estimated else samples
        explanation = explain_runs(
            self.plan,
            schedule,
            [self._planner(schedule, epoch, one, from_averages=estimated).dry_run(most) for one in processes],
            exact=not estimated,
            epoch_samples=samples,
            price_per_1000_gets=price_per_1000_gets,
            price_per_gb=price_per_gb,
        )
        return replace(
            explanation,
            memory_limit=self._memory_share(workers),
            notes=(
                *explanation.notes,
                *self._shared_memory(workers),
                *self.dataset.notes,
                *_of_network(self.dataset.store.network()),
            ),
        )

    def _shared_memory(self, workers: int) -> tuple[str, ...]:
        size, of_node = self.options.memory_of_node()
        if not of_node:
            return ()
        ranks = ranks_on_node()
        return (f"memory_limit is {format_size(size)} of a node, shared by {ranks} ranks of {workers} workers",)


def _of_network(network: NetworkState | None) -> tuple[str, ...]:
    """What was measured in this process, in words."""
    if network is None or not network.first_byte:
        return ()
    hedges = f", {network.hedged} ranges asked for twice, {network.hedges_won} second answers first" if network.hedged else ""
    return (
        f"measured so far: first byte after {format_duration(network.first_byte)}, {network.connections} connections"
        f" ({network.why}), {network.throttled} times told to slow down{hedges}",
    )


async def in_threads(items: Iterable[T]) -> AsyncIterator[T]:
    """What `items` gives by a generator, each made in a thread, so that the event loop goes on; the generator is closed at the
    end, and when whoever waits for an item is cancelled."""
    import asyncio

    made = iter(items)
    end = object()
    coming: asyncio.Future[Any] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(asyncio.to_thread(next, made, end))
            item: Any = await asyncio.shield(coming)
            if item is end:
                return
            yield item
    finally:
        if coming is not None and not coming.done():  # cancelled: the thread is in the generator still
            await asyncio.wait([coming])
        await asyncio.to_thread(made.close)  # type: ignore[attr-defined]  # a generator
