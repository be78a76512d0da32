"""Requests of an op-log sent again, at the times they were sent then, or faster."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, cast

from s3loader import events
from s3loader.arguments import as_float, whole_number
from s3loader.datagen import Generator
from s3loader.errors import ConfigError, FormatError, ObjectNotFoundError, S3LoaderError
from s3loader.oplog.columns import OpRecord, is_request, record_of
from s3loader.oplog.files import in_order, read_op_log
from s3loader.oplog.summary import OpLogSummary, summarize
from s3loader.store import ObjectStore, open_store
from s3loader.store.open import JobKeywords
from s3loader.store.options import StoreOptions
from s3loader.store.ordered import BoundedPool
from s3loader.tasks import executor_of
from s3loader.types import ObjectURL

__all__ = ["READS", "WRITES", "ReplayReport", "plan_replay", "replay_op_log"]

READS: Final = ("GET", "STAT", "LIST")
WRITES: Final = ("PUT", "PUTPART", "DELETE")
_ALIASES: Final = {"HEAD": "STAT", "GET_RANGE": "GET"}


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What became of a replay."""

    sent: int
    errors: int
    """Of those sent; their kinds are in `summary`."""
    skipped: dict[str, int]
    """Rows not sent again, by operation: of kinds not asked for, that failed then, or deletes of many keys, which a row
    does not name."""
    seconds: float
    late: tuple[float, float, float]
    """Seconds that requests were sent after their time: median, 99th percentile, most."""
    summary: OpLogSummary | None
    """Of the requests of the replay; None: there were none."""


