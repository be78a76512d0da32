"""``ls list stat get mp-get du list-buckets``: looking at objects and reading them."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from s3loader.cli.objects import duration, found_by, megabytes, parse_target, pattern_options
from s3loader.cli.output import json_option, print_json, print_table
from s3loader.errors import ConfigError, ObjectNotFoundError
from s3loader.types import ObjectURL
from s3loader.units import format_size

if TYPE_CHECKING:
    from s3loader.compat.s3dlio_endpoints import MultiEndpointStore

__all__ = ["du", "get", "list_buckets", "list_objects", "mp_get", "stat"]


@click.command("list")
@click.argument("url")
@click.option("-r", "--recursive", is_flag=True, help="All objects below, not only what is directly there.")
@click.option("-l", "--long", is_flag=True, help="Size, time and ETag of each.")
@click.option("-c", "--count-only", is_flag=True, help="Only how many there are.")
@click.option("--urls", is_flag=True, help="URLs in place of keys.")
@pattern_options
@json_option
def list_objects(
    url: str, recursive: bool, long: bool, count_only: bool, urls: bool, regex: str | None, literal: bool, as_json: bool
) -> None:
    """List objects at URL, whose last component may be a glob, e.g. s3://bucket/data/*.csv."""
    from s3loader.toolbox import single
    from s3loader.toolbox.selecting import select

    target = parse_target(url, literal=literal, regex=regex)
    found = select(target.url, {}, recursive=recursive, **target.options)
    count = 0
    if as_json:
        rows = []
        for entry in found:
            facts = {} if entry.meta is None else single.described(entry.meta)
            kept = {name: facts.get(name) for name in ("size", "last_modified", "etag")}
            rows.append({"url": entry.url, "key": entry.key, **kept})
        print_json({"objects": len(rows)} if count_only else rows)
        return
    for entry in found:
        count += 1
        if count_only:
            continue
        name = entry.url if urls else entry.key
        if long:
            facts = {} if entry.meta is None else single.described(entry.meta)
            size = "" if entry.meta is None else format_size(entry.meta.size)
            name = f"{facts.get('last_modified') or '':<20}  {size:>10}  {name}"
        click.echo(name)
    if not count_only:
        click.echo()
    click.echo(f"Total objects: {count}")


@click.command()
@click.argument("url")
@json_option
def stat(url: str, as_json: bool) -> None:
    """Show what the store says of one object: size, time, ETag, type, metadata."""
    from s3loader.toolbox import single

    found = single.stat(url)
    if as_json:
        print_json({"url": str(ObjectURL.parse(url)), **found})
        return
    for name, value in found.items():
        label = _LABELS.get(name, name.replace("_", " ").title().replace(" ", ""))
        click.echo(f"{label:<16}: {'' if value is None else value}")


_LABELS = {
    "etag": "ETag",
    "ssekms_key_id": "SseKmsKeyId",
    "sse_customer_algorithm": "SseCustomerAlgo",
    "server_side_encryption": "SSE",
}


@click.command()
@click.argument("url", required=False)
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=64, show_default=True, help="Requests at a time.")
@click.option("-r", "--recursive", is_flag=True, help="All objects below, not only those directly there.")
@click.option("-o", "--output", help="Write the one object to this file; - is stdout. Default: read and throw away.")
@click.option("--offset", type=int, help="First byte; negative: from the end. One object only.")
@click.option("--length", type=click.IntRange(min=0), help="How many bytes; default: to the end.")
@click.option(
    "--keylist",
    type=click.Path(exists=True, dir_okay=False),
    help="Read the URLs from this file (or keys below URL), one a line.",
)
@click.option(
    "--endpoints",
    metavar="ROOT,...",
    help="Roots that hold the same objects, e.g. s3://host{1...4}:9000/bucket/; reads are spread over them. URL is below one.",
)
@pattern_options
@json_option
def get(
    url: str | None,
    jobs: int,
    recursive: bool,
    output: str | None,
    offset: int | None,
    length: int | None,
    keylist: str | None,
    endpoints: str | None,
    regex: str | None,
    literal: bool,
    as_json: bool,
) -> None:
    """Read one object, or all that URL names (a folder with a slash at its end, a glob), and say how fast."""
    from s3loader.toolbox import many

    if url is None and keylist is None:
        raise click.UsageError("give a URL or --keylist")
    if output is not None or offset is not None or length is not None:
        if url is None or keylist is not None or recursive or endpoints is not None:
            raise click.UsageError("--output, --offset and --length are for one object of one endpoint")
        _get_one(url, output, offset or 0, length)
        return
    spread = None if endpoints is None else _endpoints(endpoints)
    if keylist is not None:
        urls = _keys_of(keylist, url)
    elif spread is not None:
        assert url is not None
        if regex is not None:
            raise click.UsageError("--endpoints takes no pattern: name a folder, an object or a --keylist")
        urls = spread.list(url, recursive) if recursive or url.endswith("/") else [url]
        urls = [one for one in urls if not one.endswith("/")]
    else:
        assert url is not None
        target = parse_target(url, literal=literal, regex=regex)
        if target.is_pattern or recursive or url.endswith("/"):
            urls = [entry.url for entry in found_by(target, recursive=recursive)]
        else:
            urls = [url]
    if not urls:
        raise ObjectNotFoundError("there is nothing to read", op="get", url=url)
    if not as_json:
        click.echo(f"Fetching {len(urls)} objects with {jobs} jobs…", err=True)
    start = time.perf_counter()
    if spread is None:
        count, total = many.get_many_stats(urls, jobs)
    else:
        count, total = len(urls), sum(many.in_parallel(urls, lambda url: len(spread.get(url)), jobs))
    seconds = time.perf_counter() - start
    if as_json:
        print_json({"objects": count, "bytes": total, "seconds": seconds})
        return
    click.echo(f"downloaded {megabytes(total)} MB in {duration(seconds)} ({megabytes(total / seconds)} MB/s)", err=True)


