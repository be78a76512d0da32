"""The report of a measurement as one HTML page."""

from __future__ import annotations

import datetime

from s3loader.bench.report import BenchReport, Row
from s3loader.pages import bars, escaped, facts, key_of, lines_chart, number, page, table
from s3loader.units import format_duration, format_size

__all__ = ["bench_page", "cells_of", "header_of"]

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
