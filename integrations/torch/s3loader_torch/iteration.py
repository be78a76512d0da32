"""One iteration over an `S3IterableDataset` in one process, and its state, as `torchdata` asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from s3loader import Batch, Loader, LoaderStats, Plan, Quarantined, S3LoaderError, StateMismatchError
from s3loader.adapters import PlanState, Schedule, Topology

__all__ = ["Delivery", "Iteration", "Progress"]


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


class Progress(NamedTuple):
    """How far an iteration is, in the steps of the rank."""

    epoch: int
    start: int
    """Positions of the epoch that were consumed before it began."""
    step: int = 0
    """Steps before this one are given."""
    samples: int = 0
    """Samples of that step that are given already, where single samples are."""

    @classmethod
    def of(cls, state: Mapping[str, Any], plan_state: PlanState) -> Progress:
        """What a state says."""
        step, samples = int(state.get("worker_step", 0)), int(state.get("worker_samples", 0))
        return cls(plan_state.epoch, plan_state.consumed, step, samples)


class _Dataset(Protocol):
    """What an iteration asks of an `S3IterableDataset`."""

    gives: Any
    """``"batches"``, ``"samples"`` or ``"deliveries"``."""

    @property
    def plan(self) -> Plan: ...

    @property
    def block(self) -> int: ...

    def loader(self, topology: Topology, epoch: int, start: int) -> Loader: ...

    def schedule(self, epoch: int, consumed: int) -> Schedule: ...

    def converted(self, batch: Batch) -> Any: ...

    def adopt(self, state: Mapping[str, Any]) -> PlanState: ...

    def restored(self, epoch: int, name: int) -> None: ...


class Iteration(Iterator[Any]):
    """Batches (or samples, or deliveries) of one iteration for one worker.

    Its state is what this worker has given. One worker alone counts as the whole rank does, in positions consumed; of several
    each has its own step, so there as many workers must go on, with the same batch size and world size.
    """

    def __init__(self, dataset: _Dataset, topology: Topology, progress: Progress, name: int) -> None:
        self._dataset = dataset
        self._topology = topology
        self._name = name
        self._progress = progress
        self._items: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self._items is None:
            self._items = self._give()
        return next(self._items)

    def state_dict(self) -> dict[str, Any]:
        """Where this worker stands: for `torchdata`'s StatefulDataLoader."""
        dataset, (epoch, start, step, samples) = self._dataset, self._progress
        extra = {"worker_samples": samples} if samples else {}
        plan = dataset.plan
        if self._topology.workers == 1:
            consumed = dataset.schedule(epoch, start).consumed_after(step)
            return {**plan.state(epoch, plan.base(epoch, consumed) if step else start).as_dict(), **extra}
        return {**plan.state(epoch, start).as_dict(), "worker_step": step, **extra, **self._shape()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, which `state_dict` returned in a worker of the same number.

        Raises:
            StateMismatchError: the state belongs to other data, seed or options, or to another number of workers.
        """
        loaded = self._dataset.adopt(state)
        self._refuse_other_shape(state)
        self._progress, self._items = Progress.of(state, loaded), None
        self._dataset.restored(loaded.epoch, self._name)

    def _shape(self) -> dict[str, int]:
        topology, batch_size = self._topology, self._dataset.block
        return {"workers": topology.workers, "world_size": topology.world_size, "batch_size": batch_size}

    def _refuse_other_shape(self, state: Mapping[str, Any]) -> None:
        here = self._shape()
        there = {name: state[name] for name in here if name in state}
        if not there and here["workers"] > 1 and "worker_step" not in state:
            there = {"workers": 1}
        differs = [name for name, value in there.items() if value != here[name]]
        if differs:
            raise StateMismatchError(
                "the state of a worker belongs to other workers: "
                + ", ".join(f"{name} {there[name]} there, {here[name]} here" for name in differs),
                hint="resume with the same numbers, or use S3DataLoader, whose state says nothing of workers",
                differs=differs,
            )

    # -- what is given -----------------------------------------------------------------------

    def _give(self) -> Iterator[Any]:
        dataset, topology, progress = self._dataset, self._topology, self._progress
        loader = dataset.loader(topology, progress.epoch, progress.start)
        # torch asks the workers in turn, so a step of which nothing is left must take its turn too.
        batches = loader.iter_batches(first_step=progress.step, with_empty=dataset.gives == "deliveries")
        try:
            if dataset.gives == "deliveries":
                yield from self._deliveries(loader, batches)
                return
            for batch in batches:
                after = progress._replace(step=batch.step + topology.workers, samples=0)
                if dataset.gives == "batches":
                    data = dataset.converted(batch)
                    self._progress = after
                    yield data
                    continue
                samples = dataset.converted(batch)
                given, now = self._progress.samples if self._progress.step == batch.step else 0, after
                for number in range(given, len(samples)):
                    last = number + 1 == len(samples)
                    now = after if last else progress._replace(step=batch.step, samples=number + 1)
                    self._progress = now
                    yield samples[number]
        finally:
            batches.close()

    def _deliveries(self, loader: Any, batches: Iterator[Any]) -> Iterator[Delivery]:
        worker, noted = self._topology.worker, 0
        while True:
            try:
                batch = next(batches, None)
                data = None if batch is None or batch.empty else self._dataset.converted(batch)
            except S3LoaderError as error:
                # torch would rebuild the exception from its text alone and lose what it knows.
                yield Delivery(0, None, worker, loader.stats, tuple(loader.quarantine[noted:]), error)
                return
            new = tuple(loader.quarantine[noted:])
            noted = len(loader.quarantine)
            if batch is None:
                return
            yield Delivery(batch.consumed, data, worker, loader.stats, new, None, batch.empty)
