"""`S3DataLoader`: a `DataLoader` that knows what it has delivered, so its state is exact."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, Final

from torch.utils.data import DataLoader, Sampler

from s3loader import ConfigError, Dataset, Explanation, LoaderStats, Place, Quarantined, S3LoaderError, WorkerError
from s3loader.adapters import Cursor, OnBreak, Report, ShowProgress, check_progress, checked, refuse_all_skipped, showing
from s3loader_torch.iterable import BatchOf, S3IterableDataset
from s3loader_torch.iteration import Delivery

__all__ = ["S3DataLoader"]

_OURS: Final = {"batch_size", "shuffle", "drop_last", "collate_fn"}
"""Options of torch's `DataLoader` that say what a batch is; the dataset must know it."""
_REFUSED: Final = {
    "sampler": (None, "the order is that of the plan", "choose it with shuffle=, order= and exclude=; or use S3MapDataset"),
    "batch_sampler": (None, "batches are those of the plan", "use batch_size= and tail=; or S3MapDataset"),
    "in_order": (
        True,
        "a state counts batches in their order, and would lose those that were overtaken",
        "decode_threads= and a greater prefetch_factor= even out slow samples",
    ),
}
"""Options that contradict an exact state: what they may be, why, and what to do."""
_PASSED: Final = tuple(sorted(set(inspect.signature(DataLoader.__init__).parameters) - {"self", "dataset", *_OURS, *_REFUSED}))
"""Options that are torch's own."""


def _as_it_is(data: Any) -> Any:
    return data


