"""One epoch's sequence of samples: order, gaps and slicing put together. No I/O, no framework."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from s3loader.arguments import checked
from s3loader.errors import PlanError, StateMismatchError
from s3loader.plan.mixture import Length, MixtureOrder, quotas
from s3loader.plan.order import ALGORITHM, Order, OrderSpec, Units, locate, make_order
from s3loader.plan.permutation import Int64Array
from s3loader.plan.schedule import Gaps, PlanState, Schedule, Tail, Topology

__all__ = ["Catalog", "Occurrence", "Plan", "mix", "plan_for"]


@dataclass(frozen=True, slots=True, eq=False)
class Catalog:
    """What an order needs to know of a dataset: how many samples each shard has, and which data it is."""

    counts: Int64Array
    """Samples of each shard, int64."""
    total_bytes: int
    digest: str
    """Changes when keys, sizes, ETags, grouping or filters change."""
    units: Int64Array | None = None
    """Samples of what can only be fetched whole (row groups), laid end to end; None: samples can be fetched one by one."""

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return int(self.counts.sum())


class Occurrence(NamedTuple):
    """Where one sample stands in one epoch."""

    position: int
    epoch: int
    sample: int
    """Number of the sample: shards laid end to end."""
    shard: int
    number: int
    """Number of the sample in its shard."""
    step: int
    """-1 where the position is not delivered: left out, or dropped at the end of the epoch."""
    rank: int


@checked
@dataclass(frozen=True, eq=False)
class Plan:
    """A pure function of (data, spec, seed, epoch): which sample at which position, and back.

    Made by `plan_for` or `mix`.
    """

    order: Order
    counts: Int64Array
    """Samples of each shard; a mixture's datasets end to end."""
    spec: Mapping[str, Any]
    data_digest: str
    total_bytes: int
    skip: tuple[tuple[int, int, int], ...] = ()
    exclude: tuple[int, ...] = ()
    starts: Int64Array = field(init=False, repr=False)
    """First sample of each shard."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", np.cumsum(self.counts) - self.counts)
        if any(not 0 <= sample < self.samples for sample in self.exclude):
            raise PlanError(f"exclude names samples that are not among {self.samples}", hint="samples are numbered from 0")

    @property
    def samples(self) -> int:
        """Samples in the data."""
        return int(self.starts[-1] + self.counts[-1]) if len(self.counts) else 0

    @property
    def size(self) -> int:
        """Positions in an epoch, those left out included."""
        return self.order.size

    @property
    def digest(self) -> str:
        """16 hex digits that name the sequence: algorithm, data, spec and seed."""
        text = json.dumps([ALGORITHM, self.data_digest, self.spec], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # -- the sequence ------------------------------------------------------------------------

    def gaps(self, epoch: int) -> Gaps:
        """Positions left out of this epoch by `skip` and `exclude`."""
        intervals = [(start, end) for e, start, end in self.skip if e == epoch]
        if self.exclude:
            positions = self.order.positions_of(np.array(self.exclude, dtype=np.int64), epoch)
            intervals += [(int(p), int(p) + 1) for p in positions if p >= 0]
        return Gaps(intervals, self.size)

    def base(self, epoch: int, kept: int) -> int:
        """The position of a kept position: one counted without the gaps."""
        return self.gaps(epoch).position(kept)

    def schedule(
        self, epoch: int, batch_size: int, *, world_size: int = 1, tail: Tail = "short", consumed: int = 0
    ) -> Schedule:
        """How the rest of the epoch, from position `consumed` on, is cut into batches for ranks (kept positions)."""
        gaps = self.gaps(epoch)
        if not 0 <= consumed <= self.size:
            raise PlanError(f"{consumed} samples consumed of {self.size}", hint="take the state of this dataset, or begin at 0")
        return Schedule(gaps.shrink(consumed), gaps.kept, batch_size, world_size, tail)

    def samples_at(self, positions: Int64Array, epoch: int) -> Int64Array:
        """The sample at each position (int64 in ``[0, size)``)."""
        return self.order.samples_at(positions, epoch)

    def units(self, positions: Int64Array, samples: Int64Array, epoch: int) -> Units:
        """What to fetch for these positions."""
        return self.order.units(positions, samples, epoch)

    def locate(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
        """(shard, number in the shard) of each sample."""
        return locate(self.starts, samples)

    def batches(
        self, epoch: int, topology: Topology, batch_size: int, *, tail: Tail = "short", consumed: int = 0
    ) -> Iterable[Int64Array]:
        """The batches of one worker as arrays of sample numbers; for looking at a plan, not for speed."""
        gaps, schedule = (
            self.gaps(epoch),
            self.schedule(epoch, batch_size, world_size=topology.world_size, tail=tail, consumed=consumed),
        )
        for step in schedule.worker_steps(topology):
            kept, _ = schedule.positions(topology.rank, range(step, step + 1))
            yield self.samples_at(gaps.expand(kept), epoch)

    # -- provenance --------------------------------------------------------------------------

    def where(
        self, position: int, epoch: int = 0, *, batch_size: int = 1, world_size: int = 1, tail: Tail = "short", start: int = 0
    ) -> Occurrence:
        """What stands at `position`, and which rank gets it at which step of a run that began at position `start`.

        Raises:
            PlanError: there is no such position.
        """
        if not 0 <= position < self.size:
            raise PlanError(
                f"position {position} of {self.size} does not exist", hint="positions and samples are numbered from 0"
            )
        sample = self.samples_at(np.array([position], dtype=np.int64), epoch)
        shard, number = self.locate(sample)
        step, rank = self._step(position, epoch, batch_size, world_size, tail, start)
        return Occurrence(position, epoch, int(sample[0]), int(shard[0]), int(number[0]), step, rank)

    def find(
        self, sample: int, epoch: int = 0, *, batch_size: int = 1, world_size: int = 1, tail: Tail = "short", start: int = 0
    ) -> Occurrence | None:
        """The inverse of `where`; None where the sample does not occur in this epoch of a mixture.

        Raises:
            PlanError: there is no such sample.
        """
        if not 0 <= sample < self.samples:
            raise PlanError(
                f"sample {sample} of {self.samples} does not exist", hint="positions and samples are numbered from 0"
            )
        position = int(self.order.positions_of(np.array([sample], dtype=np.int64), epoch)[0])
        if position < 0:
            return None
        return self.where(position, epoch, batch_size=batch_size, world_size=world_size, tail=tail, start=start)

    def _step(self, position: int, epoch: int, batch_size: int, world_size: int, tail: Tail, start: int) -> tuple[int, int]:
        gaps = self.gaps(epoch)
        schedule = self.schedule(epoch, batch_size, world_size=world_size, tail=tail, consumed=start)
        kept = gaps.shrink(position)
        if position < start or any(a <= position < b for a, b in gaps.intervals):
            return -1, -1
        step, inner = divmod(kept - schedule.start, schedule.stride)
        if step < schedule.full_steps or tail == "pad":
            return step, inner // batch_size
        if tail == "drop":
            return -1, -1
        left = (schedule.size - schedule.start) % schedule.stride
        return step, inner * world_size // left

    # -- state -------------------------------------------------------------------------------

    def state(self, epoch: int, consumed: int) -> PlanState:
        """The state after `consumed` positions of `epoch`."""
        return PlanState(self.digest, self.spec, epoch, consumed, self.skip, self.exclude)

    def check(self, state: PlanState) -> None:
        """Refuse a state of another sequence.

        Raises:
            StateMismatchError: naming what differs: the data, or which entries of the spec.
        """
        if state.plan_digest == self.digest:
            if state.consumed > self.size:
                raise StateMismatchError(f"the state is at sample {state.consumed} of {self.size}", differs=["consumed"])
            return
        differs = [
            f"{name} ({state.spec.get(name)!r} in the state, {self.spec.get(name)!r} here)"
            for name in sorted({*state.spec, *self.spec})
            if state.spec.get(name) != self.spec.get(name)
        ] or ["the dataset (other keys, sizes, ETags, grouping or filter)"]
        raise StateMismatchError(
            f"the state belongs to another sequence; what differs: {', '.join(differs)}",
            hint="restore the dataset and options, or give allow_changed=True to go on with the new ones at the same count",
            differs=differs,
        )


def plan_for(
    catalog: Catalog, spec: OrderSpec, *, skip: Sequence[tuple[int, int, int]] = (), exclude: Sequence[int] = ()
) -> Plan:
    """The plan of one dataset."""
    order = make_order(catalog.counts, spec, catalog.units)
    return Plan(order, catalog.counts, spec.as_dict(), catalog.digest, catalog.total_bytes, tuple(skip), tuple(exclude))


def mix(
    catalogs: Sequence[Catalog],
    specs: Sequence[OrderSpec],
    *,
    weights: Sequence[float] | None = None,
    period: int | None = None,
    length: Length = "all",
    counts: Sequence[int] | None = None,
    skip: Sequence[tuple[int, int, int]] = (),
    exclude: Sequence[int] = (),
) -> Plan:
    """The plan of several datasets interleaved by `weights` (default: by their sizes).

    Args:
        catalogs: The datasets; their samples are numbered end to end.
        specs: The order inside each of them; give them different seeds.
        weights: Positive, in any scale.
        period: Every window of this many positions holds the same whole number of samples of each dataset,
            the weights rounded by less than one. Default: the smallest exact one up to 1000.
        length: Positions in an epoch: until each dataset was seen whole (``"all"``), until the first was (``"first"``),
            or a number.
        counts: Quotas as a state has them, instead of weights.
        skip: ``(epoch, start, end)``: positions to leave out.
        exclude: Numbers of samples to leave out, in every epoch.
    """
    if not catalogs or len(catalogs) != len(specs):
        raise PlanError("a mixture needs datasets, and a spec for each", hint="one spec for each dataset")
    shares = list(weights) if weights is not None else [float(catalog.samples) for catalog in catalogs]
    if len(shares) != len(catalogs):
        raise PlanError(f"{len(shares)} weights for {len(catalogs)} datasets", hint="one weight for each dataset")
    orders = [make_order(catalog.counts, spec, catalog.units) for catalog, spec in zip(catalogs, specs, strict=True)]
    order = MixtureOrder(orders, tuple(counts) if counts is not None else quotas(shares, period), length)
    spec = {"mix": [one.as_dict() for one in specs], **order.spec.as_dict()}
    digest = hashlib.sha256("\n".join(catalog.digest for catalog in catalogs).encode()).hexdigest()[:16]
    total = sum(catalog.total_bytes for catalog in catalogs)
    return Plan(
        order, np.concatenate([catalog.counts for catalog in catalogs]), spec, digest, total, tuple(skip), tuple(exclude)
    )
