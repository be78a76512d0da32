"""``download cp copy sync``: objects from one place to another."""

from __future__ import annotations

import os
import time
from typing import Any

import click

from s3loader.cli.cmd_objects_write import on_exists_options, policy_of, tell
from s3loader.cli.objects import engine_options, parse_target, pattern_options, show_failures
from s3loader.cli.output import json_option, print_json, progress
from s3loader.errors import PartialFailureError

__all__ = ["copy", "download", "sync"]


@click.command()
@click.argument("url")
@click.argument("folder")
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=64, show_default=True, help="Requests at a time.")
@click.option("-r", "--recursive", is_flag=True, help="All objects below, not only those directly there.")
@click.option("--flatten", is_flag=True, help="Without the folders in their names.")
@on_exists_options
@pattern_options
@json_option
def download(
    url: str,
    folder: str,
    jobs: int,
    recursive: bool,
    flatten: bool,
    on_exists: str | None,
    regex: str | None,
    literal: bool,
    as_json: bool,
) -> None:
    """Write the objects that URL names (its last component may be a glob) as files in FOLDER."""
    from s3loader.toolbox import transfer

    target = parse_target(url, literal=literal, regex=regex)
    with progress("download", quiet=as_json) as show:
        try:
            report = transfer.download(
                target.url,
                folder,
                recursive=recursive,
                flatten=flatten,
                on_exists=policy_of(on_exists),
                max_in_flight=jobs,
                progress=show,
                **target.options,
            )
        except PartialFailureError as error:
            show_failures(error, "download")
            raise
    tell(report, "Downloaded", as_json)


@click.command("cp")
@click.argument("source")
@click.argument("target")
@click.option("-r", "--recursive", is_flag=True, help="All that is below SOURCE.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=16, show_default=True, help="Objects at a time.")
@on_exists_options
@pattern_options
@engine_options
@json_option
def copy(
    source: str,
    target: str,
    recursive: bool,
    jobs: int,
    on_exists: str | None,
    regex: str | None,
    literal: bool,
    as_json: bool,
    job: dict[str, Any],
) -> None:
    """Copy objects or files, between any two stores, or a store and this machine."""
    from s3loader.toolbox import transfer

    policy = policy_of(on_exists)
    from_here, to_here = _is_local(source), _is_local(target)
    with progress("copy", quiet=as_json) as show:
        try:
            if from_here and not to_here:
                if os.path.isdir(source) and not recursive:
                    raise click.UsageError(f"{source} is a folder: add -r")
                into = target if target.endswith("/") or not os.path.isdir(source) else f"{target}/"
                report = transfer.upload(source, into, on_exists=policy, max_in_flight=jobs, progress=show)
            else:
                what = parse_target(source, literal=literal, regex=regex)
                several = recursive or what.is_pattern
                if several or not to_here or from_here:
                    report = transfer.copy(
                        what.url,
                        target,
                        recursive=recursive,
                        on_exists=policy,
                        max_in_flight=jobs,
                        progress=show,
                        **job,
                        **what.options,
                    )
                else:
                    into = target if not os.path.isdir(target) else f"{target.removesuffix('/')}/"
                    report = transfer.copy(what.url, into, on_exists=policy, progress=show)
        except PartialFailureError as error:
            show_failures(error, "copy")
            raise
    tell(report, "Copied", as_json)


def _is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


@click.command()
@click.argument("source")
@click.argument("target")
@click.option("--delete", is_flag=True, help="Also delete what only TARGET has.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=16, show_default=True, help="Objects at a time.")
@engine_options
@json_option
def sync(source: str, target: str, delete: bool, dry_run: bool, jobs: int, as_json: bool, job: dict[str, Any]) -> None:
    """Make the folder TARGET hold what the folder SOURCE holds; running it again copies nothing."""
    from s3loader.toolbox import transfer

    planned: list[tuple[str, str]] = []

    def note(what: str, url: str) -> None:
        if as_json:
            planned.append((what, url))
        elif dry_run or what == "delete":
            click.echo(f"{'would ' if dry_run else ''}{what} {url}")

    start = time.perf_counter()
    with progress("sync", quiet=as_json or dry_run) as show:
        try:
            report = transfer.sync(
                source,
                target,
                delete=delete,
                dry_run=dry_run,
                max_in_flight=jobs,
                planned=note,
                progress=show,
                **job,
            )
        except PartialFailureError as error:
            show_failures(error, "sync")
            raise
    if as_json:
        counts = {"objects": report.objects, "bytes": report.bytes, "skipped": report.skipped, "deleted": report.deleted}
        print_json({"dry_run": dry_run, **counts, "seconds": time.perf_counter() - start, "planned": planned})
        return
    tell(report, "Would copy" if dry_run else "Copied", False)
