"""`S3JaxIterable`: batches as numpy arrays, or as global `jax.Array`s of any `NamedSharding`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Unpack

import jax
from jax.sharding import Sharding

from s3loader import Batch, ConfigError, Loader, LoaderStats, SampleError
from s3loader.adapters import AdapterKeywords, DatasetSource, FromSources, batch_error, checked, find_ranks, open_source
from s3loader_jax.sharding import process_slice, shard_batch

__all__ = ["S3JaxIterable"]


@checked
class S3JaxIterable(FromSources):
    """Iterates over batches of samples; each `iter` is one epoch, and the next one is of the next epoch, or where `on_break`
    says after one that was broken off.

    The order is that of the torch and TensorFlow adapters, sample for sample, and the state of one loads in the others.

    Args:
        dataset: A dataset (`s3loader.loader`), or the URL of a manifest, prefix, shard or WebDataset pattern.
        batch_size: Samples per batch and rank. With a `sharding` the global batch is ``batch_size * world_size``.
        sharding: Lay numeric arrays out as global `jax.Array`s, axis 0 being the batch. Ranks are read off it: processes
            whose devices hold the same rows load the same samples. None: numpy arrays, nothing is put on a device.
        rank: Default without a `sharding`: `jax.process_index`, or, where jax knows of one process only, what is found of
            ``RANK`` and Slurm; read when an iteration begins.
        world_size: Default without a `sharding`: `jax.process_count`, or what is found.
        tail: ``"drop"`` (the default here: one batch shape, one compilation), ``"pad"`` or ``"short"``; see
            `s3loader.LoaderOptions`. A `sharding` needs one of the first two.
        device_prefetch: Batches on the devices or on their way, the one you compute on included; 2 is double buffering.
            Only with a `sharding`.
        collate: ``"fixed"`` (the default here), ``"ragged"`` or a function of a list of samples.
        options: Everything else of `s3loader.LoaderOptions`: ``shuffle seed decode transform on_error memory_limit ...``;
            with a URL also those of `s3loader.open_dataset` and `open_store`.

    Raises:
        ConfigError: an option is unusable.
    """

    def __init__(
        self,
        dataset: DatasetSource,
        *,
        batch_size: int,
        sharding: Sharding | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        device_prefetch: int = 2,
        **options: Unpack[AdapterKeywords],
    ) -> None:
        if sharding is not None and (rank is not None or world_size is not None):
            raise ConfigError("rank and world_size are read off the sharding", hint="give either of the two")
        if device_prefetch < 1:
            raise ConfigError(f"device_prefetch must be at least 1, not {device_prefetch}")
        settings: dict[str, Any] = {"tail": "drop", "collate": "fixed", **options}
        if sharding is not None and settings["tail"] == "short":
            raise ConfigError(
                'tail="short" gives ranks unequal batches, which no global array can hold', hint='use "drop" or "pad"'
            )
        self.dataset, settings = open_source(dataset, settings)
        self._sharding = sharding
        self._device_prefetch = device_prefetch
        self._ranks = (rank, world_size)
        self._options = {"batch_size": batch_size, **settings}
        self._made: tuple[tuple[int, int], Loader] | None = None
        self._delivered: tuple[int, int] | None = None
        """(epoch, positions consumed) of the last batch given out."""

    @property
    def loader(self) -> Loader:
        """The engine behind, for `plan`, `stats`, `where`, `find` and `explain`."""
        place = self._place()
        if self._made is None or self._made[0] != place:
            before = self._made[1] if self._made is not None else None
            loader = Loader(self.dataset, rank=place[0], world_size=place[1], **self._options)
            if before is not None:  # the processes changed between two iterations: go on where they stood
                loader.load_state_dict(before.state_dict())
            self._made = (place, loader)
        return self._made[1]

    def _place(self) -> tuple[int, int]:
        if self._sharding is not None:
            return process_slice(self._sharding)
        rank, world_size = self._ranks
        found = (jax.process_index(), jax.process_count()) if jax.process_count() > 1 else find_ranks()[:2]
        return found[0] if rank is None else rank, found[1] if world_size is None else world_size

    @property
    def stats(self) -> LoaderStats:
        """What was read, and who waited for whom."""
        return self.loader.stats

    def __len__(self) -> int:
        """Batches in the next (or running) iteration."""
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; a loaded position in that epoch is kept."""
        loader = self.loader
        before = loader.cursor.turn
        loader.set_epoch(epoch)
        if loader.cursor.turn != before:
            self._delivered = None

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence stands after the last batch *given out*; what waits on the devices does not count."""
        loader = self.loader
        if self._delivered is None:
            return loader.state_dict()
        return loader.plan.state(*self._delivered).as_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, allow_changed: bool = False) -> None:
        """Go on from `state` in the next iteration, on any number of processes and with any batch size.

        Raises:
            StateMismatchError: the state belongs to other data, seed or options.
        """
        self.loader.load_state_dict(state, allow_changed=allow_changed)
        self._delivered = None

    def __iter__(self) -> Iterator[Any]:
        for batch in self.iter_batches():
            yield batch.data

    def iter_batches(self) -> Iterator[Batch]:
        """As iterating, with the origin of each batch."""
        loader = self.loader
        if self._delivered is not None and loader.options.on_break == "rest" and not loader.cursor.restart:
            loader.load_state_dict(self.state_dict())  # what waited on the devices was not given out
        batches = loader.iter_batches()
        waiting: deque[Batch] = deque()
        self._delivered = None
        finished, turn = False, -1
        failure: Exception | None = None
        try:
            while not finished or waiting:
                while not finished and len(waiting) < (self._device_prefetch if self._sharding is not None else 1):
                    try:
                        batch = next(batches, None)
                        if batch is not None and self._sharding is not None:
                            batch.data = self._placed(batch, self._sharding, loader.topology.world_size)
                    except Exception as error:  # noqa: BLE001 - raised below, behind the batches that come before it
                        batch, failure = None, error
                    if turn < 0:
                        turn = loader.cursor.turn
                    if batch is None:
                        finished = True
                        break
                    waiting.append(batch)
                if waiting:
                    batch = waiting.popleft()
                    if turn == loader.cursor.turn:  # else another position was chosen meanwhile
                        self._delivered = (batch.epoch, batch.consumed)
                    yield batch
            if failure is not None:
                raise failure
            if turn == loader.cursor.turn:
                self._delivered = None  # the epoch is over: the loader's own state says so
        finally:
            batches.close()

    def _placed(self, batch: Batch, sharding: Sharding, world_size: int) -> Any:
        try:
            return shard_batch(batch.data, sharding, world_size)
        except SampleError as error:
            raise batch_error("placing", error, self.dataset, batch.epoch, batch.samples, batch.positions) from None
