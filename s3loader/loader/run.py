"""One iteration by one worker: takes planned chunks, asks the store, slices samples out of what comes, gives batches in order.

Planning happens between two turns of the network, never inside one: before each turn enough is planned that the store's bulk
read finds a request whenever it has room for one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from s3loader.errors import FormatError, IntegrityError, S3LoaderError, ShardReadError, TruncatedError, WorkerError
from s3loader.fetch.cached import CachedReads, close_iterator
from s3loader.fetch.diskcache import DiskCache
from s3loader.fetch.hedge import HedgedReads, hedged
from s3loader.loader.layout import Layout, SampleBuffer, SampleRead, wrong_size
from s3loader.loader.mds import MdsShard
from s3loader.loader.planner import Chunk, Planner
from s3loader.loader.rows import RowRead, RowsOfGroup
from s3loader.loader.stats import LoaderStats
from s3loader.plan.permutation import Int64Array
from s3loader.shard.parquet import ParquetRows
from s3loader.shard.reader import inflate
from s3loader.shard.samples import sample_key
from s3loader.store.backend import Driver
from s3loader.store.buffers import shared_pool
from s3loader.store.bulk import ReadFailure, driver_of
from s3loader.store.objectstore import ObjectStore
from s3loader.store.options import MOST_THREADS
from s3loader.store.pipeline import innermost
from s3loader.types import Buffer, NetworkState, ReadRequest

__all__ = ["Failed", "Fetcher", "RawBatch", "Run"]


class RawBatch(NamedTuple):
    """One batch before decoding: parallel to each other."""

    step: int
    positions: Int64Array
    samples: Int64Array
    items: list[Any]
    """memoryviews, dicts of memoryviews, or `Failed`."""


class Failed:
    """In place of a sample: why there is none. Raised when its turn comes."""

    __slots__ = ("error", "member")

    def __init__(self, error: S3LoaderError, member: str = "") -> None:
        self.error = error
        self.member = member


class SlicedSamples(NamedTuple):
    """The samples of a read, as `SampleBuffer.put` takes them."""

    source: list[Any]
    starts: list[int]
    ends: list[int]
    doubtful: bool
    """A checksum or length did not fit: another copy of the bytes may be better."""

    @classmethod
    def failed(cls, error: S3LoaderError, count: int, *, doubtful: bool = False) -> SlicedSamples:
        """All `count` samples fail with `error`."""
        return cls([Failed(error)] * count, [0] * count, [0] * count, doubtful)


class GroupedSamples:
    """Samples of several members each, built as dicts when they are handed out."""

    __slots__ = ("_bounds", "_ends", "_lower", "_names", "_source", "_starts", "_url", "_wanted")

    def __init__(
        self,
        bounds: list[int],
        names: list[str],
        source: list[Any],
        starts: list[int],
        ends: list[int],
        url: str,
        wanted: frozenset[str] | None,
        lower: bool,
    ) -> None:
        self._wanted = wanted
        self._lower = lower
        self._bounds = bounds
        self._names = names
        self._source = source
        self._starts = starts
        self._ends = ends
        self._url = url

    def build(self, i: int) -> Any:
        """``__key__``, and each member by what follows the first dot of its base name."""
        low, high = self._bounds[i], self._bounds[i + 1]
        key = sample_key(self._names[low])
        sample: dict[str, Any] = {"__key__": key}
        at = len(key) + 1
        for member in range(low, high):
            name, source = self._names[member], self._source[member]
            if type(source) is not memoryview:
                return source
            extension = name[at:].lower() if self._lower else name[at:]
            if self._wanted is not None and extension not in self._wanted:
                continue  # it stands for a sample that has none of them
            if extension in sample:
                return Failed(FormatError(f"two members of sample {key!r} are called {name!r}", url=self._url), name)
            sample[extension] = source[self._starts[member] : self._ends[member]]
        return sample


class MdsSamples:
    """Samples of an MDS shard, their columns decoded when they are handed out."""

    __slots__ = ("_layout", "_members", "_slices")

    def __init__(self, layout: Layout, members: list[int], slices: _Slices) -> None:
        self._layout = layout
        self._members = members
        self._slices = slices

    def build(self, i: int) -> Any:
        """``__key__``, and each column by its name."""
        source, starts, ends = self._slices
        name, shard = self._layout.name(self._members[i]), self._layout.source
        assert isinstance(shard, MdsShard)
        try:
            return shard.row(name, source[i][starts[i] : ends[i]])
        except S3LoaderError as error:
            return Failed(error, name)


class RowSamples:
    """Rows of a row group of a Parquet file, decoded when the first is handed out."""

    __slots__ = ("_rows",)

    def __init__(self, rows: RowsOfGroup) -> None:
        self._rows = rows

    def build(self, i: int) -> Any:
        """``__key__``, and each column by its name."""
        try:
            return self._rows.row(i)
        except S3LoaderError as error:
            return Failed(error, self._rows.name(i))


def slice_samples(read: SampleRead, bodies: Sequence[memoryview | Failed], *, grouped: bool, verify: bool) -> SlicedSamples:
    """Verify what came for `read` and find its samples in it; nothing is copied.

    Args:
        read: What was asked for.
        bodies: What came for each of its requests.
        grouped: Make dicts of neighbours.
        verify: Check checksums.
    """
    layout = read.layout
    assert layout is not None
    members = read.members()
    if not layout.loose:
        for body in bodies:
            if isinstance(body, Failed):
                return SlicedSamples.failed(body.error, len(read.numbers))
    try:
        source, starts, ends = _loose(layout, members, bodies) if layout.loose else _slices(layout, read, members, bodies)
    except S3LoaderError as error:
        return SlicedSamples.failed(error, len(read.numbers), doubtful=isinstance(error, IntegrityError))
    bad = _mismatches(layout, members, source, starts, ends) if verify and layout.crc32c is not None else []
    for i in bad:
        source[i] = _corrupt(layout, int(members[i]))
    if isinstance(read, RowRead):
        return _rows(read, members, (source, starts, ends))
    if isinstance(layout.source, MdsShard):
        rows = MdsSamples(layout, members.tolist(), (source, starts, ends))
        return SlicedSamples([rows] * len(members), list(range(len(members))), layout.sizes[members].tolist(), False)
    if not grouped:
        return SlicedSamples(source, starts, ends, bool(bad))
    lengths = layout.first[read.numbers + 1] - layout.first[read.numbers]
    bounds = [0, *np.cumsum(lengths).tolist()]
    names = [layout.name(i) for i in members.tolist()]
    groups = GroupedSamples(bounds, names, source, starts, ends, layout.key(int(members[0])), layout.wanted, layout.lower)
    count = len(read.numbers)
    sums = np.concatenate([[0], np.cumsum(np.array(ends, dtype=np.int64) - starts)])
    return SlicedSamples([groups] * count, list(range(count)), np.diff(sums[bounds]).tolist(), bool(bad))


def _rows(read: RowRead, members: Int64Array, slices: _Slices) -> SlicedSamples:
    offsets = read.rows.groups.offsets[members].tolist()
    pieces = {at: source[start:end] for at, source, start, end in zip(offsets, *slices, strict=True)}
    rows = RowsOfGroup(read.rows, read.group, ParquetRows(read.rows.footer, read.group, pieces, read.rows.paths))
    count = len(read.inside)
    inside = read.inside.tolist()
    shares = np.diff(np.arange(count + 1, dtype=np.int64) * read.nbytes // max(1, count)).tolist()
    return SlicedSamples([RowSamples(rows)] * count, inside, shares, False)


_Slices: TypeAlias = tuple[list[Any], list[int], list[int]]


def _slices(layout: Layout, read: SampleRead, members: Int64Array, bodies: Sequence[Any]) -> _Slices:
    assert layout.index is not None
    if read.ranges is None:
        base, data = _range(layout, read.start, read.end, bodies[0] if bodies else memoryview(b""))
        starts = layout.offsets[members] - base
        return [data] * len(members), starts.tolist(), (starts + layout.sizes[members]).tolist()
    pairs = zip(read.ranges, bodies, strict=True)
    parts = [_range(layout, start, end, body) for (start, end), body in pairs] or [(0, memoryview(b""))]
    which = np.searchsorted([start for start, _ in read.ranges], layout.offsets[members], side="right") - 1
    which = np.maximum(which, 0)  # a member without bytes may lie before all of them
    starts = layout.offsets[members] - np.array([base for base, _ in parts], dtype=np.int64)[which]
    starts[layout.sizes[members] == 0] = 0
    return [parts[k][1] for k in which.tolist()], starts.tolist(), (starts + layout.sizes[members]).tolist()


def _range(layout: Layout, start: int, end: int, data: memoryview) -> tuple[int, memoryview]:
    """(tar offset of its first byte, plain bytes) of what came for bytes ``[start, end)`` of the tar stream."""
    base = start
    if layout.index is not None and layout.index.compression is not None and start < end:
        base, plain = _inflate(layout, start, end, data)
        data = memoryview(plain).toreadonly()
    if len(data) < end - base:
        raise TruncatedError(f"{end - base} bytes were expected at {base}, {len(data)} came", op="read", url=layout.key(0))
    return base, data


def _inflate(layout: Layout, start: int, end: int, packed: memoryview) -> tuple[int, Buffer]:
    """(tar offset, plain bytes) of the frames around bytes ``[start, end)`` of the tar stream."""
    index = layout.index
    assert index is not None
    if not index.random_access:
        raise ShardReadError(f"{index.compression} shards cannot be read at random", op="read", url=layout.key(0))
    try:
        return inflate(index, packed, index.fetch_range(start, end)[0], end, layout.key(0))
    except ShardReadError as error:  # the frames may have been hurt on their way: another copy of them may be better
        raise IntegrityError(error.message, op="read", url=layout.key(0)) from error


def _loose(layout: Layout, members: Int64Array, bodies: Sequence[memoryview | Failed]) -> _Slices:
    views: list[Any] = []
    ends, given = [], iter(bodies)
    for i, expected in zip(members.tolist(), layout.sizes[members].tolist(), strict=True):
        view = next(given) if layout.asks(i) else memoryview(b"")
        size = 0 if isinstance(view, Failed) else len(view)
        there = layout.wrong_size(i)
        if not isinstance(view, Failed) and expected >= 0 and (size != expected or there is not None):
            view = Failed(wrong_size(layout.key(i), expected, size if there is None else there), layout.name(i))
            size = 0
        views.append(view)
        ends.append(size)
    return views, [0] * len(views), ends


def _mismatches(layout: Layout, members: Int64Array, source: list[Any], starts: list[int], ends: list[int]) -> list[int]:
    from awscrt.checksums import crc32c  # the bare function: this loop runs for every sample

    assert layout.crc32c is not None
    expected = layout.crc32c[members].tolist()
    rows = enumerate(zip(source, starts, ends, expected, strict=True))
    return [i for i, (data, start, end, crc) in rows if crc32c(data[start:end]) != crc]


def _corrupt(layout: Layout, member: int) -> Failed:
    start = int(layout.offsets[member])
    end = start + int(layout.sizes[member])
    name = layout.name(member)
    error = IntegrityError(
        f"member {name!r}, bytes [{start}, {end}), does not match its CRC32C",
        op="read",
        url=layout.key(member),
        member=name,
        range=(start, end),
        hint="the shard was damaged where it is stored, or changed without a new index",
    )
    return Failed(error, name)


# -- fetching --------------------------------------------------------------------------------------


class Fetcher:
    """Makes reads of a store with at most `max_bytes` fetched and not yet taken; the only place that reads sample bytes.

    A range whose checksum does not fit is fetched once more, by itself; then its bad samples fail.

    Attributes:
        queue: Reads to make. They are drawn ahead of delivery, as far as the byte budget reaches.
        queued: Their bytes.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        grouped: bool,
        verify: bool,
        max_bytes: int,
        driver: Driver,
        concurrency: int | None,
        stats: LoaderStats,
        cache: DiskCache | None = None,
        hedge_after: float | None = None,
    ) -> None:
        self.queue: deque[SampleRead] = deque()
        self.queued = 0
        self._hedged: HedgedReads | None = None
        if hedge_after is not None:
            store, self._hedged = hedged(store, hedge_after)
        beside = getattr(store.backend, "bulk", None) is not None
        if cache is not None and beside and driver == "auto":
            driver = "threads"  # other processes of the node wait for what is under way: it must go on while nobody waits here
        self._share = not (beside and driver == "pump")
        self._store = store
        self._cache = cache
        self._grouped = grouped
        self._verify = verify
        self._max_bytes = max_bytes
        self._driver: Driver = driver
        self._concurrency = concurrency
        self._stats = stats
        self._measure: Callable[[], NetworkState | None] = getattr(innermost(store.backend), "network", lambda: None)
        """Asked again and again: the engine itself, not by way of the store."""
        self._network = self._measure()
        self._cached: CachedReads | None = None
        stats.engine = store.engine
        stats.driver = driver_of(store.backend, driver, concurrency or store.options.concurrency or MOST_THREADS)

    def close(self) -> None:
        """End what hedges the reads."""
        if self._hedged is not None:
            self._stats.hedged += self._hedged.hedged
            self._hedged.close()
        self._note_network()

    @property
    def connections(self) -> int:
        """Requests that may be under way at a time, by what is known now."""
        network = self._measure()
        return self._concurrency or MOST_THREADS if network is None else network.connections

    def _note_network(self) -> None:
        """Take what was measured of the store since the last time into the stats."""
        now, before = self._measure(), self._network
        if now is None or before is None:
            return
        self._stats.connections, self._stats.first_byte = now.connections, now.first_byte
        self._stats.hedged += max(0, now.hedged - before.hedged)
        self._network = now

    def add(self, reads: Sequence[SampleRead]) -> None:
        """Have more reads to make."""
        self.queue.extend(reads)
        self.queued += sum(read.nbytes for read in reads)

    def run(self) -> Generator[None, None, None]:
        """Make the reads of the queue; yields once after each whose samples are in their place.

        It ends when the queue is found empty and everything drawn from it was delivered.
        """
        pending: deque[tuple[SampleRead, int]] = deque()
        requests = self._requests(pending)
        if self._cache is not None:
            url, share = self._store.url, self._share
            self._cached = CachedReads(self._cache, url, self._read, self._max_bytes, share=share)
        results = self._read(requests) if self._cached is None else self._cached.run(requests)
        try:
            yield from self._deliver(results, pending)
        finally:
            close_iterator(results)

    def _requests(self, pending: deque[tuple[SampleRead, int]]) -> Iterator[ReadRequest]:
        queue = self.queue
        while queue:
            read = queue.popleft()
            self.queued -= read.nbytes
            requests = read.requests()
            pending.append((read, len(requests)))
            yield from requests

    def _read(self, requests: Iterable[ReadRequest]) -> Iterator[Any]:
        return self._store.read_many(
            requests, max_bytes=self._max_bytes, concurrency=self._concurrency, driver=self._driver, errors="return"
        )

    def _disk_time(self) -> float:
        """Seconds that the disk of the cache took since the last call; they and the hits are noted."""
        if self._cached is None:
            return 0.0
        taken, self._cached.seconds = self._cached.seconds, 0.0
        self._stats.wait_cache += taken
        self._stats.cache_hits += self._cached.hits
        self._stats.shared += self._cached.shared
        self._cached.hits = self._cached.shared = 0
        return taken

    def _deliver(self, results: Iterator[Any], pending: deque[tuple[SampleRead, int]]) -> Iterator[None]:
        bodies: list[Any] = []
        stats, clock = self._stats, time.perf_counter
        while True:
            begun = clock()
            result = next(results, None)
            stats.wait_network += clock() - begun - self._disk_time()  # the disk is not the network
            while pending and pending[0][1] == len(bodies):  # reads that need nothing, or nothing more
                self._finish(pending.popleft()[0], bodies)
                bodies = []
                yield
            if result is None:
                return
            bodies.append(result)
            del result
            if pending and pending[0][1] == len(bodies):
                self._finish(pending.popleft()[0], bodies)
                bodies = []
                yield

    def _finish(self, read: SampleRead, results: Sequence[Any]) -> None:
        begun = time.perf_counter()
        found = self._slice(read, results)
        if found.doubtful:
            found = self._once_more(read, found)
        read.target.put(read.at, found.source, found.starts, found.ends)
        self._stats.cut += time.perf_counter() - begun

    def _slice(self, read: SampleRead, results: Sequence[Any]) -> SlicedSamples:
        if read.error is not None:
            return SlicedSamples.failed(read.error, len(read.numbers))
        self._stats.requests += len(results)
        bodies = [_body(read, result) for result in results]
        self._stats.bytes_fetched += sum(len(body) for body in bodies if not isinstance(body, Failed))
        return slice_samples(read, bodies, grouped=self._grouped, verify=self._verify)

    def _once_more(self, read: SampleRead, before: SlicedSamples) -> SlicedSamples:
        """Fetch `read` once more; what is wrong both times is wrong."""
        self._stats.refetched += 1
        if self._cached is not None:
            self._cached.discard(read.requests())
        results = list(self._store.read_many(read.requests(), driver=self._driver, errors="return"))
        if any(isinstance(result, ReadFailure) for result in results):
            return before
        return self._slice(read, results)


