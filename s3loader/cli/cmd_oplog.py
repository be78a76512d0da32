"""``s3loader oplog``: what a log of requests says, as figures, as a page of pictures, or sent once more."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from s3loader.cli.objects import engine_options
from s3loader.cli.output import json_option, print_json, print_table, progress, write_page
from s3loader.units import format_duration, format_size

if TYPE_CHECKING:
    from s3loader.oplog import OpLogSummary

__all__ = ["oplog"]

_logs = click.argument("logs", nargs=-1, required=True, metavar="LOG...")


@click.group()
def oplog() -> None:
    """Logs of requests (of s3loader, s3dlio or warp): sum up, draw, merge, replay.

    A program writes one with s3loader.oplog.init_op_log("run.tsv.zst"), or when S3LOADER_OPLOG=run.tsv.zst is set.
    """


@oplog.command("summarize")
@_logs
@click.option("--op", "ops", multiple=True, help="Only this operation; may be given several times.")
@click.option("--series", is_flag=True, help="Show what happened second by second too.")
@json_option
def summarize_command(logs: Sequence[str], ops: Sequence[str], series: bool, as_json: bool) -> None:
    """Requests, rates, latencies and errors by operation; several LOGs count as one."""
    found = _summary(logs, ops)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    click.echo(
        f"{found.requests:,} requests, {format_size(found.bytes)}, {found.errors:,} errors "
        f"in {format_duration(found.seconds)}, {found.processes:,} processes"
    )
    _print_ops(found)
    for op, message, count in found.error_kinds:
        click.echo(f"{count:,} x {op}: {message}")
    if series:
        for of in found.ops:
            click.echo(f"\n{of.op}, in intervals of {of.series.step:g} s")
            rows = zip(itertools.count(0, int(of.series.step)), of.series.ops, of.series.bytes, of.series.errors, strict=False)
            print_table(
                ("second", "ops/s", "MB/s", "errors/s"),
                [(at, round(n, 2), round(b / 1e6, 2), round(e, 2)) for at, n, b, e in rows],
            )


@oplog.command()
@_logs
@click.option("-o", "--output", help="The page; default: the first LOG's name with .html, '-' is stdout.")
@click.option("--title", help="Of the page; default: names of the logs.")
@click.option("--op", "ops", multiple=True, help="Only this operation; may be given several times.")
def plot(logs: Sequence[str], output: str | None, title: str | None, ops: Sequence[str]) -> None:
    """Write one HTML page with tables and pictures: throughput, requests, errors over time, latencies."""
    from s3loader.oplog import html_report

    page = html_report(_summary(logs, ops), title or ", ".join(os.path.basename(log) for log in logs))
    path = output or f"{logs[0].removesuffix('.zst').removesuffix('.tsv').removesuffix('.csv')}.html"
    write_page(path, page)
    if path != "-":
        click.echo(path)


@oplog.command()
@_logs
@click.option("-o", "--output", required=True, help="The new log; may be one of LOGs.")
def merge(logs: Sequence[str], output: str) -> None:
    """Write LOGs as one, in the order of their starts. Also mends a log that a killed program has left."""
    from s3loader.oplog import merge_op_logs

    count = merge_op_logs(logs, output)
    click.echo(f"{output}: {count:,} requests")


@oplog.command()
@click.argument("log")
@click.option("--to", help="URL below which all keys lie; without it, reads go where they went, and nothing is written.")
@click.option("--op", "ops", multiple=True, help="GET, STAT, LIST, PUT, PUTPART or DELETE; may be given several times.")
@click.option("--speed", type=float, default=1.0, show_default=True, help="2 is twice as fast as it was; 0: no waiting.")
@click.option("-j", "--concurrency", type=click.IntRange(min=1), default=64, show_default=True, help="Most requests at once.")
@click.option("--prepare", is_flag=True, help="First write the objects that are read, of made-up bytes (with --to).")
@click.option("--dry-run", is_flag=True, help="Only say what would be sent.")
@click.option("--endpoint-url", help="Of the store; default: from the environment.")
@engine_options
@json_option
def replay(
    log: str,
    to: str | None,
    ops: Sequence[str],
    speed: float,
    concurrency: int,
    prepare: bool,
    dry_run: bool,
    endpoint_url: str | None,
    as_json: bool,
    job: dict[str, Any],
) -> None:
    """Send the requests of LOG again, at the times they were sent then; exit code 1 if some failed.

    GET, STAT and LIST are sent; with --to also PUT and PUTPART, whose bytes are made up. DELETE has to be named.
    """
    from s3loader.oplog import replay_op_log

    store: dict[str, Any] = {} if endpoint_url is None else {"endpoint_url": endpoint_url}
    if dry_run:
        from s3loader.oplog.replay import plan_replay

        plan = plan_replay(log, to, ops=ops or None, speed=speed)
        if as_json:
            print_json(plan)
        else:
            print_table(("op", "requests", "bytes"), [(op, n, size) for op, (n, size) in plan["send"].items()])
            click.echo(f"in {format_duration(plan['seconds'])}; not sent: {plan['skipped'] or 'none'}")
        return
    with progress("replay", "requests", quiet=as_json) as show:
        report = replay_op_log(
            log, to, ops=ops or None, speed=speed, concurrency=concurrency, prepare=prepare, progress=show, **job, **store
        )
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        median, high, most = map(format_duration, report.late)
        click.echo(f"{report.sent:,} requests sent, {report.errors:,} failed, in {format_duration(report.seconds)}")
        click.echo(f"later than then: median {median}, p99 {high}, most {most}")
        if report.skipped:
            click.echo("not sent: " + ", ".join(f"{count:,} {op}" for op, count in sorted(report.skipped.items())))
        if report.summary is not None:
            _print_ops(report.summary)
            for op, message, count in report.summary.error_kinds:
                click.echo(f"{count:,} x {op}: {message}")
    if report.errors:
        sys.exit(1)


def _summary(logs: Sequence[str], ops: Sequence[str]) -> OpLogSummary:
    from s3loader.oplog import read_op_log, summarize

    wanted = {op.upper() for op in ops}
    rows = itertools.chain.from_iterable(map(read_op_log, logs))
    return summarize(row for row in rows if not wanted or row.op in wanted)


def _print_ops(found: OpLogSummary) -> None:
    header = ("op", "requests", "errors", "bytes", "ops/s", "MB/s", "at once", "p50 ms", "p90", "p99", "first byte p50", "p99")
    rows = []
    for op in found.ops:
        late, first = op.latency, op.first_byte
        rows.append(
            (
                op.op,
                op.requests,
                op.errors,
                op.bytes,
                round(op.ops_per_second, 1),
                round(op.bytes_per_second / 1e6, 1),
                op.concurrency,
                *((round(late.p50, 2), round(late.p90, 2), round(late.p99, 2)) if late else ("-", "-", "-")),
                *((round(first.p50, 2), round(first.p99, 2)) if first else ("-", "-")),
            )
        )
    print_table(header, rows)
