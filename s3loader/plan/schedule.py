"""Who takes which positions: batches, ranks, workers, the end of the epoch, positions left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from s3loader.errors import ConfigError, PlanError
from s3loader.plan.permutation import Int64Array

__all__ = ["Gaps", "Schedule", "Tail", "Topology"]

Tail: TypeAlias = Literal["drop", "pad", "short"]
"""What happens to the samples that do not fill a batch on every rank. ``"drop"``: they are left out.
``"pad"``: they are filled up with the first samples of the epoch. ``"short"``: they are divided among the
ranks as evenly as it goes; only where there are fewer of them than ranks, some ranks have a batch less."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Who of how many: a rank, and a worker of that rank."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        for name, index, count in (("rank", self.rank, self.world_size), ("worker", self.worker, self.workers)):
            if count < 1 or not 0 <= index < count:
                raise ConfigError(
                    f"{name} {index} of {count} does not exist",
                    hint="rank is from 0 to world_size - 1, worker from 0 to workers - 1",
                )


class Gaps:
    """Positions left out of a sequence of `size`, as sorted ``[start, end)`` intervals.

    What is left is renumbered without holes: ``kept`` position q is position ``expand(q)``.
    """

    def __init__(self, intervals: Iterable[tuple[int, int]], size: int) -> None:
        merged: list[list[int]] = []
        for start, end in sorted((max(0, a), min(b, size)) for a, b in intervals):
            if end <= start:
                continue
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        self.size = size
        self.intervals = [(a, b) for a, b in merged]
        starts = np.array([a for a, _ in merged], dtype=np.int64)
        lengths = np.array([b - a for a, b in merged], dtype=np.int64)
        self._removed = np.cumsum(lengths)
        self._kept_before = starts - (self._removed - lengths)
        self.kept = size - (int(self._removed[-1]) if merged else 0)

    def __bool__(self) -> bool:
        return bool(self.intervals)

    def expand(self, kept: Int64Array) -> Int64Array:
        """The position of each kept position; `self.kept` itself becomes `self.size`."""
        if not self.intervals:
            return kept
        before = np.searchsorted(self._kept_before, kept, side="right")
        out = kept + np.where(before > 0, self._removed[before - 1], 0)
        return np.where(kept >= self.kept, self.size, out)

    def position(self, kept: int) -> int:
        """The position of one kept position."""
        return int(self.expand(np.array([kept], dtype=np.int64))[0]) if self.intervals else kept

    def shrink(self, position: int) -> int:
        """How many kept positions lie before `position`."""
        return position - sum(min(b, position) - a for a, b in self.intervals if a < position)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Step k of rank r takes positions ``start + (k * world_size + r) * batch_size`` and on, for one batch.

    Worker w of W takes the steps ``k = w (mod W)``. All numbers here are kept positions (those that are left when gaps are
    taken out).
    """

    start: int
    """Already consumed."""
    size: int
    """Positions in the epoch."""
    batch_size: int
    world_size: int = 1
    tail: Tail = "short"

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise PlanError(
                f"batch_size must be a whole number from 1, not {self.batch_size!r}", hint="samples per batch and rank"
            )
        if self.tail not in get_args(Tail):
            raise PlanError(f"unknown tail {self.tail!r}", hint='use "drop", "pad" or "short"')
        if not 0 <= self.start <= self.size:
            raise PlanError(
                f"{self.start} samples consumed of {self.size}", hint="take the state of this dataset, or begin at 0"
            )

    @property
    def stride(self) -> int:
        """Samples of one step over all ranks."""
        return self.batch_size * self.world_size

    @property
    def full_steps(self) -> int:
        """Steps in which every rank has a full batch of new samples."""
        return (self.size - self.start) // self.stride

    def steps(self, rank: int = 0) -> int:
        """Batches of this rank; the same on every rank unless a short tail has fewer samples than ranks."""
        left = (self.size - self.start) % self.stride
        if self.tail == "drop" or left == 0:
            return self.full_steps
        if self.tail == "pad":
            return self.full_steps + 1
        return self.full_steps + (self._share(left, rank) < self._share(left, rank + 1))

    def _share(self, left: int, rank: int) -> int:
        return -(-left * rank // self.world_size)

    def worker_steps(self, topology: Topology) -> range:
        """The steps of one worker of one rank."""
        return range(topology.worker, self.steps(topology.rank), topology.workers)

    def positions(self, rank: int, steps: range) -> tuple[Int64Array, Int64Array]:
        """(positions of all `steps` of `rank` end to end, length of each batch).

        Padding positions are taken from the start of the epoch.
        """
        k = np.arange(steps.start, steps.stop, steps.step, dtype=np.int64)
        lengths = np.full(len(k), self.batch_size, dtype=np.int64)
        first = self.start + (k * self.world_size + rank) * self.batch_size
        if len(k) and self.tail == "short" and k[-1] >= self.full_steps:
            left = (self.size - self.start) % self.stride
            first[-1] = self.start + self.full_steps * self.stride + self._share(left, rank)
            lengths[-1] = self._share(left, rank + 1) - self._share(left, rank)
        ends = np.cumsum(lengths)
        out = np.arange(int(ends[-1]) if len(k) else 0, dtype=np.int64) + np.repeat(first - (ends - lengths), lengths)
        if self.tail == "pad":
            out %= max(1, self.size)
        return out, lengths

    def samples_in(self, rank: int, steps: range) -> int:
        """Samples of the batches `steps` of `rank`, padding included."""
        samples = len(steps) * self.batch_size
        if steps and self.tail == "short" and steps[-1] >= self.full_steps:
            left = (self.size - self.start) % self.stride
            samples += self._share(left, rank + 1) - self._share(left, rank) - self.batch_size
        return samples

    def consumed_after(self, step: int) -> int:
        """Positions consumed when `step` steps are done on every rank."""
        return min(self.size, self.start + step * self.stride)