class _Epochs(Sampler[None]):
    """Where trainers look for `set_epoch`. They count from 0 and know nothing of a state that was loaded, so a count only
    brings the loader forward: what they resume without a state of the loader goes on with the right epoch."""

    def __init__(self, samples: S3IterableDataset, cursor: Cursor) -> None:
        self._samples, self._cursor = samples, cursor

    def __iter__(self) -> Iterator[None]:
        while True:
            yield None

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is of this epoch, or of a later one."""
        if epoch > self._cursor.coming[0]:
            self._samples.set_epoch(epoch)


@checked
class S3DataLoader(DataLoader[Any]):
    """Batches of an `S3IterableDataset`, in worker processes or in this one, counted where they are delivered.

    `state_dict` is exact whatever the workers have prefetched, is the same on every rank, and may be loaded with another
    number of workers, another world size or another batch size. An iteration is one epoch, the next one is the next epoch,
    also behind one that was broken off, unless `on_break` says otherwise.

    It is a `DataLoader` for who takes it apart, too: `dataset` yields the samples, `batch_size`, `drop_last` and
    `collate_fn` make the same batches of them in a plain `DataLoader`, and ``S3DataLoader`` of these is this loader again.

    Args:
        dataset: An `S3IterableDataset`; or what it takes, then with its options here.
        num_workers: Processes that fetch and decode; 0: threads of this process fetch.
        progress: True shows on stderr how far the epoch is: a bar on a terminal, else a line a minute; of rank 0. A function is
            called on every rank with batches given, of how many, and bytes of their samples.
        on_break: Where an iteration begins after one that was broken off: ``"next"`` epoch, the ``"rest"`` of the same, or
            ``"again"`` where it began.
        options: Of the dataset, unless one is given; ``drop_last=True`` is ``tail="drop"``, `collate_fn` is `collate`. Else of
            torch's `DataLoader` (``pin_memory persistent_workers prefetch_factor multiprocessing_context timeout
            worker_init_fn generator ...``); workers live on between iterations unless ``persistent_workers=False``.
            `sampler`, `batch_sampler` and ``in_order=False`` are refused.

    Raises:
        ConfigError: options that contradict each other, or an exact state.
    """

    def __init__(
        self,
        dataset: S3IterableDataset | Dataset | str | Iterable[str],
        *,
        num_workers: int = 0,
        on_break: OnBreak = "next",
        progress: ShowProgress = None,
        **options: Any,
    ) -> None:
        check_progress(progress)
        for name, (allowed, why, instead) in _REFUSED.items():
            if options.pop(name, allowed) is not allowed:
                raise ConfigError(f"{name} is not for S3DataLoader: {why}", hint=instead)
        if on_break not in ("next", "rest", "again"):
            raise ConfigError(f'on_break must be one of "next", "rest", "again", not {on_break!r}')
        theirs = {name: options.pop(name) for name in _PASSED if name in options}
        self._persistence_given = theirs.get("persistent_workers") is not None
        """Whether the caller chose; else workers live on, but a second iteration beside one under way gets its own."""
        if theirs.get("persistent_workers") is None:
            theirs["persistent_workers"] = num_workers > 0
        made = _dataset(dataset, options)
        if made.batch_size is None:
            raise ConfigError("the dataset needs a batch size", hint="give batch_size=")
        self.source = made.for_deliveries()
        self._engine: DataLoader[Any] | None = None
        epoch, start = made.begins
        self.on_break = on_break
        self.progress: ShowProgress = progress
        self._cursor = Cursor(epoch, on_break)
        self._cursor.load(epoch, start, over=made.epoch != epoch)
        self._iterations = 0
        self._owner = 0
        """The iteration that has the persistent workers; 0: none."""
        self._past = LoaderStats()
        self._worker_stats: dict[int, LoaderStats] = {}
        self.quarantine: list[Quarantined] = []
        """Samples that were skipped or replaced, in the order of their batches."""
        samples = made.for_samples()
        super().__init__(
            samples,
            batch_size=made.batch_size,
            drop_last=made.tail == "drop",
            collate_fn=samples.collate_fn,
            num_workers=num_workers,
            **theirs,
        )
        if on_break == "next":
            vars(self)["sampler"] = _Epochs(samples, self._cursor)  # torch guards the attribute

    # -- epochs and state --------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch of the running iteration, or of the last one; before any, of the first."""
        return self._cursor.epoch + self._cursor.over

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; a loaded position in that epoch is kept."""
        self._cursor.set_epoch(epoch)
        self._samples.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence stands after the last batch this process got."""
        return self.source.plan.state(self._cursor.epoch, self._cursor.consumed).as_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, allow_changed: bool = False) -> None:
        """Go on from `state` in the next iteration.

        Raises:
            StateMismatchError: the state belongs to other data, seed or options.
        """
        self.source.load_state_dict(state, allow_changed=allow_changed)
        self._samples.load_state_dict(state, allow_changed=allow_changed)
        epoch, start = self.source.begins
        self._cursor.load(epoch, start, over=self.source.epoch != epoch)
        self._engine = None  # persistent workers hold the plan they were started with

    @property
    def _samples(self) -> S3IterableDataset:
        dataset = self.dataset
        assert isinstance(dataset, S3IterableDataset)
        return dataset

    def __len__(self) -> int:
        """Batches of a whole epoch for this rank, also in the middle of one, as schedulers and trainers expect it."""
        return self._steps(self._cursor.coming[0], 0)

    @property
    def remaining(self) -> int:
        """Batches that the running iteration gives this rank, if there is none, the next one; less than ``len`` after a state
        was loaded."""
        return self._steps(*self._cursor.coming)

    def _steps(self, epoch: int, consumed: int) -> int:
        return self.source.schedule(epoch, consumed).steps(self.source.whole_rank().rank)

    def _is_left(self, consumed: int) -> bool:
        return self.source.is_left(self._cursor.epoch, consumed)

    # -- iteration ---------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator, as torch allows
        cursor = self._cursor
        if self._samples.epoch != self.epoch:  # set_epoch was called on what a trainer takes for the dataset
            cursor.set_epoch(self._samples.epoch)
        self._iterations = mine = self._iterations + 1
        epoch, consumed, turn = cursor.begin(self._is_left)
        self._samples.set_epoch(epoch)
        try:
            first = self.progress is not True or self.source.whole_rank().rank == 0
            with showing(self.progress, f"epoch {epoch}", "batches", first=first) as report:
                yield from self._counted(mine, epoch, consumed, turn, report)
            cursor.finish(turn, self.source.plan.size)
        except Exception:
            cursor.fail(turn)
            raise

    def _counted(self, mine: int, epoch: int, consumed: int, turn: int, report: Report | None) -> Iterator[Any]:
        expected = self._steps(epoch, consumed)
        self._past, self._worker_stats = self.stats, {}
        given = empty = 0
        with contextlib.closing(self._deliveries(mine, epoch, consumed)) as deliveries:
            for delivery in deliveries:
                self._worker_stats[delivery.worker] = delivery.stats
                self.quarantine += delivery.quarantine
                if delivery.error is not None:
                    error = delivery.error
                    del delivery
                    try:
                        raise error
                    finally:  # else error and frame hold each other, and the garbage collector ends the workers, slowly
                        del error
                self._cursor.move(turn, delivery.consumed)
                given += 1
                if report is not None:
                    report(given, expected, sum(stats.bytes_used for stats in self._worker_stats.values()))
                if delivery.empty:
                    empty += 1
                else:
                    yield delivery.data
        if given != expected:
            raise WorkerError(f"{given} batches came, {expected} are in the plan")
        if expected and given == empty and not consumed:
            refuse_all_skipped(self.quarantine, epoch)

    def _deliveries(self, mine: int, epoch: int, consumed: int) -> Generator[Delivery, None, None]:
        persistent = self.persistent_workers and (self._persistence_given or not self._owner)
        # Beside an iteration that is under way another one has workers of its own, which do not hear of its start.
        source = self.source if persistent or not self.persistent_workers else self.source.for_deliveries()
        source.begin_at(epoch, consumed, apart=not persistent)
        batches = iter(self._workers(source, persistent=persistent))
        if persistent:
            self._owner = mine
        try:
            while True:
                if persistent and mine != self._owner:
                    raise WorkerError(
                        "a later iteration of this loader has taken over its persistent workers",
                        hint="make another loader for it, or leave persistent_workers out",
                    )
                delivery = self._next(batches)
                if delivery is None:
                    return
                yield delivery
        finally:
            if persistent and mine == self._owner:
                self._owner = 0
            if self.num_workers and not persistent:
                _stop_workers(batches)  # now, and not whenever the garbage collector comes by

    def _workers(self, source: S3IterableDataset, *, persistent: bool) -> DataLoader[Any]:
        """torch's loader of deliveries, with the options that this one has now; trainers change some."""
        if persistent and self._engine is not None:
            return self._engine
        options: dict[str, Any] = {name: getattr(self, name) for name in _PASSED}
        options["persistent_workers"] = persistent
        engine: DataLoader[Any] = DataLoader(source, batch_size=None, collate_fn=_as_it_is, **options)
        if persistent:
            self._engine = engine
        return engine

    def _next(self, batches: Any) -> Delivery | None:
        try:
            delivery: Delivery | None = next(batches, None)
        except S3LoaderError:
            raise
        except (RuntimeError, OSError, EOFError) as error:
            # A worker that dies while it hands over a tensor shows as a broken connection.
            if not self.num_workers or (isinstance(error, RuntimeError) and "worker" not in str(error)):
                raise
            _stop_workers(batches)
            self._engine = None  # persistent workers, too, start anew
            raise WorkerError(
                f"a worker process died: {error}", hint="its own message may stand above; resume from the last state"
            ) from error
        return delivery

    # -- provenance --------------------------------------------------------------------------

    def where(self, position: int, *, epoch: int | None = None) -> Place:
        """What stands at a position of the sequence, without running anything.

        Raises:
            PlanError: there is no such position.
        """
        return self.source.where(position, epoch=self.epoch if epoch is None else epoch)

    def find(self, key: str, *, epoch: int | None = None) -> tuple[int, int]:
        """(step, rank) at which the sample with this key comes in a whole epoch (default: the current one); (-1, -1) if never.

        Raises:
            PlanError: there is no such sample.
        """
        return self.source.find(key, epoch=self.epoch if epoch is None else epoch)

    def explain(self, *, price_per_1000_gets: float = 0.0004, price_per_gb: float = 0.0) -> Explanation:
        """What an epoch costs over all ranks and workers: requests, bytes, memory, price, found by a dry run of the planner.

        Args:
            price_per_1000_gets: Of the store; the default is S3 Standard's in us-east-1, in dollars.
            price_per_gb: Of traffic.
        """
        workers = max(1, self.num_workers)
        return self.source.explain(workers=workers, price_per_1000_gets=price_per_1000_gets, price_per_gb=price_per_gb)

    @property
    def stats(self) -> LoaderStats:
        """Counters of all workers and epochs together, as of their last batches."""
        total = LoaderStats()
        total.add(self._past)
        for stats in self._worker_stats.values():
            total.add(stats)
        return total


