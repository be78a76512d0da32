"""Several datasets in one sequence, with weights that hold exactly in every window.

The weights become whole quotas per period of W positions. Inside a period the slots are dealt by
earliest deadline first: the j-th slot of a dataset with quota n may not come before ``j * W / n`` and must
come before ``(j + 1) * W / n`` (rounded outwards). This is the P-fair schedule of one processor (Baruah, Cohen, Plaxton
and Varvel, 1996): no prefix is ever off by a whole sample, and every window of W positions holds the exact quotas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeAlias

import numpy as np

from s3loader.errors import PlanError
from s3loader.plan.order import Order, Units, join_units
from s3loader.plan.permutation import Int64Array

__all__ = ["Length", "MixtureOrder", "MixtureSpec", "quotas"]

Length: TypeAlias = Literal["all", "first"] | int
MAX_PERIOD = 1000


def quotas(weights: Sequence[float], period: int | None = None) -> tuple[int, ...]:
    """Whole numbers of slots per period, in the ratio of `weights` (largest remainders).

    Without a `period` the smallest one up to 1000 that holds the weights exactly, else 1000.

    Raises:
        PlanError: a weight is not positive, or too small to have a slot in the period.
    """
    if not weights or any(not w > 0 or w == float("inf") for w in weights):
        raise PlanError(
            f"weights must be positive numbers, not {list(weights)}", hint="leave a dataset out to give it no weight"
        )
    exact = [Fraction(w).limit_denominator(10**6) for w in weights]
    total = sum(exact)
    shares = [w / total for w in exact] if total else []
    if period is None:
        period = min(MAX_PERIOD, int(np.lcm.reduce([share.denominator for share in shares]))) if shares else 1
        period = period if period > 0 else MAX_PERIOD
    counts = [int(share * period) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda d: (counts[d] - shares[d] * period, d))
    for d in by_remainder[: period - sum(counts)]:
        counts[d] += 1
    if not counts or min(counts) == 0:
        raise PlanError(
            f"the weights {list(weights)} leave a dataset without a sample in {period}",
            hint="give a longer period, or drop that dataset",
        )
    return tuple(counts)


@dataclass(frozen=True, slots=True)
class MixtureSpec:
    """How datasets are interleaved; `length` is the number of positions in an epoch."""

    quotas: tuple[int, ...]
    length: int

    def as_dict(self) -> dict[str, Any]:
        """As stored in a state."""
        return {"quotas": list(self.quotas), "length": self.length}


def deal(counts: Sequence[int]) -> Int64Array:
    """The dataset of each slot of a period: int64, length ``sum(counts)``."""
    period = sum(counts)
    taken = [0] * len(counts)
    pattern = np.empty(period, dtype=np.int64)
    for slot in range(period):
        due = [
            (-(-(taken[d] + 1) * period // n), d)
            for d, n in enumerate(counts)
            if taken[d] < n and taken[d] * period // n <= slot
        ]
        chosen = min(due)[1]
        taken[chosen] += 1
        pattern[slot] = chosen
    return pattern


class MixtureOrder:
    """The order of a mixture. Samples are numbered with the datasets laid end to end.

    A dataset's own sequence goes on from one epoch of the mixture to the next, and starts over in a
    new order whenever it is through: nothing is seen a third time before all is seen twice.
    """

    def __init__(self, orders: Sequence[Order], counts: Sequence[int], length: Length = "all") -> None:
        if any(order.size == 0 for order in orders):
            raise PlanError("a dataset of the mixture has no samples", hint="leave it out of the mixture")
        self.orders = orders
        self._counts = counts
        self._period = sum(counts)
        self._pattern = deal(counts)
        self._slots = [np.flatnonzero(self._pattern == d) for d in range(len(counts))]
        self._rank = np.empty(self._period, dtype=np.int64)
        for slots in self._slots:
            self._rank[slots] = np.arange(len(slots))
        self._base = np.cumsum([0, *(order.size for order in orders)])
        ends = [int(self._position(d, order.size - 1)) + 1 for d, order in enumerate(orders)]
        if length not in ("all", "first") and (isinstance(length, bool) or not isinstance(length, int)):
            raise PlanError(f"a mixture of {length!r} samples", hint='its length is "all", "first" or a whole number from 1')
        self.size = max(ends) if length == "all" else min(ends) if length == "first" else int(length)
        if self.size < 1:
            raise PlanError(f"a mixture of {length!r} samples", hint="its length is a whole number from 1")
        whole, part = divmod(self.size, self._period)
        self._per_epoch = [whole * n + int((slots < part).sum()) for n, slots in zip(counts, self._slots, strict=True)]
        self.spec = MixtureSpec(tuple(counts), self.size)

    def _position(self, d: int, index: Any) -> Any:
        """Where sample `index` (0-based, of one epoch) of dataset `d` stands."""
        around, slot = np.divmod(index, self._counts[d])
        return around * self._period + self._slots[d][slot]

    def _split(self, positions: Int64Array, epoch: int) -> list[tuple[int, int, Int64Array, Int64Array]]:
        """(dataset, its own epoch, where in `positions`, its own positions) of each group."""
        around, slot = np.divmod(positions, self._period)
        dataset = self._pattern[slot]
        groups = []
        for d in range(len(self.orders)):
            here = np.flatnonzero(dataset == d)
            index = around[here] * self._counts[d] + self._rank[slot[here]] + epoch * self._per_epoch[d]
            own_epoch, own = np.divmod(index, self.orders[d].size)
            for e in np.unique(own_epoch):
                mine = own_epoch == e
                groups.append((d, int(e), here[mine], own[mine]))
        return groups

    def samples_at(self, positions: Int64Array, epoch: int) -> Int64Array:
        """The sample at each position."""
        out = np.empty_like(positions)
        for d, own_epoch, where, own in self._split(positions, epoch):
            out[where] = self.orders[d].samples_at(own, own_epoch) + self._base[d]
        return out

    def positions_of(self, samples: Int64Array, epoch: int) -> Int64Array:
        """The first position of each sample in this epoch, -1 where it has none."""
        out = np.full_like(samples, -1)
        dataset = np.searchsorted(self._base[1:], samples, side="right")
        for d, order in enumerate(self.orders):
            here = np.flatnonzero(dataset == d)
            if not here.size:
                continue
            first, total = epoch * self._per_epoch[d], self._per_epoch[d]
            for own_epoch in range((first + total - 1) // order.size, first // order.size - 1, -1):
                index = order.positions_of(samples[here] - self._base[d], own_epoch) + own_epoch * order.size - first
                fits = (index >= 0) & (index < total)
                out[here[fits]] = self._position(d, index[fits])
        return out

    def units(self, positions: Int64Array, samples: Int64Array, epoch: int) -> Units:
        """What to fetch for `positions`, whose samples are `samples`."""
        parts = []
        for d, own_epoch, where, own in self._split(positions, epoch):
            unit = self.orders[d].units(own, samples[where] - self._base[d], own_epoch)
            ends = own_epoch * self.orders[d].size - epoch * self._per_epoch[d] + unit.until
            until = np.where(unit.length != 0, self._position(d, np.maximum(ends, 1) - 1) + 1, 0)
            parts.append((where, Units(unit.start + self._base[d], unit.length, until)))
        return join_units(parts, len(positions))

    def open_samples(self, positions: Int64Array) -> int:
        """Samples in the blocks that are open at a time for whoever takes `positions`; 0 without blocks. Of all datasets
        together."""
        return sum(self.orders[d].open_samples(own) for d, own_epoch, _, own in self._split(positions, 0) if own_epoch == 0)
