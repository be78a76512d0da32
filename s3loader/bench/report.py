"""What a measurement found, and what follows from it. Pure: every sentence of advice comes out of the rows.
It can be one HTML page."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from s3loader.pages import bars, escaped, facts, key_of, lines_chart, number, page, table
from s3loader.units import format_duration, format_size

__all__ = ["BenchReport", "Row", "Times", "advise", "bench_page", "cells_of", "header_of", "times_of"]

_ENOUGH: Final = 0.9
"""A number of requests at a time is enough that reaches this share of the best."""
_GROWS: Final = 1.2
"""Throughput still grows where the largest number moves so much more than the next smaller."""
_TAIL: Final = 3.0
"""The slowest of 100 take so much longer than the median: a tail worth a second request."""
_FEW: Final = 50
"""Requests that a p99 takes to mean anything."""
_BUSY: Final = 0.85
"""Of a core, above which this process itself is what limits."""


@dataclass(frozen=True, slots=True)
class Times:
    """Of durations, in milliseconds."""

    p50: float
    p90: float
    p99: float
    max: float


def times_of(seconds: Sequence[float]) -> Times | None:
    """Percentiles; None where nothing was measured."""
    if not seconds:
        return None
    p50, p90, p99 = np.percentile(np.array(seconds) * 1000, (50, 90, 99))
    return Times(float(p50), float(p90), float(p99), max(seconds) * 1000)


@dataclass(frozen=True, slots=True)
class Row:
    """One setting that was measured."""

    what: str
    """``get``, ``put``, ``load block`` ..., ``save``, ``restore``."""
    size: int
    """Bytes of an object, of a sample on average, of a state."""
    concurrency: int
    """Requests at a time; of loading the samples of a batch, of checkpoints 1."""
    requests: int
    """That succeeded; of loading those that the store got, of checkpoints saves or restores."""
    bytes: int
    """Of content moved."""
    seconds: float
    errors: int = 0
    """Requests that failed, also after they were repeated."""
    repeated: int = 0
    """Requests that had to be sent again."""
    cpu: float = 0.0
    """Cores that this process kept busy."""
    latency: Times | None = None
    first_byte: Times | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    """What only this kind has."""

    @property
    def mb_s(self) -> float:
        """Decimal megabytes per second."""
        return self.bytes / 1e6 / self.seconds if self.seconds else 0.0

    @property
    def requests_s(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All of it, with the rates."""
        return {**dataclasses.asdict(self), "mb_s": self.mb_s, "requests_s": self.requests_s}


@dataclass
class BenchReport:
    """What was measured at one place."""

    kind: str
    """``get``, ``put``, ``load`` or ``ckpt``."""
    url: str
    engine: str = ""
    rows: list[Row] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What bounded the measurement, and what could not be cleaned up."""
    began: float = 0.0
    """Seconds since 1970."""
    written: int = 0
    """Bytes written to the store."""
    read: int = 0
    deleted: int = 0
    """Objects written and deleted again."""
    errors: dict[str, int] = field(default_factory=dict)
    """Messages of requests that failed, and how often."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "rows": [row.as_dict() for row in self.rows]}


# -- advice -----------------------------------------------------------------------------------------


def advise(report: BenchReport) -> list[str]:
    """What follows from the rows."""
    rows = [row for row in report.rows if row.requests]
    found: list[str] = []
    if report.kind in ("get", "put"):
        found += _of_requests(report.kind, rows)
    elif report.kind == "load":
        found += _of_loading(rows)
    else:
        found += _of_checkpoints(rows)
    found += _of_trouble(report.rows)
    return found or ["nothing stands out"]


