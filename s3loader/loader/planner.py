"""The planner: which samples a worker's steps need and with which reads they come, decided ahead of the network.

Arithmetic, and the indexes of shards, which it reads in bulk: while one window of steps is planned, the indexes of the next
one are on their way. `Loader.explain` runs the same planner without reading samples.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from s3loader.errors import ObjectNotFoundError, S3LoaderError, ShardReadError
from s3loader.loader.dataset import Dataset
from s3loader.loader.layout import Layout, LooseRun, OpenBlock, SampleBuffer, SampleRead, Shard, plan_reads
from s3loader.plan import DryRun, Plan, Schedule, Topology
from s3loader.plan.budget import GET_WORTH, Budget
from s3loader.plan.mixture import MixtureOrder
from s3loader.plan.order import BlockOrder, FullOrder, Order, UnitOrder, Units, UnitsAsTheyCome, locate
from s3loader.plan.permutation import Int64Array
from s3loader.shard.index import ShardIndex
from s3loader.shard.samples import Grouping
from s3loader.units import KIB, MIB

__all__ = ["Chunk", "Planner"]

_WINDOW_POSITIONS: Final = 8192
_CHUNK_POSITIONS: Final = 4096
_WHOLE_POSITIONS: Final = 1 << 18
"""Positions planned at a time where all that is fetched for them fits into memory."""
_FIRST_READ: Final = 512 * KIB
"""Largest read of the first chunk; it doubles with each chunk up to `_LARGEST_READ`."""
_LARGEST_READ: Final = 4 * MIB
_SMALLEST_SHARE: Final = 1 * MIB
_PARALLEL: Final = 4
"""Reads that a small dataset is split into, so that they come side by side; none of them smaller than `_SMALLEST_SHARE`."""
_FIRST_BYTES: Final = 8 * MIB
"""What would make the first batch wait for more bytes than this is fetched behind it: its samples come alone."""
_SEQUENTIAL_GAP: Final = 16 * KIB
"""In sequential orders the gaps are other workers' samples: reading over them would read everything several times."""
_INDEX_BYTES: Final = 32 * MIB
"""Indexes of one window that are read ahead, by what they take in memory."""
_BYTES_PER_MEMBER: Final = 100


@dataclass(slots=True, eq=False)
class Chunk:
    """Some steps of one worker that were planned together. All arrays are int64; those "per sample" have one entry for each
    sample of each batch, batches end to end."""

    steps: range
    lengths: Int64Array
    """Samples of each step's batch."""
    positions: Int64Array
    """Position in the epoch, per sample."""
    samples: Int64Array
    """Number in the dataset, per sample."""
    starts: Int64Array
    """First sample of the block that holds it, per sample; -1 where it comes by itself."""
    slots: Int64Array
    """Slot in its block, or in `alone`, per sample."""
    alone: SampleBuffer
    """Samples that come by themselves."""
    blocks: dict[int, OpenBlock] = field(default_factory=dict)
    """By first sample."""
    reads: list[SampleRead] = field(default_factory=list)
    """What no earlier chunk has asked for, in order of first use."""


class _Window(NamedTuple):
    """What comes at some steps; the arrays are int64, and all but `ends` have one entry per sample."""

    steps: range
    ends: Int64Array
    """0, then the end of each step's samples: steps + 1."""
    positions: Int64Array
    samples: Int64Array
    units: Units | None
    """Where blocks are kept."""
    at_once: bool
    """Planned as one chunk."""


class _Unfetched(NamedTuple):
    """Samples that no earlier chunk has asked for, and the buffer they go to."""

    samples: Int64Array
    """Numbers in the dataset, rising."""
    first_use: Int64Array | int
    """Index in the chunk at which each is first needed, or all of them."""
    target: SampleBuffer

    def use(self, read: SampleRead) -> int:
        """Index in the chunk at which something of `read` is first needed."""
        if isinstance(self.first_use, int):
            return self.first_use
        return int(self.first_use[read.at : read.at + len(read.numbers)].min())


