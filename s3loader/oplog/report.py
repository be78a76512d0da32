"""One HTML page of an op-log: tables and pictures (SVG) in one file, without scripts, fonts or anything from a network."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Sequence

from s3loader.oplog.summary import OpLogSummary, OpSummary, Percentiles
from s3loader.pages import COLORS, Line, chart, escaped, facts, key_of, number, page, round_up, table
from s3loader.units import format_duration, format_size

__all__ = ["html_report"]


def html_report(summary: OpLogSummary, title: str) -> str:
    """The page. The figures stand in it as JSON too, in the element ``data``.

    Args:
        summary: Of the log.
        title: Its heading, for example the log's name.
    """
    color = {op.op: COLORS[at % len(COLORS)] for at, op in enumerate(summary.ops)}
    legend = key_of([op.op for op in summary.ops])
    began = datetime.datetime.fromtimestamp(summary.start // 1_000_000_000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    endpoints = [endpoint for endpoint in summary.endpoints if endpoint]
    parts = [
        f"<p>{escaped('; '.join([f'from {began}', f'processes: {summary.processes:,}', *endpoints]))}</p>",
        facts(
            [
                ("requests", f"{summary.requests:,}"),
                ("moved", format_size(summary.bytes)),
                ("errors", f"{summary.errors:,}"),
                ("time", format_duration(summary.seconds)),
            ]
        ),
        "<h2>Operations</h2>",
        table(
            ("", "requests", "errors", "ops/s", "MB/s", "at once", "p50", "p90", "p99", "max", "first byte p50", "p99"),
            [_row(op) for op in summary.ops],
        ),
        "<p>Latencies and first bytes in ms, of requests that succeeded; percentiles are exact.</p>",
    ]
    moving = [op for op in summary.ops if op.bytes]
    if moving:
        parts += [
            f"<h2>Throughput, MB/s</h2><p>{legend}</p>",
            _over_time(moving, color, lambda op: [b / 1e6 for b in op.series.bytes]),
        ]
    parts += [f"<h2>Requests per second</h2><p>{legend}</p>", _over_time(summary.ops, color, lambda op: op.series.ops)]
    if summary.errors:
        failing = [op for op in summary.ops if op.errors]
        parts += [f"<h2>Errors per second</h2><p>{legend}</p>", _over_time(failing, color, lambda op: op.series.errors)]
    parts += [f"<h2>Latency: share of requests that took at most so long</h2><p>{legend}</p>", _latency(summary.ops, color)]
    if summary.error_kinds:
        rows = [(op, message, f"{count:,}") for op, message, count in summary.error_kinds]
        parts += ["<h2>Errors</h2>", table(("", "message", "times"), rows, text=1)]
    slow = [
        (r.op, r.file, format_size(r.bytes), f"{(r.end - r.start) / 1e6:,.1f}", str(r.status or ""), str(r.attempt))
        for r in summary.slowest
    ]
    parts += ["<h2>Slowest requests</h2>", table(("", "file", "bytes", "ms", "status", "attempt"), slow, text=1)]
    return page(title, parts, dataclasses.asdict(summary))


def _row(op: OpSummary) -> list[str]:
    def of(some: Percentiles | None, *names: str) -> list[str]:
        return [number(getattr(some, name)) if some else "" for name in names]

    rates = (op.ops_per_second, op.bytes_per_second / 1e6)
    return [
        op.op,
        f"{op.requests:,}",
        f"{op.errors:,}",
        *map(number, rates),
        f"{op.concurrency:,}",
        *of(op.latency, "p50", "p90", "p99", "max"),
        *of(op.first_byte, "p50", "p99"),
    ]


def _over_time(ops: Sequence[OpSummary], color: dict[str, str], values: Callable[[OpSummary], Sequence[float]]) -> str:
    step = ops[0].series.step
    count = len(ops[0].series.ops)
    top = round_up(max(max(values(op)) for op in ops))
    span = count * step
    lines = []
    for op in ops:
        points = []
        for at, value in enumerate(values(op)):
            points += [(at * step / span, value / top), ((at + 1) * step / span, value / top)]
        lines.append(Line(op.op, color[op.op], points))
    across = [(f / 5, format_duration(span * f / 5) if f else "0 s") for f in range(6)]
    return chart(lines, across, [(f / 4, number(top * f / 4)) for f in range(5)])


def _latency(ops: Sequence[OpSummary], color: dict[str, str]) -> str:
    """Time on a logarithmic axis."""
    known = [op for op in ops if op.durations]
    if not known:
        return "<p>No request succeeded.</p>"
    low = math.floor(math.log10(max(1e-3, min(op.durations[0] for op in known))))
    high = max(low + 1, math.ceil(math.log10(max(1e-3, *(op.durations[-1] for op in known)))))
    lines = [
        Line(
            op.op,
            color[op.op],
            [
                ((math.log10(max(1e-3, ms)) - low) / (high - low), at / (len(op.durations) - 1))
                for at, ms in enumerate(op.durations)
            ],
        )
        for op in known
    ]
    across = [((power - low) / (high - low), format_duration(10.0**power / 1000)) for power in range(low, high + 1)]
    return chart(lines, across, [(f / 4, f"{f * 25} %") for f in range(5)])