def _of_requests(kind: str, rows: Sequence[Row]) -> Iterable[str]:
    by_size: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.concurrency):
        by_size.setdefault(row.size, []).append(row)
    best = {size: max(some, key=lambda row: row.mb_s) for size, some in by_size.items()}
    for size, some in by_size.items():
        if len(some) > 1:
            yield _enough(kind, size, some, best[size])
    sizes = sorted(best)
    if len(sizes) > 1:
        small, large = best[sizes[0]], max(best.values(), key=lambda row: row.mb_s)
        share = small.mb_s / large.mb_s if large.mb_s else 1.0
        if share < 0.5:
            packs = "pack small files into shards (s3loader pack)" if kind == "get" else "write fewer, larger objects"
            what = f"objects of {format_size(small.size)} move {_percent(share)} of the MB/s"
            yield f"{what} that {format_size(large.size)} move: {packs}"
        if (cost := _cost(by_size)) is not None:
            wait, rate = cost
            what = f"one request at a time costs about {format_duration(wait)} and then moves {rate / 1e6:,.0f} MB/s"
            yield f"{what}: ranges below {format_size(wait * rate)} spend more time waiting than moving"
    tails = [row for row in rows if row.first_byte is not None and row.requests >= _FEW]
    if tails:
        worst = max(tails, key=_tail)
        if _tail(worst) >= _TAIL and worst.first_byte is not None:
            p50, p99 = worst.first_byte.p50, worst.first_byte.p99
            hedge = f': hedge_after="{max(1, round(p99))}ms" of the loader asks again after that' if kind == "get" else ""
            late = f"of 100 first bytes one takes {_tail(worst):.1f} times the median ({p50:,.1f} and {p99:,.1f} ms)"
            yield f"{_setting(worst)}: {late}{hedge}"
    busy = [row for row in best.values() if row.cpu >= _BUSY]
    if busy:
        row = max(busy, key=lambda row: row.cpu)
        what = f"{_setting(row)}, {row.mb_s:,.0f} MB/s: this process kept {row.cpu:.1f} cores busy"
        yield f"{what}: the CPU limits here, not only the store; more processes (DataLoader workers) move more"


def _setting(row: Row) -> str:
    return f"{row.what} of {format_size(row.size)}, {row.concurrency} at a time"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _enough(kind: str, size: int, some: Sequence[Row], best: Row) -> str:
    verb = "reading" if kind == "get" else "writing"
    what = f"{verb} {format_size(size)}"
    last, before = some[-1], some[-2]
    if best is last and before.mb_s and last.mb_s > _GROWS * before.mb_s:
        return (
            f"{what}: still growing at {last.concurrency} at a time ({before.mb_s:,.0f} to {last.mb_s:,.0f} MB/s): try more "
            f"(-j {last.concurrency * 4})"
        )
    enough = next(row for row in some if row.mb_s >= _ENOUGH * best.mb_s)
    one = some[0]
    gain = f", {enough.mb_s / one.mb_s:.1f} times what {one.concurrency} moves" if enough is not one and one.mb_s else ""
    return f"{what}: {enough.concurrency} at a time are enough ({enough.mb_s:,.0f} of {best.mb_s:,.0f} MB/s{gain})"


def _cost(by_size: Mapping[int, Sequence[Row]]) -> tuple[float, float] | None:
    """Seconds that a request costs and bytes per second it moves then: a line through the medians with fewest at a time."""
    least = min((row.concurrency for some in by_size.values() for row in some), default=0)
    points = [(size, row.latency.p50 / 1000) for size, some in by_size.items() for row in some
              if row.concurrency == least and row.latency is not None]  # fmt: skip
    if len(points) < 2:
        return None
    (small, quick), (large, slow) = min(points), max(points)
    if slow <= quick:
        return None
    rate = (large - small) / (slow - quick)
    wait = quick - small / rate
    return (wait, rate) if wait > 0 else None


def _tail(row: Row) -> float:
    assert row.first_byte is not None
    return row.first_byte.p99 / row.first_byte.p50 if row.first_byte.p50 else 0.0


def _of_loading(rows: Sequence[Row]) -> Iterable[str]:
    for row in rows:
        first = row.more.get("first_batch")
        wait = "" if first is None else f"; first batch after {format_duration(first)}"
        yield f"{row.what}: {row.more['samples_s']:,.0f} samples/s, {row.more['verdict']}{wait}"
    whole = {row.what: row for row in rows}
    block, full = whole.get("load block"), whole.get("load full")
    if block is not None and full is not None and block.mb_s:
        share = full.mb_s / block.mb_s
        if share < _ENOUGH:
            yield f'shuffle="full" moves {_percent(share)} of what "block" moves here: it has a price'
        else:
            yield f'shuffle="full" moves {_percent(share)} of what "block" moves here: it costs nothing'
    wasteful = [row for row in rows if (row.more.get("amplification") or 1.0) > _GROWS]
    for row in wasteful:
        yield f"{row.what}: {row.more['amplification']:.1f} bytes are fetched for each that is used (explain() says why)"


def _of_checkpoints(rows: Sequence[Row]) -> Iterable[str]:
    saves = [row for row in rows if row.what == "save"]
    for row in saves:
        blocked, whole = row.more["blocked"], row.more["whole"]
        said = f"a save of {format_size(row.size)} keeps training for {format_duration(blocked)}, and is safe after"
        often = max(100 * blocked, whole)
        share = f"{100 * blocked / often:.2g} %" if often else "nothing"
        yield f"{said} {format_duration(whole)}: one every {format_duration(often)} costs {share} of the time"
    for row in rows:
        if row.what == "restore":
            took = format_duration(row.seconds / row.requests)
            yield f"a restore of {format_size(row.size)} takes {took} ({row.mb_s:,.0f} MB/s)"