def replay_op_log(
    path: str,
    to: str | None = None,
    *,
    ops: Sequence[str] | None = None,
    speed: float = 1.0,
    concurrency: int = 64,
    prepare: bool = False,
    progress: Callable[[int], None] | None = None,
    workers: int = 0,
    **store: Any,
) -> ReplayReport:
    """Send the requests of an op-log again. Requests that failed then are left out.

    Reads go where they went, or below `to`. Writes are only sent below `to`: PUT and PUTPART write made-up bytes of the same
    size, the parts of an upload as objects of their own.

    Args:
        path: Of the log, of s3loader, s3dlio or warp.
        to: URL below which all keys lie; None: the URLs of the log.
        ops: Which operations; default GET, STAT and LIST, with `to` PUT and PUTPART too. DELETE has to be named.
        speed: 2 is twice as fast as it was; 0: as fast as `concurrency` allows.
        concurrency: Most requests at once; what is due while they are all under way is late, which the report tells.
        prepare: First write the objects that the replay reads, of made-up bytes, where they are not there or are too short.
            Needs `to`.
        progress: Is called with the number of requests sent so far.
        workers: Processes that send, rows in turn, all by one clock; 0: this one. On a cluster: tasks, which must all have room
            at once; 0: one for each CPU it has.
        store: Keywords for `open_store`; and ``engine="ray"`` with ``address``: tasks of a Ray cluster, which must see the log
            under the same path.

    Raises:
        ConfigError: an argument is unusable, or would write where the log's program wrote.
        SourceNotFoundError, FormatError: of `read_op_log`.
    """
    pace = as_float(speed)
    if pace is None or not 0 <= pace < float("inf"):
        raise ConfigError(f"speed cannot be {speed!r}", hint="1 is the speed of then, 2 twice as fast, 0 without waiting")
    if (most := whole_number(concurrency)) is None or most < 1:
        raise ConfigError(f"concurrency cannot be {concurrency!r}", hint="1 or more")
    if prepare and to is None:
        raise ConfigError("prepare writes objects, and there is no place for them", hint="give to=URL")
    wanted = _operations(ops, to)
    executor, place = executor_of(cast("JobKeywords", store), workers)
    targets = _Targets(to, most, {**place})
    try:
        if prepare:
            targets.prepare(read_op_log(path), wanted)
        if executor is None:
            return _report([_run(path, wanted, pace, most, targets, progress)])
    finally:
        targets.close()
    count = executor.size()
    for _ in read_op_log(path):
        break  # what cannot be read is said here
    start = time.time() + _LEAD if pace else 0.0
    task = partial(_run_share, path, wanted, pace, max(1, most // count), to, {**place}, start)
    shares: list[_Sent] = []
    for _, share in executor.run(task, [(number, count) for number in range(count)]):
        shares.append(share)
        if progress is not None:
            progress(sum(one.sent for one in shares))
    return _report(shares)


_LEAD: Final = 5.0
"""Seconds in which the processes of a replay begin, before the first request is due."""


def plan_replay(path: str, to: str | None = None, *, ops: Sequence[str] | None = None, speed: float = 1.0) -> dict[str, Any]:
    """What `replay_op_log` would send: `send` (requests and bytes by operation), `skipped`, and `seconds`."""
    wanted = _operations(ops, to)
    send: dict[str, tuple[int, int]] = {}
    skipped: dict[str, int] = {}
    starts: list[int] = []
    for record in read_op_log(path):
        if not _is_sent(record, wanted):
            skipped[record.op] = skipped.get(record.op, 0) + 1
            continue
        count, size = send.get(record.op, (0, 0))
        send[record.op] = (count + 1, size + record.bytes)
        starts = [min([record.start, *starts]), max([record.start, *starts])]
    return {"send": send, "skipped": skipped, "seconds": (starts[1] - starts[0]) / 1e9 / speed if starts and speed else 0.0}


def _is_sent(record: OpRecord, wanted: frozenset[str]) -> bool:
    return _kind(record) in wanted and not record.error and not (record.op == "DELETE" and record.objects > 1)


def _operations(ops: Sequence[str] | None, to: str | None) -> frozenset[str]:
    if ops is None:
        return frozenset(READS if to is None else (*READS, "PUT", "PUTPART"))
    wanted = frozenset(_ALIASES.get(op.upper(), op.upper()) for op in ops)
    if unknown := sorted(wanted - {*READS, *WRITES}):
        raise ConfigError(f"cannot replay {', '.join(unknown)}", hint=f"these can be: {', '.join((*READS, *WRITES))}")
    if to is None and (writes := sorted(wanted & {*WRITES})):
        raise ConfigError(
            f"{', '.join(writes)} would write over what is there now", hint="give a place for them: to=URL (--to URL)"
        )
    return wanted


class _Targets:
    """Where requests go."""

    def __init__(self, to: str | None, concurrency: int, keywords: dict[str, Any]) -> None:
        self._to = None if to is None else to.rstrip("/")
        self._keywords = {"options": StoreOptions(max_attempts=1, concurrency=concurrency), **keywords}
        self._stores: dict[str, ObjectStore] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count()

    def close(self) -> None:
        for store in self._stores.values():
            store.close()

    def at(self, record: OpRecord) -> tuple[ObjectStore, str]:
        """Store and key of a row."""
        if self._to is not None:
            return self._store(self._to), record.file.lstrip("/")
        url = record.url
        target = ObjectURL.parse(url)
        if target.scheme == "file":
            return self._store("file:///"), target.key.lstrip("/")
        root = f"{target.scheme}://{target.bucket}"
        return self._store(root), target.key

    def _store(self, root: str) -> ObjectStore:
        with self._lock:
            if root not in self._stores:
                self._stores[root] = open_store(root, **self._keywords)
            return self._stores[root]

    def prepare(self, records: Iterator[OpRecord], wanted: frozenset[str]) -> None:
        sizes: dict[str, tuple[OpRecord, int]] = {}
        for r in records:
            if _kind(r) in wanted & {"GET", "STAT"} and not r.error:
                size = (r.offset or 0) + (r.bytes if _kind(r) == "GET" else 0)
                sizes[r.file] = (r, max(size, sizes.get(r.file, (r, 0))[1]))
        for number, (record, size) in enumerate(sizes.values()):
            store, key = self.at(record)
            try:
                if store.head(key).size >= size:
                    continue
            except ObjectNotFoundError:
                pass
            with store.multipart(key) as out:
                for piece in Generator(size, seed=1, index=number).chunks():
                    out.write(piece)

    def send(self, record: OpRecord) -> None:
        """One request."""
        store, key = self.at(record)
        kind = _kind(record)
        if kind == "GET":
            start = record.offset or 0
            store.get_range(key, start, start + record.bytes)
        elif kind == "STAT":
            store.head(key)
        elif kind == "LIST":
            for _ in itertools.islice(store.list(key), max(1, record.objects)):
                pass
        elif kind == "DELETE":
            store.delete(key)
        else:
            name = f"{key}.part-{next(self._numbers)}" if kind == "PUTPART" else key
            store.put(name, Generator(record.bytes, seed=1, index=next(self._numbers)).whole())


def _kind(record: OpRecord) -> str:
    return _ALIASES.get(record.op, record.op)


class _Sent(NamedTuple):
    """What one process has sent."""

    sent: int
    errors: int
    skipped: dict[str, int]
    """By all of them: each sees every row."""
    seconds: float
    late: list[float]
    seen: list[OpRecord]


def _run_share(
    path: str,
    wanted: frozenset[str],
    speed: float,
    concurrency: int,
    to: str | None,
    place: dict[str, Any],
    start: float,
    share: tuple[int, int],
) -> _Sent:
    """A task."""
    targets = _Targets(to, concurrency, place)
    try:
        return _run(path, wanted, speed, concurrency, targets, None, share, start)
    finally:
        targets.close()


def _run(
    path: str,
    wanted: frozenset[str],
    speed: float,
    concurrency: int,
    targets: _Targets,
    progress: Callable[[int], None] | None,
    share: tuple[int, int] = (0, 1),
    start: float = 0.0,
) -> _Sent:
    """Every `share[1]`-th row that is sent, from `share[0]` on; the first row of all is due at `start` (0: now)."""
    skipped: dict[str, int] = {}
    seen: list[OpRecord] = []
    late: list[float] = []
    sent = 0
    errors = itertools.count()
    anchor = time.time_ns() - time.perf_counter_ns()
    fatal: list[BaseException] = []
    pool = BoundedPool(concurrency, "s3loader-replay", max_jobs=concurrency)

    def note(event: events.OpEvent) -> None:
        if is_request(event):
            seen.append(record_of(event, anchor, "replay", 0))

    def one(record: OpRecord) -> None:
        try:
            targets.send(record)
        except ConfigError as error:
            fatal.append(error)
        except S3LoaderError:
            next(errors)
        except BaseException as error:  # noqa: BLE001 - raised by the caller
            fatal.append(error)

    stop = events.subscribe(note)
    begun = begin = time.perf_counter()
    if start:
        begin += start - time.time()
    due_rows = itertools.count()
    first: int | None = None
    try:
        for record in in_order(partial(read_op_log, path)):
            if not _is_sent(record, wanted):
                skipped[record.op] = skipped.get(record.op, 0) + 1
                continue
            mine = next(due_rows) % share[1] == share[0]
            first = record.start if first is None else first
            if not mine:
                continue
            due = begin + ((record.start - first) / 1e9 / speed if speed else 0.0)
            time.sleep(max(0.0, due - time.perf_counter()))
            pool.submit(partial(one, record))
            if fatal:
                break
            late.append(time.perf_counter() - due if speed else 0.0)
            sent += 1
            if progress is not None:
                progress(sent)
        pool.wait()
    finally:
        pool.stop()
        stop()
    if fatal:
        raise fatal[0]
    return _Sent(sent, next(errors), skipped, time.perf_counter() - begun, late, seen)


def _report(shares: Sequence[_Sent]) -> ReplayReport:
    late = sorted(seconds for share in shares for seconds in share.late)
    at = [late[min(len(late) - 1, int(len(late) * part))] for part in (0.5, 0.99, 1.0)] if late else [0.0] * 3
    try:
        summary = summarize(sorted((record for share in shares for record in share.seen), key=lambda record: record.start))
    except FormatError:
        summary = None
    sent, errors = sum(share.sent for share in shares), sum(share.errors for share in shares)
    seconds = max(share.seconds for share in shares)
    return ReplayReport(sent, errors, shares[0].skipped, seconds, (at[0], at[1], at[2]), summary)
