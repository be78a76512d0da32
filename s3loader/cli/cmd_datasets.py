"""``ls-samples index check repack``: the samples of a dataset, the indexes of its shards, whether the samples are whole, its
shards anew."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from s3loader.cli.objects import engine_options, place
from s3loader.cli.output import json_option, print_json, progress
from s3loader.errors import IntegrityError, PartialFailureError
from s3loader.units import format_size

if TYPE_CHECKING:
    from s3loader.shard.build import BuiltIndex
import sys

__all__ = ["check", "index", "ls_samples", "repack"]


@click.command("ls-samples")
@click.argument("url")
@click.option("-n", "--limit", type=click.IntRange(min=0), help="Most samples; default: all.")
@click.option("--index-dir", help="Where indexes are kept if the store may not be written to.")
@json_option
def ls_samples(url: str, limit: int | None, index_dir: str | None, as_json: bool) -> None:
    """List the samples of the dataset at URL: number, key, members with their sizes, shard. Reads indexes, no contents."""
    from s3loader.inspection import iter_samples, open_for_inspection

    dataset = open_for_inspection(url, index_dir=index_dir, **place())
    rows = iter_samples(dataset, limit=limit)
    if as_json:
        print_json(
            [
                {
                    "number": row.number,
                    "key": row.key,
                    "shard": row.shard,
                    "offset": row.offset,
                    "bytes": row.bytes,
                    "members": {member.name: member.bytes for member in row.members},
                }
                for row in rows
            ]
        )
        return
    shown = 0
    for row in rows:
        members = " ".join(f"{member.name}:{_size(member.bytes)}" for member in row.members)
        click.echo(f"{row.number:>8}  {_line(row.key)}  {_line(members)}" + (f"  {_line(row.shard)}" if row.shard else ""))
        shown += 1
    more = f" of {len(dataset):,}" if shown < len(dataset) else ""
    click.echo(f"{shown:,}{more} samples", err=True)


def _size(size: int | None) -> str:
    return "?" if size is None else format_size(size).replace(" ", "")


def _line(text: str) -> str:
    """Names may hold line breaks, and bytes that are no text."""
    return text if text.isprintable() else repr(text)[1:-1]


@click.command()
@click.argument("urls", nargs=-1, required=True)
@click.option("--index-dir", help="Keep them in this local folder; default: beside the shards.")
@click.option("--force", is_flag=True, help="Make those that are current too.")
@click.option("--no-checksums", is_flag=True, help="Read headers only: fast, but reads cannot be verified then.")
@click.option("--allow-missing-end", is_flag=True, help="Accept shards without the zero blocks that end one.")
@click.option("--allow-trailing", is_flag=True, help="Leave out what follows the end of a shard.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=4, show_default=True, help="Shards read at a time.")
@click.option("--dry-run", is_flag=True, help="Only say which indexes are missing or outdated.")
@engine_options
@json_option
def index(
    urls: tuple[str, ...],
    index_dir: str | None,
    force: bool,
    no_checksums: bool,
    allow_missing_end: bool,
    allow_trailing: bool,
    jobs: int,
    dry_run: bool,
    as_json: bool,
    job: dict[str, Any],
) -> None:
    """Make the indexes of tar shards that are missing or of another version of their shard.

    URLS are shards, patterns of them ({000..146}, *), folders, or the manifest of a dataset. Torn samples are said, and end
    with exit code 6; shards that cannot be indexed with 1.
    """
    from s3loader.inspection import index_archives

    with progress("index", "shards", quiet=as_json) as show:
        kept = index_archives(
            urls[0] if len(urls) == 1 else list(urls),
            index_dir=index_dir,
            force=force,
            checksums=not no_checksums,
            workers=jobs,
            allow_missing_end=allow_missing_end,
            allow_trailing=allow_trailing,
            dry_run=dry_run,
            progress=lambda done, total, _: show(done, total),
            **job,
            **place(),
        )
    if as_json:
        print_json([_facts(result) for result in kept])
    else:
        _say(kept, dry_run)
    failed = [result for result in kept if result.error is not None]
    if len(failed) == len(kept) == 1 and failed[0].error is not None:
        raise failed[0].error
    if failed:
        pairs = [(result.url, result.error) for result in failed if result.error is not None]
        raise PartialFailureError(
            f"{len(failed):,} of {len(kept):,} shards cannot be indexed", failures=pairs, hint="the reasons stand above"
        )
    if torn := sum(result.torn for result in kept):
        raise IntegrityError(f"{torn:,} samples are torn", op="index", url=urls[0], hint=f"s3loader check {urls[0]} names them")


def _facts(result: BuiltIndex) -> dict[str, Any]:
    left_out = {**result.not_files, **result.not_in_samples}
    return {
        "url": result.url,
        "action": result.action,
        "members": result.members,
        "samples": result.samples,
        "torn": result.torn,
        "left_out": {kind: some.count for kind, some in left_out.items()},
        "error": None if result.error is None else getattr(result.error, "message", str(result.error)),
    }


def _say(results: list[BuiltIndex], dry_run: bool) -> None:
    for result in results:
        if result.error is not None:
            click.echo(f"failed    {result.url}: {getattr(result.error, 'message', result.error)}")
        elif result.action in ("missing", "outdated"):
            click.echo(f"{result.action:<9} {result.url}")
        else:
            torn = f", {result.torn:,} TORN" if result.torn else ""
            left_out = {**result.not_files, **result.not_in_samples}
            others = "".join(f"; not read: {some.count:,} {kind}" for kind, some in sorted(left_out.items()))
            click.echo(f"{result.action:<9} {result.url}: {result.members:,} members, {result.samples:,} samples{torn}{others}")
    made = sum(result.action in ("built", "missing", "outdated") for result in results)
    verb = "would be made" if dry_run else "made"
    click.echo(f"{made:,} of {len(results):,} indexes {verb}", err=True)


@click.command()
@click.argument("source")
@click.argument("url")
@click.option("--shard-size", default="64MiB", show_default=True, help="Bytes of a shard.")
@click.option("--shard-samples", type=click.IntRange(min=1), help="Samples of a shard at most.")
@click.option("--compression", type=click.Choice(["zstd"]), help="Compress shards; members stay readable one by one.")
@click.option("-j", "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that write.")
@click.option(
    "--on-torn", type=click.Choice(["error", "split"]), default="error", show_default=True, help="What a torn sample is."
)
@click.option("--index-dir", help="Where indexes of SOURCE are kept if its store may not be written to.")
@click.option("--overwrite", is_flag=True, help="Replace another dataset at URL.")
@click.option(
    "--verify", type=click.Choice(["index", "full", "none"]), default="index", show_default=True, help="What is read back."
)
@engine_options
@click.option("--dry-run", is_flag=True, help="Only say what would be written.")
@json_option
def repack(
    source: str,
    url: str,
    shard_size: str,
    shard_samples: int | None,
    compression: str | None,
    workers: int,
    on_torn: str,
    index_dir: str | None,
    overwrite: bool,
    verify: Any,
    dry_run: bool,
    as_json: bool,
    job: dict[str, Any],
) -> None:
    """Write the dataset SOURCE anew at URL, in shards of another size: whole samples, same order, SOURCE is only read.

    SOURCE is a manifest, tar shards (also foreign ones) or an MDS folder. Run again, it goes on where it was stopped.
    """
    from s3loader.packing import plan_repack
    from s3loader.packing import repack as repack_dataset

    if dry_run:
        plan = plan_repack(source, url, shard_size=shard_size, on_torn=on_torn, index_dir=index_dir, **place())
        if as_json:
            print_json(dataclasses.asdict(plan))
            return
        size = "" if plan.bytes is None else f", {format_size(plan.bytes)}"
        click.echo(f"{plan.url}: {plan.samples:,} samples{size}; {plan.done} of {plan.parts} parts are there already")
        click.echo("nothing was written", err=True)
        return
    with progress("repack", "samples", quiet=as_json) as show:
        report = repack_dataset(
            source,
            url,
            shard_size=shard_size,
            shard_samples=shard_samples,
            compression=compression,
            workers=workers,
            exists="replace" if overwrite else "resume",
            verify=verify,
            on_torn=on_torn,
            index_dir=index_dir,
            progress=show,
            **job,
            **place(),
        )
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    done = "already there" if report.unchanged else "packed"
    checked = {"index": ", checked", "full": ", every byte read back", "none": ""}[report.verified]
    click.echo(f"{report.samples:,} samples in {report.shards:,} shards, {format_size(report.bytes)}: {done}{checked}")
    for kind, names in sorted(report.left_out.items()):
        click.echo(f"not packed: {kind} ({_line(', '.join(names[:3]))})")
    click.echo(report.manifest)


@click.command()
@click.argument("url")
@click.option("--index-dir", help="Where indexes are kept if the store may not be written to.")
@click.option("--allow-missing-end", is_flag=True, help="Accept shards without the zero blocks that end one.")
@click.option("--allow-trailing", is_flag=True, help="Leave out what follows the end of a shard.")
@engine_options
@json_option
def check(
    url: str, index_dir: str | None, allow_missing_end: bool, allow_trailing: bool, as_json: bool, job: dict[str, Any]
) -> None:
    """Look for torn samples in the dataset at URL; exit code 6 if there are any."""
    from s3loader.loader.check import check_dataset, report_lines

    given: dict[str, Any] = {**place(), **job} if index_dir is None else {"index_dir": index_dir, **place(), **job}
    found = check_dataset(
        url,
        allow_missing_end=allow_missing_end,
        allow_trailing=allow_trailing,
        **given,
    )
    if as_json:
        print_json(
            {
                "url": found.url,
                "shards": found.shards,
                "samples": found.samples,
                "torn": [[place.key, place.first, place.second, place.twice] for place in found.torn],
                "left_out": {kind: [some.count, list(some.names)] for kind, some in found.left_out.items()},
                "errors": {shard: error.message for shard, error in found.errors.items()},
            }
        )
    else:
        for line in report_lines(found):
            click.echo(line)
    if not found.ok:
        sys.exit(6)