def _of_trouble(rows: Sequence[Row]) -> Iterable[str]:
    for row in rows:
        total = row.requests + row.errors
        if row.errors:
            yield f"{_setting(row)}: {row.errors:,} of {total:,} requests failed"
        elif row.repeated and row.repeated >= 0.01 * total:
            limit = f"fewer at a time, or max_requests_per_second={max(1, int(row.requests_s))}"
            yield f"{_setting(row)}: {row.repeated:,} of {total:,} requests were sent again: the store is at its limit; {limit}"


# -- the report as one HTML page -------------------------------------------------------------------

_TITLES = {"get": "Reading from", "put": "Writing to", "load": "Loading from", "ckpt": "Checkpoints on"}


def header_of(kind: str) -> tuple[str, ...]:
    """The columns of a report of this kind."""
    rates = ("MB/s", "requests/s", "p50 ms", "p90", "p99")
    first = ("first byte p50", "p90", "p99")
    if kind == "load":
        return ("", "sample", "samples/s", *rates[:2], "batch p50 ms", "p90", "p99", *first, "first batch")
    if kind == "ckpt":
        return ("", "state", "rounds", "MB/s", "p50 ms", "p90", "p99", "blocks training ms")
    return ("size", "at a time", "requests", "failed", "repeated", *rates, *first, "cores")


def cells_of(kind: str, row: Row) -> tuple[str, ...]:
    """A row of the table, under `header_of`."""
    late = [number(getattr(row.latency, name)) if row.latency else "-" for name in ("p50", "p90", "p99")]
    first = [number(getattr(row.first_byte, name)) if row.first_byte else "-" for name in ("p50", "p90", "p99")]
    rates = (number(row.mb_s), number(row.requests_s))
    if kind == "load":
        wait = row.more["first_batch"]
        begin = "-" if wait is None else format_duration(wait)
        return (row.what, format_size(row.size), number(row.more["samples_s"]), *rates, *late, *first, begin)
    if kind == "ckpt":
        blocked = number(1000 * row.more["blocked"]) if "blocked" in row.more else ""
        return (row.what, format_size(row.size), f"{row.requests}", rates[0], *late, blocked)
    counts = (f"{row.requests:,}", f"{row.errors:,}", f"{row.repeated:,}")
    return (format_size(row.size), f"{row.concurrency}", *counts, *rates, *late, *first, f"{row.cpu:.1f}")


def bench_page(report: BenchReport) -> str:
    """The page. The figures stand in it as JSON too, in the element ``data``."""
    began = datetime.datetime.fromtimestamp(report.began, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    best = max(report.rows, key=lambda row: row.mb_s, default=None)
    figures = [("read", format_size(report.read)), ("written", format_size(report.written))]
    if best is not None:
        figures.insert(0, ("most, MB/s", number(best.mb_s)))
    figures.append(("deleted again", f"{report.deleted:,} objects"))
    parts = [f"<p>{began}, engine {escaped(report.engine)}</p>", facts(figures)]
    parts += [f'<div class="advice">{escaped(line)}</div>' for line in report.advice]
    parts += _charts(report)
    parts += ["<h2>Figures</h2>", table(header_of(report.kind), [cells_of(report.kind, row) for row in report.rows])]
    if report.errors:
        rows = [(message, f"{count:,}") for message, count in sorted(report.errors.items())]
        parts += ["<h2>Errors</h2>", table(("", "times"), rows)]
    parts += [f"<p>{escaped(note)}</p>" for note in report.notes]
    return page(f"{_TITLES[report.kind]} {report.url}", parts, report.as_dict())


def _charts(report: BenchReport) -> list[str]:
    if report.kind in ("load", "ckpt"):
        shown = [(row.what, row.mb_s, f"{number(row.mb_s)} MB/s") for row in report.rows]
        return ["<h2>Throughput</h2>", bars(shown)]
    speed: dict[str, dict[int, float]] = {}
    wait: dict[str, dict[int, float]] = {}
    for row in report.rows:
        speed.setdefault(format_size(row.size), {})[row.concurrency] = row.mb_s
        times = row.first_byte or row.latency
        if times is not None:
            wait.setdefault(format_size(row.size), {})[row.concurrency] = times.p99
    first = any(row.first_byte for row in report.rows)
    legend = f"<p>Requests at a time; sizes: {key_of(list(speed))}</p>"
    return [
        "<h2>Throughput</h2>",
        legend,
        lines_chart(speed, "MB/s"),
        f"<h2>{'First byte' if first else 'Whole request'}, 99 of 100 within</h2>",
        legend,
        lines_chart(wait, "ms"),
    ]
