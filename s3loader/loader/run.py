"""One iteration by one worker: positions are planned ahead, pieces fetched ahead, batches given in order."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from s3loader.errors import WorkerError
from s3loader.loader.dataset import Dataset
from s3loader.loader.fetch import Fetcher
from s3loader.loader.pieces import Block, Piece, Slots, cut_into_pieces
from s3loader.loader.stats import LoaderStats
from s3loader.plan import Gaps, Plan, Schedule, Topology
from s3loader.plan.budget import Budget
from s3loader.plan.order import Units
from s3loader.plan.permutation import Int64Array
from s3loader.store.base import Driver
from s3loader.store.buffers import shared_pool
from s3loader.transfer.diskcache import DiskCache
from s3loader.units import KIB, MIB

__all__ = ["RawBatch", "Run"]

_SLAB_POSITIONS: Final = 8192
_CHUNK_POSITIONS: Final = 4096
_FIRST_PIECE: Final = 512 * KIB
_LARGEST_PIECE: Final = 8 * MIB
_FIRST_BLOCKS: Final = 8 * MIB
"""Blocks of the first batch beyond so many bytes are not waited for: its samples are fetched alone."""
_MAX_GAP: Final = 256 * KIB
_SEQUENTIAL_GAP: Final = 16 * KIB
"""In sequential orders the gaps are other workers' samples: reading over them would read everything several times."""


class RawBatch(NamedTuple):
    """One batch before decoding: parallel to each other."""

    step: int
    positions: Int64Array
    samples: Int64Array
    items: list[Any]
    """memoryviews, dicts of memoryviews, or `Failed`."""


@dataclass(slots=True, eq=False)
class _Chunk:
    """Some steps planned together."""

    steps: range
    lengths: Int64Array
    positions: Int64Array
    samples: Int64Array
    starts: Int64Array
    """First sample of each sample's block, -1 where it comes by itself."""
    slots: Int64Array
    """Slot of each sample in its block, or in `alone`."""
    alone: Slots
    blocks: dict[int, Block] = field(default_factory=dict)


class _Slab(NamedTuple):
    """What comes at many steps; all but `steps` and `ends` are parallel."""

    steps: range
    ends: Int64Array
    """End of each step's positions, after a 0."""
    positions: Int64Array
    samples: Int64Array
    units: Units | None


class _Wanted(NamedTuple):
    samples: Int64Array
    """Rising."""
    first_use: Int64Array | int
    """Index in the chunk at which each is first needed, or all of them."""
    target: Slots

    def use(self, piece: Piece) -> int:
        """Index in the chunk at which something of `piece` is first needed."""
        if isinstance(self.first_use, int):
            return self.first_use
        return int(self.first_use[piece.at : piece.at + len(piece.numbers)].min())


_END: Final = object()
_NO_SLOTS: Final = Slots(0)


