"""``s3loader bench``: how fast a store of yours is, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from s3loader.cli.objects import place
from s3loader.cli.output import json_option, print_json, progress, rich_table, write_page
from s3loader.units import format_size

if TYPE_CHECKING:
    from s3loader.bench import BenchReport

__all__ = ["bench"]

F = TypeVar("F", bound=Callable[..., Any])


class _List(click.ParamType[Any]):
    """Values with commas between them."""

    name = "list"

    def __init__(self, numbers: bool) -> None:
        self._numbers = numbers

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The values."""
        if not isinstance(value, str):
            return value
        found = [part.strip() for part in value.split(",") if part.strip()]
        if not found or (self._numbers and not all(part.isdecimal() and int(part) for part in found)):
            self.fail("values with commas between them, such as " + ("1,8,32" if self._numbers else "64KiB,1MiB"), param, ctx)
        return [int(part) for part in found] if self._numbers else found


_sizes = click.option(
    "-s", "--sizes", type=_List(False), default="64KiB,1MiB,16MiB", show_default=True, help="Of the objects, with commas."
)
_jobs = click.option(
    "-j", "--jobs", type=_List(True), default="1,8,32", show_default=True, help="Requests at a time, with commas."
)
_existing = click.option("--existing", is_flag=True, help="Read what is at URL; write nothing.")


def _common(command: F) -> F:
    command = json_option(command)
    command = click.option("--html", metavar="FILE", help="Write the report as a page; - is stdout.")(command)
    command = click.option("--max-bytes", default="2GiB", show_default=True, help="Most bytes that are moved.")(command)
    return click.option(
        "--seconds", type=click.FloatRange(min=0.1), default=20.0, show_default=True, help="About so long, all in all."
    )(command)


@click.group()
def bench() -> None:
    """Measure a store of yours from here: throughput, requests, first bytes; advice comes out of the figures.

    What is written lies below a random name in URL and is deleted at the end, also after an error or Ctrl-C; nothing else is
    touched. Time and bytes are bounded.
    """


@bench.command()
@click.argument("url")
@_sizes
@_jobs
@_existing
@_common
def get(
    url: str, sizes: Any, jobs: Any, existing: bool, seconds: float, max_bytes: str, html: str | None, as_json: bool
) -> None:
    """Read objects of several sizes, so many at a time."""
    from s3loader.bench import measure_get

    with progress("bench get", "settings", quiet=as_json) as show:
        report = measure_get(
            url,
            sizes=sizes,
            concurrency=jobs,
            seconds=seconds,
            max_bytes=max_bytes,
            existing=existing,
            progress=show,
            **place(),
        )
    _tell(report, html, as_json)


@bench.command()
@click.argument("url")
@_sizes
@_jobs
@_common
def put(url: str, sizes: Any, jobs: Any, seconds: float, max_bytes: str, html: str | None, as_json: bool) -> None:
    """Write objects of several sizes, so many at a time."""
    from s3loader.bench import measure_put

    with progress("bench put", "settings", quiet=as_json) as show:
        report = measure_put(url, sizes=sizes, concurrency=jobs, seconds=seconds, max_bytes=max_bytes, progress=show, **place())
    _tell(report, html, as_json)


@bench.command()
@click.argument("url")
@click.option("-b", "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Samples of a batch.")
@click.option("--sample-size", default="100KiB", show_default=True, help="Bytes of a sample that is written.")
@click.option(
    "--order",
    "orders",
    type=click.Choice(["none", "block", "shard", "full"]),
    multiple=True,
    default=("none", "block", "full"),
    show_default=True,
    help="The loader's shuffle.",
)
@click.option("--index-dir", help="Of --existing: where indexes are kept if the store may not be written to.")
@_existing
@_common
def load(
    url: str,
    batch_size: int,
    sample_size: str,
    orders: tuple[str, ...],
    index_dir: str | None,
    existing: bool,
    seconds: float,
    max_bytes: str,
    html: str | None,
    as_json: bool,
) -> None:
    """Load batches in several orders: of a made-up dataset, or with --existing of yours at URL."""
    from s3loader.bench import measure_load

    with progress("bench load", "orders", quiet=as_json) as show:
        report = measure_load(
            url,
            orders=orders,
            batch_size=batch_size,
            sample_size=sample_size,
            seconds=seconds,
            max_bytes=max_bytes,
            existing=existing,
            index_dir=index_dir,
            progress=show,
            **place(),
        )
    _tell(report, html, as_json)


@bench.command()
@click.argument("url")
@click.option("-s", "--size", default="256MiB", show_default=True, help="Bytes of the state.")
@_common
def ckpt(url: str, size: str, seconds: float, max_bytes: str, html: str | None, as_json: bool) -> None:
    """Save a state and restore it, several times."""
    from s3loader.bench import measure_ckpt

    with progress("bench ckpt", "rounds", quiet=as_json) as show:
        report = measure_ckpt(url, size=size, seconds=seconds, max_bytes=max_bytes, progress=show, **place())
    _tell(report, html, as_json)


def _tell(report: BenchReport, html: str | None, as_json: bool) -> None:
    from s3loader.bench.report import bench_page, cells_of, header_of

    if html is not None:
        write_page(html, bench_page(report))
    if html == "-":
        return
    if as_json:
        print_json(report.as_dict())
        return
    rich_table(header_of(report.kind), [cells_of(report.kind, row) for row in report.rows], f"{report.kind} {report.url}")
    for line in report.advice:
        click.echo(f"advice: {line}")
    for message, count in sorted(report.errors.items()):
        click.echo(f"{count:,} x {message}", err=True)
    for note in report.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(
        f"read {format_size(report.read)}, wrote {format_size(report.written)}; {report.deleted:,} objects deleted again",
        err=True,
    )
