"""`S3DataLoader`: a `DataLoader` that knows what it has delivered, so its state is exact."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from s3loader.errors import ConfigError, S3LoaderError, WorkerError
from s3loader.loader import Dataset, LoaderStats, Quarantined
from s3loader.loader.position import Position
from s3loader.loader.samples import refuse_all_skipped
from s3loader_torch.iterable import Delivery, S3IterableDataset

__all__ = ["S3DataLoader"]

_MAKES_BATCHES = ("shuffle", "sampler", "batch_sampler", "drop_last", "collate_fn")


def _as_it_is(data: Any) -> Any:
    return data


class S3DataLoader(DataLoader[Any]):
    """Batches of an `S3IterableDataset`, in worker processes or in this one, counted where they are delivered.

    `state_dict` is exact whatever the workers have prefetched, is the same on every rank, and may be loaded with another
    number of workers, another world size or another batch size. An iteration is one epoch, the next one is the next epoch.

    Args:
        dataset: An `S3IterableDataset` with a batch size; or what it takes, then with its options here.
        num_workers: Processes that fetch and decode; 0: threads of this process fetch.
        options: Of the dataset, unless one is given; else of torch's `DataLoader` (``pin_memory persistent_workers
            prefetch_factor multiprocessing_context timeout worker_init_fn ...``).

    Raises:
        ConfigError: options that contradict each other.
    """

    def __init__(
        self, dataset: S3IterableDataset | Dataset | str | Iterable[str], *, num_workers: int = 0, **options: Any
    ) -> None:
        ours, theirs = _split(options)
        if not isinstance(dataset, S3IterableDataset):
            dataset = S3IterableDataset(dataset, **ours)
        elif ours:
            raise ConfigError(
                f"{', '.join(sorted(ours))}: give these to the dataset", hint="or give a URL instead of a dataset"
            )
        if dataset.batch_size is None:
            raise ConfigError("the dataset needs a batch size", hint="give S3IterableDataset(..., batch_size=B)")
        self._position = Position(dataset.epoch)
        self._iterations = 0
        self._past = LoaderStats()
        self._worker_stats: dict[int, LoaderStats] = {}
        self.quarantine: list[Quarantined] = []
        """Samples that were skipped or replaced, in the order of their batches."""
        super().__init__(dataset.for_deliveries(), batch_size=None, num_workers=num_workers, collate_fn=_as_it_is, **theirs)

    # -- epochs and state --------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch of the running iteration, or of the last one."""
        return self._position.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; a loaded position in that epoch is kept."""
        self._position.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence stands after the last batch this process got."""
        return self._dataset.plan.state(self._position.epoch, self._position.consumed).as_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, allow_changed: bool = False) -> None:
        """Go on from `state` in the next iteration; see `s3loader.Loader.load_state_dict`.

        Raises:
            StateMismatchError: the state belongs to other data, seed or options.
        """
        self._dataset.load_state_dict(state, allow_changed=allow_changed)
        self._position.load(self._dataset.epoch, self._dataset.start)
        self._iterator = None  # persistent workers hold the plan they were started with

    @property
    def _dataset(self) -> S3IterableDataset:
        dataset = self.dataset
        assert isinstance(dataset, S3IterableDataset)
        return dataset

    def __len__(self) -> int:
        """Batches of a whole epoch for this rank, also in the middle of one, as schedulers and trainers expect it."""
        return self._steps(0)

    @property
    def remaining(self) -> int:
        """Batches that the next (or running) iteration gives this rank; less than ``len`` after a state was loaded."""
        start = self._position.start
        return (self._steps(start) if start else 0) or len(self)

    def _steps(self, consumed: int) -> int:
        rank = self._dataset.whole_rank()
        return self._dataset.loader(rank).schedule(consumed, epoch=self._position.epoch).steps(rank.rank)

    # -- iteration ---------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator, as torch allows
        position = self._position
        self._iterations = mine = self._iterations + 1
        consumed = position.begin()
        turn = position.turn
        if consumed and not self._steps(consumed):
            consumed = position.skip_to_next_epoch()
        expected = self._steps(consumed)
        epoch = position.epoch
        self._dataset.begin_at(epoch, consumed, apart=not self.persistent_workers)
        size = self._dataset.plan.size
        self._past, self._worker_stats = self.stats, {}
        given = empty = 0
        for delivery in self._deliveries(mine):
            self._worker_stats[delivery.worker] = delivery.stats
            self.quarantine += delivery.quarantine
            if delivery.error is not None:
                raise delivery.error
            position.move(turn, delivery.consumed)
            given += 1
            if delivery.empty:
                empty += 1
            else:
                yield delivery.data
        if given != expected:
            raise WorkerError(f"{given} batches came, {expected} are in the plan")
        if expected and given == empty and not consumed:
            refuse_all_skipped(self.quarantine, epoch)
        position.finish(turn, size)

    def _deliveries(self, mine: int) -> Iterator[Delivery]:
        batches = super().__iter__()
        try:
            while True:
                if self.persistent_workers and mine != self._iterations:
                    raise WorkerError(
                        "a later iteration of this loader has taken over its persistent workers",
                        hint="make another loader for it, or leave persistent_workers out",
                    )
                delivery = self._next(batches)
                if delivery is None:
                    return
                yield delivery
        finally:
            if self.num_workers and not self.persistent_workers:
                _stop_workers(batches)  # now, and not whenever the garbage collector comes by

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
            self._iterator = None  # persistent workers, too, start anew
            raise WorkerError(
                f"a worker process died: {error}", hint="its own message may stand above; resume from the last state"
            ) from error
        return delivery

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


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the dataset's options, torch's) of keywords that may be either's."""
    import inspect

    known = set(inspect.signature(DataLoader.__init__).parameters) - {"self", "dataset", "batch_size", *_MAKES_BATCHES}
    theirs = {name: value for name, value in options.items() if name in known}
    return {name: value for name, value in options.items() if name not in known}, theirs