def _body(read: SampleRead, result: Any) -> Any:
    """The bytes of an answer, or why there are none: also where the whole object has another size than it should have."""
    if isinstance(result, ReadFailure):
        return Failed(result.error)
    index = None if read.layout is None else read.layout.index
    whole = result.request.end if index is None else index.archive_size
    if whole is not None and 0 <= result.size != whole:  # an answer of the cache does not tell
        return Failed(wrong_size(result.request.key, whole, result.size))
    return result.data


class Run:
    """The batches of a planner's steps.

    Args:
        planner: Whose chunks are read.
        store: Where the dataset is.
        grouped: Whether samples are made of several members.
        memory_limit: Bytes that this process may hold.
        driver: As in `LoaderOptions`.
        concurrency: Requests at a time; None: the store's.
        verify: Check checksums.
        stats: Where it is noted what was done.
        cache: Where ranges are kept.
        hedge_after: Seconds after which a range is asked for a second time.
    """

    def __init__(
        self,
        planner: Planner,
        store: ObjectStore,
        *,
        grouped: bool,
        memory_limit: int,
        driver: Driver,
        concurrency: int | None,
        verify: bool,
        stats: LoaderStats,
        cache: DiskCache | None = None,
        hedge_after: float | None = None,
    ) -> None:
        self._planner = planner
        self._stats = stats
        self._memory_limit = memory_limit
        self._fetcher = Fetcher(
            store,
            grouped=grouped,
            verify=verify,
            max_bytes=planner.budget.in_flight,
            driver=driver,
            concurrency=concurrency,
            stats=stats,
            cache=cache,
            hedge_after=hedge_after,
        )
        self._chunks: deque[Chunk] = deque()
        self._turns: Generator[None, None, None] | None = None
        self._first = True
        """No read is in its place yet."""
        self._given = False
        """A batch was given out."""

    def __iter__(self) -> Generator[RawBatch, None, None]:
        with shared_pool().bounded(self._memory_limit), closing(self):
            while self._chunks or not self._planner.done:
                if not self._chunks:
                    self._plan()
                yield from self._batches(self._chunks.popleft())

    def close(self) -> None:
        """Let go of what is under way."""
        if self._turns is not None:
            self._turns.close()
        self._planner.close()
        self._fetcher.close()

    # -- planning and fetching ---------------------------------------------------------------

    def _plan(self) -> None:
        begun = time.perf_counter()
        chunk = self._planner.next_chunk()
        self._chunks.append(chunk)
        self._fetcher.add(chunk.reads)
        self._stats.plan += time.perf_counter() - begun

    def _plan_ahead(self) -> None:
        """Have a read planned for every request that may be under way, and one chunk more, as far as indexes are here.

        A chunk at a time, since nothing is received meanwhile, until the bytes that may be under way are planned.
        """
        planner, fetcher = self._planner, self._fetcher
        if not self._given and self._turns is not None:  # the first batch waits: nothing but what connections lack
            if not fetcher.queue and not planner.done and planner.ready:
                self._plan()
            return
        more = not self._first
        while fetcher.queued < planner.budget.in_flight and not planner.done and planner.ready:
            if len(fetcher.queue) > fetcher.connections:
                if not more:
                    return
                more = False
            self._plan()

    def _advance(self) -> None:
        """Have one more read in its place."""
        while True:
            if self._turns is None or not self._first:
                self._plan_ahead()
            if self._turns is None:
                if not self._fetcher.queue:
                    if self._planner.done:
                        raise WorkerError("all reads were made, and samples are missing")  # a defect of ours, never silent
                    self._plan()
                self._turns = self._fetcher.run()
            for _ in self._turns:
                self._first = False
                return
            self._turns, self._first = None, False  # it found the queue empty

    # -- batches -----------------------------------------------------------------------------

    def _batches(self, chunk: Chunk) -> Iterator[RawBatch]:
        at = 0
        for step, length in zip(chunk.steps, chunk.lengths.tolist(), strict=True):
            here = slice(at, at + length)
            items = self._collect(chunk, chunk.starts[here].tolist(), chunk.slots[here].tolist())
            self._given = True
            yield RawBatch(step, chunk.positions[here], chunk.samples[here], items)
            at += length

    def _collect(self, chunk: Chunk, starts: list[int], slots: list[int]) -> list[Any]:
        """The samples of one batch, when all of them are there."""
        blocks, alone = chunk.blocks, chunk.alone
        for start in set(starts):
            if start >= 0:
                block = blocks[start]
                while block.left:
                    self._advance()
        items: list[Any] = []
        add = items.append
        used = 0
        for start, slot in zip(starts, slots, strict=True):
            buffer: SampleBuffer = blocks[start] if start >= 0 else alone
            source = buffer.source[slot]
            while source is None:
                self._advance()
                source = buffer.source[slot]
            if type(source) is memoryview:  # the usual case of `SampleBuffer.take`, without the call
                first, end = buffer.starts[slot], buffer.ends[slot]
                add(source[first:end])
                used += end - first
            else:
                add(buffer.take(slot))
                used += buffer.ends[slot]
        self._stats.bytes_used += used
        return items
