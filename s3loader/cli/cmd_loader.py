"""``loader top``: a dataset as a loader sees it, in the terminal or as a page with pictures; the loaders of a
running job, live."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from s3loader.cli.objects import place
from s3loader.cli.output import json_option, print_json, print_table, write_page
from s3loader.errors import SourceNotFoundError
from s3loader.units import format_duration, format_size

if TYPE_CHECKING:
    from s3loader.inspection import JobView

__all__ = ["loader", "top"]

_BAR = 40


@click.command()
@click.argument("url")
@click.option(
    "-b", "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Of the epoch that is explained."
)
@click.option(
    "--shuffle", type=click.Choice(["none", "block", "shard", "full"]), default="block", show_default=True, help="Likewise."
)
@click.option("--html", metavar="FILE", help="Write a page with pictures; - is stdout.")
@click.option("--pictures", type=click.IntRange(min=0), default=24, show_default=True, help="Most pictures of the page.")
@click.option("--labels", type=click.IntRange(min=0), default=2000, show_default=True, help="Most labels that are read.")
@click.option("--index-dir", help="Where indexes are kept if the store may not be written to.")
@json_option
def loader(
    url: str,
    batch_size: int,
    shuffle: Any,
    html: str | None,
    pictures: int,
    labels: int,
    index_dir: str | None,
    as_json: bool,
) -> None:
    """Show the dataset at URL: samples, shards, members, sizes, classes, what an epoch costs.

    Indexes are read, some labels (members cls), and for --html some pictures; nothing is written to the store but missing
    indexes of shards.
    """
    from s3loader.inspection import dataset_page, open_for_inspection, view_dataset

    dataset = open_for_inspection(url, index_dir=index_dir, **place())
    view = view_dataset(
        dataset, batch_size=batch_size, shuffle=shuffle, labels=labels, pictures=0 if html is None else pictures
    )
    if html is not None:
        write_page(html, dataset_page(view))
        if html == "-":
            return
    if as_json:
        print_json(view.as_dict())
        return
    parts = f"{view.shards:,} shards" if view.shards else f"{view.objects:,} objects"
    stored = "" if view.stored is None else f", {format_size(view.stored)}"
    click.echo(f"{_line(view.name)}: {view.samples:,} samples in {parts}{stored}")
    some = "" if view.looked_at == view.samples else f" (of {view.looked_at:,} samples that were looked at)"
    click.echo(f"\nmembers{some}")
    print_table(
        ("", "number", "bytes"), [(_line(k.extension) or "(none)", k.count, format_size(k.bytes)) for k in view.members]
    )
    span = f"{format_size(view.smallest)} to {format_size(view.largest)}, median {format_size(view.median)}"
    click.echo(f"\nsizes of samples{some}: {span}")
    _bars([(f"{format_size(one.low)} to {format_size(one.high)}", one.count) for one in view.sizes])
    if view.classes:
        read = "" if view.labels_read == view.samples else f" (of {view.labels_read:,} labels that were read)"
        click.echo(f"\n{len(view.classes):,} classes{read}")
        _bars([(_line(name) or "(none)", count) for name, count in view.classes[:20]])
        if len(view.classes) > 20:
            click.echo(f"... and {len(view.classes) - 20:,} more")
    click.echo("\nan epoch")
    print_table(("", ""), view.explain)
    for note in view.notes:
        click.echo(f"note: {_line(note)}")


def _bars(rows: list[tuple[str, int]]) -> None:
    if not rows:
        return
    wide, top = max(len(name) for name, _ in rows), max(count for _, count in rows) or 1
    for name, count in rows:
        click.echo(f"  {name:<{wide}}  {'#' * round(_BAR * count / top):<{_BAR}}  {count:,}")


def _line(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]


# -- s3loader top ----------------------------------------------------------------------------------

_HEADER = ("rank", "workers", "state", "epoch", "batches", "samples/s", "MB/s", "network", "decode", "training",
           "again", "errors", "skipped", "silent")  # fmt: skip


@click.command()
@click.argument("folder", envvar="S3LOADER_STATS_DIR")
@click.option("--once", is_flag=True, help="Print what there is, and end.")
@click.option("--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds between two looks.")
@json_option
def top(folder: str, once: bool, interval: float, as_json: bool) -> None:
    """Follow the loaders of a job that was started with S3LOADER_STATS_DIR=FOLDER, rank by rank, until all of them have ended.

    Per rank: batches of the epoch, samples and megabytes per second now, the shares of the time that went into waiting for the
    store, into decoding, and into training; requests that were sent again, errors, samples left out, and how long nothing was
    delivered. FOLDER is one that all processes of the job can write to. With --json each look is one document (a line without
    --once).
    """
    from s3loader.inspection import read_job

    if once:
        job = read_job(folder)
        if not job.ranks:
            raise SourceNotFoundError(
                "no loader has written here", op="read", url=folder, hint="the job needs S3LOADER_STATS_DIR set to this folder"
            )
        print_json(job.as_dict()) if as_json else _print(job)
        return
    if as_json or not sys.stdout.isatty():
        _lines(folder, interval, as_json)
        return
    _live(folder, interval)


def _lines(folder: str, interval: float, as_json: bool) -> None:
    import json

    from s3loader.inspection import read_job

    while True:
        job = read_job(folder)
        if as_json:
            click.echo(json.dumps(job.as_dict()))
        else:
            errors = f", {job.errors:,} errors" if job.errors else ""
            click.echo(f"{len(job.ranks)} ranks: {job.samples:,} samples, {job.samples_s:,.0f}/s, {job.mb_s:,.0f} MB/s{errors}")
        if job.over:
            return
        time.sleep(interval)


def _live(folder: str, interval: float) -> None:
    from s3loader.inspection import read_job

    try:
        from rich.console import Group
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _lines(folder, interval, False)
        return

    def drawn(job: JobView) -> Any:
        table = Table(title=Text(f"{job.dataset or folder}: {_sum(job)}"), title_justify="left", header_style="bold")
        for name in _HEADER:
            table.add_column(name, justify="left" if name == "state" else "right")
        colors = {"running": "green", "silent": "yellow", "failed": "red"}
        for cells in _rows(job):
            style = colors.get(cells[2], "dim")
            table.add_row(*(Text(cell, style=style if at == 2 else "") for at, cell in enumerate(cells)))
        said = [Text(f"rank {rank.rank}: {rank.last_error}", style="red") for rank in job.ranks if rank.last_error]
        return Group(table, *said[:5])

    job = read_job(folder)
    with Live(drawn(job), auto_refresh=False) as live:
        while not job.over:
            time.sleep(interval)
            job = read_job(folder)
            live.update(drawn(job), refresh=True)


def _print(job: JobView) -> None:
    click.echo(f"{job.dataset}: {_sum(job)}")
    print_table(_HEADER, _rows(job))
    for rank in job.ranks:
        if rank.last_error:
            click.echo(f"rank {rank.rank}: {rank.last_error}")


def _sum(job: JobView) -> str:
    unreadable = f"; {job.unreadable} files are no counters" if job.unreadable else ""
    return f"{job.samples:,} samples, {job.samples_s:,.0f} samples/s, {job.mb_s:,.0f} MB/s, {job.errors:,} errors{unreadable}"


def _rows(job: JobView) -> list[tuple[str, ...]]:
    return [
        (
            str(rank.rank),
            str(rank.processes),
            rank.state,
            str(rank.epoch),
            f"{rank.delivered:,}/{rank.steps:,}",
            f"{rank.samples_s:,.0f}",
            f"{rank.mb_s:,.1f}",
            *(f"{100 * share:.0f} %" for share in (rank.network, rank.decode, rank.consumer)),
            f"{rank.repeated:,}",
            f"{rank.errors:,}",
            f"{rank.skipped:,}",
            format_duration(rank.age) if rank.state in ("running", "silent") and rank.age >= 2 else "",
        )
        for rank in job.ranks
    ]