class Run:
    """The batches of one worker of one rank, from where `schedule` starts."""

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        epoch: int,
        schedule: Schedule,
        gaps: Gaps,
        topology: Topology,
        *,
        first_step: int,
        memory_limit: int,
        prefetch: int,
        driver: Driver,
        concurrency: int | None,
        verify: bool,
        stats: LoaderStats,
        cache: DiskCache | None = None,
        hedge_after: float | None = None,
    ) -> None:
        self._dataset = dataset
        self._plan = plan
        self._epoch = epoch
        self._schedule = schedule
        self._gaps = gaps
        self._topology = topology
        steps = schedule.worker_steps(topology)
        self._steps = steps[max(0, -(-(first_step - topology.worker) // topology.workers)) :]
        self._stats = stats
        total_bytes = round(plan.total_bytes * dataset.shares.fetched)
        self._average = max(1, total_bytes // max(1, plan.samples))
        self._memory_limit = memory_limit
        self.budget = Budget.divide(memory_limit, prefetch, open_bytes=self._open_bytes(), total_bytes=total_bytes)
        self._fetcher = Fetcher(
            dataset.store,
            grouped=dataset.group is not None,
            verify=verify,
            max_bytes=self.budget.in_flight,
            driver=driver,
            concurrency=concurrency,
            stats=stats,
            cache=cache,
            hedge_after=hedge_after,
        )
        self._chunks: deque[_Chunk] = deque()
        self._open: dict[int, Block] = {}
        self._begun = False
        self._spread = 1.0
        """Bytes that are kept for each byte of a sample: gaps are read over, and stay while a neighbour waits."""
        self._piece_size = _FIRST_PIECE
        self._max_gap = _SEQUENTIAL_GAP if plan.spec.get("shuffle") in ("none", "shard") else _MAX_GAP

    def _open_bytes(self) -> int:
        """Bytes of the blocks that are open side by side for this worker; 0 where the order has no blocks."""
        some = self._schedule.positions(self._topology.rank, self._steps[:4096])[0][: 1 << 20]
        return self._plan.order.open_samples(self._gaps.expand(some)) * self._average

    # -- planning (drawn by the fetcher) -----------------------------------------------------

    def _pieces(self) -> Iterator[Piece]:
        some = 1
        for slab in self._slabs():
            at = 0
            while at < len(slab.steps):
                end = min(at + some, len(slab.steps))
                begun = time.perf_counter()
                pieces = self._plan_chunk(slab, at, end)
                self._stats.plan += time.perf_counter() - begun
                if not self.budget.whole_blocks:
                    useful = self._average * int(slab.ends[end] - slab.ends[at])
                    self._spread = max(self._spread, sum(piece.end - piece.start for piece in pieces) / useful)
                yield from pieces
                at = end
                some = max(1, min(self._positions_ahead() // self._schedule.batch_size, 2 * some))
                self._piece_size = min(_LARGEST_PIECE, 2 * self._piece_size)

    def _slabs(self) -> Iterator[_Slab]:
        """Which samples come, thousands of positions at a time; the first few soon."""
        steps, at, some = self._steps, 0, 1
        most = max(1, _SLAB_POSITIONS // self._schedule.batch_size)
        while at < len(steps):
            begun = time.perf_counter()
            part = steps[at : at + some]
            kept, lengths = self._schedule.positions(self._topology.rank, part)
            positions = self._gaps.expand(kept)
            samples = self._plan.samples_at(positions, self._epoch)
            units = self._plan.units(positions, samples, self._epoch) if self.budget.whole_blocks else None
            ends = np.concatenate([[0], np.cumsum(lengths)])
            slab = _Slab(part, ends, positions, samples, units)
            self._stats.plan += time.perf_counter() - begun
            yield slab
            at += some
            some = min(most, 4 * some)

    def _positions_ahead(self) -> int:
        return min(_CHUNK_POSITIONS, int(self.budget.look_ahead / (self._average * self._spread)))

    def _plan_chunk(self, slab: _Slab, low: int, high: int) -> list[Piece]:
        """Plan steps `low` to `high` of a slab; what they need and no earlier ones have asked for, in order of first use."""
        here = slice(int(slab.ends[low]), int(slab.ends[high]))
        samples = slab.samples[here]
        none = np.full(len(samples), -1, dtype=np.int64)
        chunk = _Chunk(
            slab.steps[low:high], np.diff(slab.ends[low : high + 1]), slab.positions[here], samples, none, none, _NO_SLOTS
        )
        wanted: list[_Wanted] = []
        gap = self._max_gap
        if slab.units is not None:
            units = Units(*(column[here] for column in slab.units))
            if self._begins_alone(units):
                gap = _SEQUENTIAL_GAP
            else:
                wanted += self._open_blocks(chunk, units)
        where = np.flatnonzero(chunk.starts < 0)
        if len(where):
            alone, first, which = np.unique(samples[where], return_index=True, return_inverse=True)
            chunk.alone = Slots(len(alone))
            chunk.slots = chunk.slots.copy()
            chunk.slots[where] = which
            wanted.append(_Wanted(alone, where[first], chunk.alone))
        pieces = self._cut(wanted, gap)
        self._chunks.append(chunk)
        return pieces

    def _begins_alone(self, units: Units) -> bool:
        """Whether this is the first batch and its blocks are many bytes to wait for, as in the middle of a window where another
        run stopped: then its samples are fetched alone, and the blocks come right behind them."""
        if self._begun:
            return False
        self._begun = True
        blocks = np.unique(units.start, return_index=True)[1]
        return int(np.maximum(units.length[blocks], 0).sum()) * self._average > _FIRST_BLOCKS

    def _open_blocks(self, chunk: _Chunk, units: Units) -> list[_Wanted]:
        """Note which block each sample comes from; open those that are not, in order of first use."""
        # Padding goes back to the start of the epoch, whose blocks are closed.
        forward = np.maximum.accumulate(chunk.positions) == chunk.positions
        inside = (units.length > 0) & forward
        if not inside.any() and not self._open:
            return []
        now = int(chunk.positions[0])
        self._open = {start: block for start, block in self._open.items() if block.until > now}
        chunk.starts = np.where(inside, units.start, -1)
        new = list(self._missing_blocks(chunk, units))
        late = (units.length < 0) & forward
        if late.any() and (kept := late & np.isin(units.start, list(self._open))).any():
            chunk.starts[kept] = units.start[kept]
            chunk.blocks |= {start: self._open[start] for start in np.unique(units.start[kept]).tolist()}
        chunk.slots = chunk.samples - chunk.starts
        return new

    def _missing_blocks(self, chunk: _Chunk, units: Units) -> Iterator[_Wanted]:
        """Open the blocks of `chunk` that are not."""
        first = np.sort(np.unique(chunk.starts, return_index=True)[1])
        rows = zip(*(column[first].tolist() for column in (chunk.starts, units.length, units.until)), strict=True)
        for i, (start, length, until) in zip(first.tolist(), rows, strict=True):
            if start < 0:
                continue
            block = self._open.get(start)
            if block is None:
                block = self._open[start] = Block(start, length, until)
                yield _Wanted(np.arange(start, start + length, dtype=np.int64), i, block)
            block.until = max(block.until, until)
            chunk.blocks[start] = block

    def _cut(self, wanted: list[_Wanted], max_gap: int) -> list[Piece]:
        if not wanted:
            return []
        # All at once: a few calls of numpy for hundreds of blocks.
        parts, numbers = self._plan.locate(np.concatenate([want.samples for want in wanted]))
        changes = np.flatnonzero(np.diff(parts)) + 1
        layouts = self._dataset.layouts(parts[[0, *changes.tolist()]].tolist())
        bounds = list(itertools.accumulate((len(want.samples) for want in wanted), initial=0))
        edges = sorted({*bounds, *changes.tolist()})
        of_part = parts[edges[:-1]].tolist()
        keyed: list[tuple[int, Piece]] = []
        run = 0
        for want, begin, end in zip(wanted, bounds, bounds[1:], strict=False):
            while edges[run] < end:
                low, high = edges[run : run + 2]
                layout = layouts[of_part[run]]
                pieces = cut_into_pieces(
                    layout, numbers[low:high], want.target, low - begin, max_gap=max_gap, max_size=self._piece_size
                )
                keyed += [(want.use(piece), piece) for piece in pieces]
                run += 1
        keyed.sort(key=lambda pair: pair[0])
        return [piece for _, piece in keyed]

    # -- delivery ----------------------------------------------------------------------------

    def __iter__(self) -> Generator[RawBatch, None, None]:
        arrivals = self._fetcher.run(self._pieces())
        with shared_pool().bounded(self._memory_limit), closing(arrivals):
            while True:
                while not self._chunks:
                    if next(arrivals, _END) is _END and not self._chunks:
                        return
                yield from self._batches(self._chunks.popleft(), arrivals)

    def _batches(self, chunk: _Chunk, arrivals: Iterator[None]) -> Iterator[RawBatch]:
        at = 0
        for step, length in zip(chunk.steps, chunk.lengths.tolist(), strict=True):
            here = slice(at, at + length)
            items = self._collect(chunk, chunk.starts[here].tolist(), chunk.slots[here].tolist(), arrivals)
            yield RawBatch(step, chunk.positions[here], chunk.samples[here], items)
            at += length

    def _collect(self, chunk: _Chunk, starts: list[int], slots: list[int], arrivals: Iterator[None]) -> list[Any]:
        blocks, alone = chunk.blocks, chunk.alone
        for start in set(starts):
            if start >= 0:
                block = blocks[start]
                while block.left:
                    _advance(arrivals)
        items: list[Any] = []
        add = items.append
        used = 0
        for start, slot in zip(starts, slots, strict=True):
            place: Slots = blocks[start] if start >= 0 else alone
            source = place.source[slot]
            while source is None:
                _advance(arrivals)
                source = place.source[slot]
            if type(source) is memoryview:  # the usual case of `Slots.take`, without the call
                start, end = place.starts[slot], place.ends[slot]
                add(source[start:end])
                used += end - start
            else:
                add(place.take(slot))
                used += place.ends[slot]
        self._stats.bytes_used += used
        return items


def _advance(arrivals: Iterator[None]) -> None:
    if next(arrivals, _END) is _END:
        raise WorkerError("the fetcher ended before it delivered all samples")  # a defect of ours, never silent