def _stop_workers(batches: Any) -> None:
    """End the other workers now: each one's exit would make torch raise again, anywhere in the program."""
    stop = getattr(batches, "_shutdown_workers", None)
    if stop is not None:
        with contextlib.suppress(RuntimeError):  # the same worker's death, reported once more while they end
            stop()


def _dataset(dataset: Any, options: dict[str, Any]) -> S3IterableDataset:
    """The dataset of batches, of what the user gave and torch's words for what a batch is."""
    options = _in_our_words(options)
    if not isinstance(dataset, S3IterableDataset):
        return S3IterableDataset(dataset, **options)
    known = {"batch_size": dataset.batch_size, "tail": dataset.tail, "collate": dataset.collate_fn.collate}
    other = sorted(set(options) - set(known))
    if other:
        raise ConfigError(f"{', '.join(other)}: give these to the dataset", hint="or give a URL instead of a dataset")
    changed = {name: value for name, value in options.items() if value != known[name]}
    if changed and dataset.yields == "batches":
        raise ConfigError(
            "the dataset makes other batches: "
            + ", ".join(f"{name} is {known[name]!r} there, {value!r} here" for name, value in changed.items()),
            hint='say it once, to the dataset; or give a dataset with yields="samples"',
        )
    size = changed.pop("batch_size", dataset.batch_size)
    return dataset if size is None else dataset.in_batches(size, **changed)


def _in_our_words(options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    if options.get("batch_size", 1) is None:
        del options["batch_size"]
    if "drop_last" in options:
        drop = options.pop("drop_last")
        if drop and options.setdefault("tail", "drop") != "drop":
            raise ConfigError(
                f'drop_last=True and tail="{options["tail"]}" contradict each other', hint="leave one of them out"
            )
    function = options.pop("collate_fn", None)
    if function is not None:
        if options.get("collate") is not None:
            raise ConfigError("collate_fn and collate are the same option", hint="leave one of them out")
        options["collate"] = function.collate if isinstance(function, BatchOf) else function
    return options
