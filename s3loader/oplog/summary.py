"""What an op-log says in figures: per operation, and second by second. Percentiles are exact, over all requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from s3loader.errors import FormatError
from s3loader.oplog.columns import OpRecord

__all__ = ["OpLogSummary", "OpSummary", "Percentiles", "Series", "summarize"]

_SECOND: Final = 1_000_000_000
_MOST_SLOW: Final = 10
_MOST_ERRORS: Final = 20


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of durations, in milliseconds."""

    p50: float
    p90: float
    p99: float
    max: float
    mean: float


@dataclass(frozen=True, slots=True)
class Series:
    """What happened in each interval of the run."""

    step: float
    """Seconds of one interval."""
    ops: list[float]
    """Successful requests per second, counted where they end."""
    bytes: list[float]
    """Bytes per second, spread over the time of their requests."""
    errors: list[float]
    """Failed requests per second."""


@dataclass(frozen=True, slots=True)
class OpSummary:
    """One kind of operation. Rates are over the time from its first start to its last end."""

    op: str
    requests: int
    """All of them, failed ones too."""
    errors: int
    objects: int
    bytes: int
    """Moved by requests that succeeded; `objects` too."""
    seconds: float
    ops_per_second: float
    bytes_per_second: float
    concurrency: int
    """Most requests under way at once."""
    latency: Percentiles | None
    """Of requests that succeeded; None: there is none."""
    first_byte: Percentiles | None
    """From a request's start to the first byte of its answer, where that is known."""
    series: Series
    durations: list[float] = field(repr=False)
    """Milliseconds: 201 quantiles of the latency, from the fastest to the slowest request."""


@dataclass(frozen=True, slots=True)
class OpLogSummary:
    """What `summarize` found."""

    start: int
    """Of the first request, nanoseconds since 1970."""
    seconds: float
    requests: int
    errors: int
    bytes: int
    clients: list[str]
    processes: int
    endpoints: list[str]
    ops: list[OpSummary]
    """The one with most bytes first."""
    slowest: list[OpRecord]
    error_kinds: list[tuple[str, str, int]]
    """Operation, message and how often, the most frequent first."""


@dataclass(slots=True)
class _Columns:
    start: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    ok: list[bool] = field(default_factory=list)
    objects: int = 0


def summarize(records: Iterable[OpRecord], *, intervals: int = 600) -> OpLogSummary:
    """Sum up requests.

    Args:
        records: In any order.
        intervals: Most of them in a series: each is a second, or as many whole seconds as it takes.

    Raises:
        FormatError: there is no request.
    """
    columns: dict[str, _Columns] = {}
    clients: dict[str, None] = {}
    endpoints: dict[str, None] = {}
    processes: set[tuple[str, int | None]] = set()
    errors: Counter[tuple[str, str]] = Counter()
    slowest: list[OpRecord] = []
    least = -1
    for record in records:
        of = columns.setdefault(record.op, _Columns())
        of.start.append(record.start)
        of.end.append(max(record.start, record.end))
        of.first.append(-1 if record.first_byte is None else max(record.start, record.first_byte))
        of.ok.append(not record.error)
        of.bytes.append(0 if record.error else record.bytes)
        of.objects += 0 if record.error else record.objects
        clients[record.client_id] = endpoints[record.endpoint] = None
        processes.add((record.client_id, record.process))
        if record.error:
            errors[record.op, record.error] += 1
        if record.end - record.start > least:
            slowest = sorted([*slowest, record], key=lambda r: r.start - r.end)[:_MOST_SLOW]
            least = slowest[-1].end - slowest[-1].start if len(slowest) == _MOST_SLOW else -1
    if not columns:
        raise FormatError("the log holds no request", hint="were there any between init_op_log and finalize_op_log?")
    begin = min(min(of.start) for of in columns.values())
    end = max(max(of.end) for of in columns.values())
    seconds = (end - begin) / _SECOND
    step = max(1, -(-int(seconds + 1) // intervals))
    ops = [_of_op(op, of, begin, int(seconds // step) + 1, step) for op, of in columns.items()]
    return OpLogSummary(
        begin,
        seconds,
        sum(op.requests for op in ops),
        sum(op.errors for op in ops),
        sum(op.bytes for op in ops),
        sorted(clients),
        len(processes),
        sorted(endpoints),
        sorted(ops, key=lambda op: (-op.bytes, -op.requests, op.op)),
        slowest,
        [(op, message, count) for (op, message), count in errors.most_common(_MOST_ERRORS)],
    )


def _of_op(op: str, of: _Columns, begin: int, intervals: int, step: int) -> OpSummary:
    start, end, first = (np.array(column, np.int64) for column in (of.start, of.end, of.first))
    size, ok = np.array(of.bytes, np.int64), np.array(of.ok, np.bool_)
    seconds = (int(end.max()) - int(start.min())) / _SECOND
    good = int(ok.sum())
    moved = int(size.sum())
    durations = (end - start)[ok] / 1e6
    known = ok & (first >= 0)
    return OpSummary(
        op,
        len(start),
        len(start) - good,
        of.objects,
        moved,
        seconds,
        good / seconds if seconds else 0.0,
        moved / seconds if seconds else 0.0,
        _concurrency(start, end),
        _percentiles(durations),
        _percentiles((first - start)[known] / 1e6),
        _series(start - begin, end - begin, size, ok, intervals, step),
        [] if not good else [float(q) for q in np.quantile(durations, np.linspace(0, 1, 201))],
    )


def _percentiles(durations: Any) -> Percentiles | None:
    if not len(durations):
        return None
    p50, p90, p99 = np.percentile(durations, (50, 90, 99))
    return Percentiles(float(p50), float(p90), float(p99), float(durations.max()), float(durations.mean()))


def _concurrency(start: Any, end: Any) -> int:
    """Of two requests, one of which ends when the other starts, one is under way."""
    times = np.concatenate((end, start))
    change = np.concatenate((np.full(len(end), -1), np.full(len(start), 1)))
    order = np.lexsort((change, times))
    return max(1, int(np.cumsum(change[order]).max()))


def _series(start: Any, end: Any, size: Any, ok: Any, intervals: int, step: int) -> Series:
    width = step * _SECOND
    last = np.minimum(end // width, intervals - 1)
    ops = np.bincount(last[ok], minlength=intervals)
    errors = np.bincount(last[~ok], minlength=intervals)
    # each request's bytes over the intervals it touches, by the time it spends in each
    touched = last - start // width + 1
    which = np.repeat(np.arange(len(start)), touched)
    interval = np.arange(len(which)) - np.repeat(np.cumsum(touched) - touched, touched) + (start // width)[which]
    inside = np.minimum(end[which], (interval + 1) * width) - np.maximum(start[which], interval * width)
    share = np.where(end[which] > start[which], inside / np.maximum(1, (end - start)[which]), 1.0)
    moved = np.bincount(interval, weights=size[which] * share, minlength=intervals)
    return Series(float(step), *([float(n) / step for n in counts] for counts in (ops, moved, errors)))