class Planner:
    """Plans the steps of one worker of one rank, chunk by chunk, in an order that depends on nothing but its arguments.

    Args:
        dataset: Whose samples.
        plan: Their order.
        epoch: Of the order.
        schedule: How the rest of the epoch is cut into batches.
        topology: Whose steps.
        first_step: Steps before this one are left out.
        memory_limit: Bytes that this process may hold.
        prefetch: Most bytes that are fetched ahead.
        from_averages: Take the samples of each shard to be of one size, without reading its index: to estimate, not to read.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        epoch: int,
        schedule: Schedule,
        topology: Topology,
        *,
        first_step: int = 0,
        memory_limit: int,
        prefetch: int,
        from_averages: bool = False,
    ) -> None:
        self._dataset = dataset
        self._plan = plan
        self._order = plan.order
        self._epoch = epoch
        self._schedule = schedule
        self._gaps = plan.gaps(epoch)
        self._in_units = _in_units(self._order)
        self._topology = topology
        steps = schedule.worker_steps(topology)
        self._steps = steps[max(0, -(-(first_step - topology.worker) // topology.workers)) :]
        total_bytes = round(plan.total_bytes * dataset.member_savings.fetched)
        self._average = max(1, total_bytes // max(1, plan.samples))
        self._open_bytes = self._bytes_of_open_blocks()
        self.budget = Budget.divide(
            memory_limit,
            prefetch,
            open_bytes=self._open_bytes,
            total_bytes=total_bytes,
            whole_bytes=None if self._in_units else self._whole_bytes(),
            in_units=self._in_units,
        )
        self._spare = memory_limit - self.budget.resident - self.budget.in_flight
        self._open: dict[int, OpenBlock] = {}
        self._begun = False
        self._spread = 1.0
        """Bytes that are kept for each byte of a sample: gaps are read over, and stay while a neighbour waits."""
        self._read_size = _FIRST_READ
        sequential = plan.spec.get("shuffle") in ("none", "shard")
        self._max_gap = _SEQUENTIAL_GAP if sequential else GET_WORTH
        if self.budget.strategy == "whole":
            self._max_gap = GET_WORTH
            self._read_size = max(_SMALLEST_SHARE, min(_LARGEST_READ, -(-self.budget.resident // _PARALLEL)))
        self._layouts = _AverageLayouts(dataset, plan.counts) if from_averages else _LayoutsAhead(dataset)
        self._windows = self._all_windows()
        self._window = next(self._windows, None)
        self._following: deque[_Window] = deque()
        self._at = 0
        self._some = 1

    @property
    def done(self) -> bool:
        """Whether all steps were planned."""
        return self._window is None

    @property
    def ready(self) -> bool:
        """Whether the next chunk can be planned without waiting for indexes that are on their way."""
        return self._at > 0 or self._layouts.ready

    def close(self) -> None:
        """Wait for no index any more."""
        self._layouts.close()

    def __iter__(self) -> Iterator[Chunk]:
        """All chunks that are left."""
        while not self.done:
            yield self.next_chunk()

    def next_chunk(self) -> Chunk:
        """Plan the next steps; reads the indexes that are not at hand."""
        window = self._window
        assert window is not None
        if not self._following:
            self._look_further(window)
        end = len(window.steps) if window.at_once else min(self._at + self._some, len(window.steps))
        chunk = self._plan_chunk(window, self._at, end)
        if self.budget.strategy == "samples":
            useful = self._average * len(chunk.samples)
            kept = sum(read.nbytes for read in chunk.reads if read.layout is not None and not read.layout.loose)
            self._spread = max(self._spread, kept / useful)
        if self.budget.strategy != "whole":
            self._read_size = min(_LARGEST_READ, 2 * self._read_size)
        self._some = max(1, min(self._positions_ahead() // self._schedule.batch_size, 2 * self._some))
        self._at = end
        if end == len(window.steps):
            self._window, self._at = (self._following.popleft() if self._following else None), 0
        return chunk

    # -- what it would cost ------------------------------------------------------------------

    def dry_run(self, most_samples: int) -> DryRun:
        """Plan all steps that are left, or the first `most_samples` samples of them; count what they would read.

        Of a block that is open at the end the part of its time that is over counts.
        """
        samples = self._schedule.samples_in(self._topology.rank, self._steps)
        run = DryRun(self.budget, self._open_bytes, samples)
        of_blocks: list[tuple[OpenBlock, int, int]] = []
        now = 0
        for chunk in self:
            run.planned += len(chunk.samples)
            for read in chunk.reads:
                requests = read.requests()
                fetched = sum((request.end or request.start) - request.start for request in requests)
                if isinstance(read.target, OpenBlock):
                    of_blocks.append((read.target, len(requests), fetched))
                    run.blocks.add((read.target.start, read.target.until))
                else:
                    run.requests += len(requests)
                    run.bytes_fetched += fetched
            self._count_content(chunk, run)
            now = int(chunk.positions[-1])
            if run.planned >= most_samples:
                break
        whole = run.planned == samples
        for block, requests_of, fetched in of_blocks:
            over = 1.0 if whole else min(1.0, (now + 1 - block.opened) / max(1, block.until - block.opened))
            run.requests += over * requests_of
            run.bytes_fetched += over * fetched
        self.close()
        return run

    def _count_content(self, chunk: Chunk, run: DryRun) -> None:
        """Add the bytes of a chunk's samples to `run`."""
        of_sample, numbers = locate(self._plan.starts, chunk.samples)
        order = np.argsort(of_sample, kind="stable")
        edges = np.flatnonzero(np.diff(of_sample[order], prepend=-1)).tolist()
        here = of_sample[order[edges]].tolist()
        layouts = self._layouts.get(here)
        for part, low, high in zip(here, edges, [*edges[1:], len(order)], strict=True):
            layout = layouts[part]
            if isinstance(layout, S3LoaderError):
                run.unreadable.add(part)
                continue
            ends = np.concatenate([[0], np.cumsum(np.maximum(layout.sizes, 0))])
            mine = numbers[order[low:high]]
            content = int((ends[layout.first[mine + 1]] - ends[layout.first[mine]]).sum())
            run.bytes_used += round(content * self._layouts.used)

    # -- the way of fetching -----------------------------------------------------------------

    def _bytes_of_open_blocks(self) -> int:
        """Bytes of the blocks that are open side by side for this worker; 0 where the order has no blocks."""
        some = self._schedule.positions(self._topology.rank, self._steps[:4096])[0][: 1 << 20]
        return self._order.open_samples(self._gaps.expand(some)) * self._average

    def _whole_bytes(self) -> int | None:
        """Bytes of the dataset where keeping all of it saves requests: what its order fetches together is less than a
        request is worth."""
        positions = len(self._steps) * self._schedule.batch_size
        blocks = self._natural_read(self._order)
        if not positions or blocks * self._average >= GET_WORTH or (blocks > 1 and positions > _WHOLE_POSITIONS):
            return None
        return self._dataset.stored_bytes

    def _natural_read(self, order: Order) -> int:
        """Neighbouring samples that `order` itself brings together for one process."""
        if isinstance(order, MixtureOrder):
            return min(self._natural_read(part) for part in order.orders)
        if isinstance(order, BlockOrder):
            return order.spec.block
        if isinstance(order, FullOrder):
            return 1
        alone = self._topology.world_size * self._topology.workers == 1
        return self._plan.size if alone else self._schedule.batch_size

    # -- windows: which samples come ---------------------------------------------------------

    def _all_windows(self) -> Iterator[_Window]:
        """Thousands of positions at a time; the first few soon. What can be fetched whole comes as one window."""
        steps, at, some = self._steps, 0, 1
        most = max(1, _WINDOW_POSITIONS // self._schedule.batch_size)
        tail = self._tail()
        if self.budget.strategy == "whole":
            most = max(1, _WHOLE_POSITIONS // self._schedule.batch_size)
            some = most if self.budget.resident <= _FIRST_BYTES else 1
        while at < len(steps):
            if at >= tail:
                some = most = len(steps) - at
            end = min(at + some, len(steps) if at >= tail else tail)
            at_once = at >= tail or (self.budget.strategy == "whole" and some == most)
            yield self._make_window(steps[at:end], at_once)
            at = end
            some = most if self.budget.strategy == "whole" else min(most, 4 * some)

    def _make_window(self, steps: range, at_once: bool) -> _Window:
        kept, lengths = self._schedule.positions(self._topology.rank, steps)
        positions = self._gaps.expand(kept)
        samples = self._order.samples_at(positions, self._epoch)
        units = self._order.units(positions, samples, self._epoch) if self.budget.strategy == "blocks" else None
        return _Window(steps, np.concatenate([[0], np.cumsum(lengths)]), positions, samples, units, at_once)

    def _tail(self) -> int:
        """Index of the first of the last steps, which need no block that is not open and are planned as one chunk, because
        what is fetched for them fits into memory; the number of steps where there are none."""
        steps, order, none = self._steps, self._order, len(self._steps)
        if self.budget.strategy != "blocks" or not isinstance(order, BlockOrder):
            return none
        behind = self._gaps.shrink(order.lane_samples) - self._schedule.start - self._topology.rank * self._schedule.batch_size
        first = max(0, -(-behind // self._schedule.stride))
        at = min(none, max(0, -(-(first - steps.start) // steps.step))) if none else 0
        positions = (none - at) * self._schedule.batch_size
        runs = -(-positions // order.spec.run)
        worst = min(self._plan.total_bytes, positions * self._average + runs * GET_WORTH)
        return at if positions <= _WHOLE_POSITIONS and worst <= self._spare else none

    def _look_further(self, window: _Window) -> None:
        """Have the windows that follow on `window`, thousands of positions; what is missing of their indexes is asked for."""
        positions = 0
        while positions < _WINDOW_POSITIONS and (following := next(self._windows, None)) is not None:
            self._following.append(following)
            positions += len(following.positions)
        if self._following:
            here = set(self._parts_of(window))  # the first one is in a hurry: its own are asked for alone, at the same time
            parts = dict.fromkeys(itertools.chain.from_iterable(map(self._parts_of, self._following)))
            self._layouts.ask([part for part in parts if part not in here])

    def _parts_of(self, window: _Window) -> list[int]:
        """Parts whose layouts a window needs, in order of first use."""
        samples = window.samples
        if window.units is not None:
            lengths = np.maximum(window.units.length, 1)
            first = np.where(lengths > 1, window.units.start, samples)
            samples = np.stack([first, np.minimum(first + lengths, self._plan.samples) - 1], axis=1).ravel()
        parts, _ = locate(self._plan.starts, samples)
        changes = np.flatnonzero(np.diff(parts, prepend=-1))
        return list(dict.fromkeys(parts[changes].tolist()))

    # -- chunks: how they are fetched --------------------------------------------------------

    def _positions_ahead(self) -> int:
        return min(_CHUNK_POSITIONS, int(self.budget.look_ahead / (self._average * self._spread)))

    def _plan_chunk(self, window: _Window, low: int, high: int) -> Chunk:
        """Plan the steps from the `low`-th to the `high`-th of a window, exclusive."""
        here = slice(int(window.ends[low]), int(window.ends[high]))
        samples = window.samples[here]
        none = np.full(len(samples), -1, dtype=np.int64)
        chunk = Chunk(
            window.steps[low:high],
            np.diff(window.ends[low : high + 1]),
            window.positions[here],
            samples,
            none,
            none,
            SampleBuffer(0),
        )
        unfetched: list[_Unfetched] = []
        gap = self._max_gap
        if window.units is not None:
            units = Units(*(column[here] for column in window.units))
            if self._begins_alone(units):
                gap = _SEQUENTIAL_GAP
            else:
                unfetched += self._open_blocks(chunk, units)
        where = np.flatnonzero(chunk.starts < 0)
        if len(where):
            alone, first, which = np.unique(samples[where], return_index=True, return_inverse=True)
            chunk.alone = SampleBuffer(len(alone))
            chunk.slots = chunk.slots.copy()
            chunk.slots[where] = which
            unfetched.append(_Unfetched(alone, where[first], chunk.alone))
        chunk.reads = self._reads(unfetched, gap)
        return chunk

    def _begins_alone(self, units: Units) -> bool:
        """Whether this is the first batch and its blocks are many bytes to wait for, as in the middle of a window where another
        run stopped: then its samples are fetched alone, and the blocks come right behind them."""
        if self._begun or self._in_units:
            return False
        self._begun = True
        blocks = np.unique(units.start, return_index=True)[1]
        return int(np.maximum(units.length[blocks], 0).sum()) * self._average > _FIRST_BYTES

    def _open_blocks(self, chunk: Chunk, units: Units) -> list[_Unfetched]:
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

    def _missing_blocks(self, chunk: Chunk, units: Units) -> Iterator[_Unfetched]:
        """Open the blocks of `chunk` that are not."""
        first = np.sort(np.unique(chunk.starts, return_index=True)[1])
        rows = zip(*(column[first].tolist() for column in (chunk.starts, units.length, units.until)), strict=True)
        for i, (start, length, until) in zip(first.tolist(), rows, strict=True):
            if start < 0:
                continue
            block = self._open.get(start)
            if block is None:
                block = self._open[start] = OpenBlock(start, length, int(chunk.positions[i]), until)
                yield _Unfetched(np.arange(start, start + length, dtype=np.int64), i, block)
            block.until = max(block.until, until)
            chunk.blocks[start] = block

    def _reads(self, unfetched: list[_Unfetched], max_gap: int) -> list[SampleRead]:
        if not unfetched:
            return []
        # All at once: a few calls of numpy for hundreds of blocks.
        parts, numbers = locate(self._plan.starts, np.concatenate([some.samples for some in unfetched]))
        changes = np.flatnonzero(np.diff(parts)) + 1
        layouts = self._layouts.get(parts[[0, *changes.tolist()]].tolist())
        bounds = list(itertools.accumulate((len(some.samples) for some in unfetched), initial=0))
        edges = sorted({*bounds, *changes.tolist()})
        of_part = parts[edges[:-1]].tolist()
        keyed: list[tuple[int, SampleRead]] = []
        run = 0
        for some, begin, end in zip(unfetched, bounds, bounds[1:], strict=False):
            while edges[run] < end:
                low, high = edges[run : run + 2]
                layout = layouts[of_part[run]]
                reads = plan_reads(
                    layout, numbers[low:high], some.target, low - begin, max_gap=max_gap, max_size=self._read_size
                )
                keyed += [(some.use(read), read) for read in reads]
                run += 1
        keyed.sort(key=lambda pair: pair[0])
        return [read for _, read in keyed]


def _in_units(order: Order) -> bool:
    """Whether samples can only be fetched with all of their unit."""
    if isinstance(order, MixtureOrder):
        return any(map(_in_units, order.orders))
    return isinstance(order, (UnitOrder, UnitsAsTheyCome))


class _LayoutsAhead:
    """Layouts for a planner: those asked for ahead are read by a thread of its own meanwhile, others when they are needed.

    A part whose index is missing or cannot be used is not asked for again.
    """

    used = 1.0
    """Of the bytes of members in a layout, the share that samples have."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._coming: Future[Mapping[int, Layout | S3LoaderError]] | None = None
        self._asked: frozenset[int] = frozenset()
        self._held: list[Mapping[int, Layout | S3LoaderError]] = [{}, {}]
        """Of the last two windows asked for: nothing drives them out of the cache before they are used."""
        self._failed: dict[int, S3LoaderError] = {}

    @property
    def ready(self) -> bool:
        """Whether what was asked for is here."""
        return self._coming is None or self._coming.done()

    def ask(self, parts: Iterable[int]) -> None:
        """Begin to read the layouts of `parts` that are not at hand, as far as they fit into memory."""
        self._collect()
        self._held = [{}, self._held[0]]
        left = _INDEX_BYTES
        missing: list[int] = []
        for number in parts:
            part = self._dataset.parts[number]
            if left <= 0:
                break
            if isinstance(part, Shard) and number not in self._failed and not self._dataset.has_layout(number):
                missing.append(number)
                left -= _BYTES_PER_MEMBER * (part.members or part.samples)
        if missing:
            self._asked, self._coming = frozenset(missing), Future()
            # A daemon: where the store hangs and nobody wants the indexes any more, it must not hold up the end of the process.
            threading.Thread(target=self._load, args=(self._coming, missing), daemon=True, name="s3loader-indexes").start()

    def get(self, parts: Sequence[int]) -> Mapping[int, Layout | S3LoaderError]:
        """The layouts of `parts`, or why there is none."""
        if not self._asked.isdisjoint(parts):
            self._collect()
        found: dict[int, Layout | S3LoaderError] = {}
        for number in parts:
            known = self._held[0].get(number) or self._held[1].get(number) or self._failed.get(number)
            if known is not None:
                found[number] = known
        missing = [number for number in parts if number not in found]
        if missing:
            found |= self._note(self._dataset.layouts(missing))
        return found

    def _load(self, coming: Future[Mapping[int, Layout | S3LoaderError]], parts: Sequence[int]) -> None:
        try:
            coming.set_result(self._dataset.load_layouts(parts))
        except BaseException as error:  # noqa: BLE001 - raised where the result is taken
            coming.set_exception(error)

    def close(self) -> None:
        """Wait for nothing any more."""
        self._coming, self._asked = None, frozenset()

    def _collect(self) -> None:
        """Take what was asked for; waits for it."""
        if self._coming is not None:
            coming = self._coming
            self.close()
            self._held[0] = self._note(coming.result())
            self._dataset.keep_layouts(self._held[0])

    def _note(self, layouts: Mapping[int, Layout | S3LoaderError]) -> Mapping[int, Layout | S3LoaderError]:
        for number, layout in layouts.items():
            if isinstance(layout, (ObjectNotFoundError, ShardReadError)):
                self._failed[number] = layout
        return layouts


class _AverageLayouts(_LayoutsAhead):
    """Layouts of shards whose samples all have the average size and lie one behind the other; nothing is read."""

    def __init__(self, dataset: Dataset, counts: Int64Array) -> None:
        super().__init__(dataset)
        self._counts = counts
        savings = dataset.member_savings
        self._fetched = savings.fetched
        self.used = savings.used / savings.fetched if savings.fetched else 1.0

    def ask(self, parts: Iterable[int]) -> None:
        """Nothing is on its way."""

    def get(self, parts: Sequence[int]) -> Mapping[int, Layout | S3LoaderError]:
        """The layouts of `parts`."""
        loose = [number for number in parts if isinstance(self._dataset.parts[number], LooseRun)]
        return self._dataset.layouts(loose) | {number: self._average(number) for number in parts if number not in loose}

    def _average(self, number: int) -> Layout:
        shard, count = self._dataset.parts[number], int(self._counts[number])
        assert isinstance(shard, Shard)
        size = max(shard.size, shard.now, 0)
        edges = np.arange(count + 1, dtype=np.int64) * size // max(1, count)
        sizes = (np.diff(edges) * self._fetched).astype(np.int64)
        index = ShardIndex(
            offsets=edges[:-1].astype(np.uint64),
            sizes=sizes.astype(np.uint64),
            crc32c=None,
            names_blob=b"",
            name_ends=np.zeros(count, dtype=np.uint64),
            archive_size=size,
            etag=shard.etag,
            known_grouping=Grouping.each(count),
        )
        return Layout.of_shard(shard, index, grouped=False)