def _endpoints(roots: str) -> MultiEndpointStore:
    from s3loader.compat.s3dlio_endpoints import MultiEndpointStore, expand_template

    given = [root.strip() for root in roots.split(",") if root.strip()]
    return MultiEndpointStore([one for root in given for one in (expand_template(root) if "{" in root else [root])])


def _get_one(url: str, output: str | None, offset: int, length: int | None) -> None:
    from s3loader.toolbox import single

    whole = not offset and length is None
    data = single.get(url) if whole else single.get_range(url, offset, length)
    if output is None:
        click.echo(f"downloaded {len(data)} bytes", err=True)
    elif output == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        single.put(f"./{output}" if "://" not in output and not output.startswith(("/", "~")) else output, data)


def _keys_of(keylist: str, url: str | None) -> list[str]:
    try:
        with open(keylist, encoding="utf-8") as file:
            lines = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {keylist}: {error}", hint="a text file with one key or URL a line") from error
    base = "" if url is None else url.removesuffix("/") + "/"
    return [line if "://" in line else base + line for line in lines if line.strip()]


@click.command("mp-get")
@click.argument("url")
@click.option("-p", "--procs", type=click.IntRange(min=1), default=4, show_default=True, help="Processes.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=64, show_default=True, help="Requests at a time of each.")
@pattern_options
@json_option
def mp_get(url: str, procs: int, jobs: int, regex: str | None, literal: bool, as_json: bool) -> None:
    """Read all objects below URL in several processes, and say how fast."""
    from s3loader.toolbox import many

    target = parse_target(url, literal=literal, regex=regex)
    found = many.mp_get(target.url, procs, jobs, **target.options)
    if as_json:
        print_json(found._asdict())
        return
    click.echo(
        f"{found.objects} objects, {megabytes(found.bytes)} MB in {duration(found.seconds)} "
        f"({megabytes(found.bytes / found.seconds)} MB/s) by {len(found.processes)} processes"
    )


@click.command()
@click.argument("url")
@json_option
def du(url: str, as_json: bool) -> None:
    """Add up what is below URL, by the folders directly in it."""
    from s3loader.toolbox.selecting import select

    sizes: dict[str, list[int]] = {}
    for entry in select(url, {}, recursive=True):
        assert entry.meta is not None
        head, slash, _ = entry.name.partition("/")
        counted = sizes.setdefault(head + slash if slash else "", [0, 0])
        counted[0] += 1
        counted[1] += entry.meta.size
    if not sizes:
        raise ObjectNotFoundError("there is nothing", op="list", url=url)
    rows: list[tuple[Any, ...]] = [(name or "(here)", count, size) for name, (count, size) in sorted(sizes.items())]
    total = sum(row[1] for row in rows), sum(row[2] for row in rows)
    if as_json:
        print_json(
            {
                "objects": total[0],
                "bytes": total[1],
                "folders": {row[0]: [row[1], row[2]] for row in rows if row[0] != "(here)"},
            }
        )
        return
    print_table(("name", "objects", "size"), [(a, b, format_size(c)) for a, b, c in [*rows, ("total", *total)]])


@click.command("list-buckets")
@click.argument("url", default="s3://")
@json_option
def list_buckets(url: str, as_json: bool) -> None:
    """List the buckets that the credentials own."""
    from s3loader.toolbox import single

    found = single.list_buckets(url)
    if as_json:
        print_json(found)
        return
    for name in found:
        click.echo(name)
