"""``put upload rm delete create-bucket delete-bucket``: what writes and deletes objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from s3loader.cli.objects import duration, found_by, megabytes, parse_target, pattern_options, show_failures
from s3loader.cli.output import json_option, print_json, progress
from s3loader.errors import ObjectNotFoundError, PartialFailureError
from s3loader.units import parse_size

if TYPE_CHECKING:
    from s3loader.toolbox import transfer

__all__ = ["create_bucket", "delete", "delete_bucket", "on_exists_options", "policy_of", "put", "upload"]


def on_exists_options(command: Any) -> Any:
    """Add ``--overwrite``, ``--skip-existing``, ``--if-changed`` and ``--no-clobber`` as `on_exists`."""
    for name, value, text in (
        ("--no-clobber", "error", "Fail where a target is there."),
        ("--if-changed", "if_changed", "Skip targets of the same size that are not older."),
        ("--skip-existing", "skip", "Skip targets that are there."),
        ("--overwrite", "overwrite", "Replace targets that are there (the default)."),
    ):
        command = click.option(name, "on_exists", flag_value=value, help=text)(command)
    return command


def policy_of(on_exists: Any) -> Any:
    """The policy, `"overwrite"` where none was chosen."""
    return on_exists or "overwrite"


@click.command()
@click.argument("prefix")
@click.option("-c", "--create-bucket", is_flag=True, help="Make the bucket where it is missing.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=32, show_default=True, help="Requests at a time.")
@click.option("-n", "--num", type=click.IntRange(min=1), default=1, show_default=True, help="How many objects.")
@click.option("-o", "--object-type", default="RAW", show_default=True, help="RAW, NPZ, TFRECORD, HDF5 or PARQUET.")
@click.option("-s", "--size", default="20MiB", show_default=True, help="Of each: bytes, or with a unit.")
@click.option("-t", "--template", default="object_{}_of_{}.dat", show_default=True, help="Names: the number, and how many.")
@click.option("-d", "--dedup", "--dedup-factor", type=click.IntRange(min=1), default=1, help="One block of so many is new.")
@click.option("-x", "--compress", "--compress-factor", type=click.IntRange(min=1), default=1, help="How far zlib shrinks it.")
@click.option("--seed", type=int, help="Of the data; default: another one each time.")
@click.option(
    "--data-gen-mode",
    type=click.Choice(["streaming", "single-pass"]),
    help="Make objects while they are uploaded, or whole before; default: streaming from 64 MiB on. The bytes are the same.",
)
@click.option("--chunk-size", default="8MiB", show_default=True, help="Of the pieces when streaming: bytes, or with a unit.")
@json_option
def put(
    prefix: str,
    create_bucket: bool,
    jobs: int,
    num: int,
    object_type: str,
    size: str,
    template: str,
    dedup: int,
    compress: int,
    seed: int | None,
    data_gen_mode: Any,
    chunk_size: str,
    as_json: bool,
) -> None:
    """Write objects of made-up data below PREFIX, and say how fast. (Files are written by `upload`.)"""
    from s3loader.toolbox.generated import put_generated

    made = put_generated(
        prefix,
        num,
        template,
        size=int(size) if size.isdecimal() else parse_size(size, "size"),
        object_type=object_type,
        dedup=dedup,
        compress=compress,
        seed=seed,
        max_in_flight=min(jobs, num),
        create_bucket=create_bucket,
        mode=data_gen_mode,
        chunk_size=int(chunk_size) if chunk_size.isdecimal() else parse_size(chunk_size, "chunk_size"),
    )
    if as_json:
        print_json(made._asdict())
        return
    rate = f"{made.objects / made.seconds:.2f} objects/s, {megabytes(made.bytes / made.seconds)} MB/s"
    click.echo(f"Uploaded {made.objects} objects (total {made.bytes} bytes) in {duration(made.seconds)} ({rate})")


@click.command()
@click.argument("sources", nargs=-1, required=True)
@click.argument("url")
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=32, show_default=True, help="Files at a time.")
@click.option("-c", "--create-bucket", is_flag=True, help="Make the bucket where it is missing.")
@click.option("--content-type", help="Of all of them.")
@on_exists_options
@json_option
def upload(
    sources: tuple[str, ...],
    url: str,
    jobs: int,
    create_bucket: bool,
    content_type: str | None,
    on_exists: str | None,
    as_json: bool,
) -> None:
    """Write local files, folders and globs below URL."""
    from s3loader.toolbox import transfer

    with progress("upload", quiet=as_json) as show:
        try:
            report = transfer.upload(
                sources,
                url,
                on_exists=policy_of(on_exists),
                content_type=content_type,
                create_bucket=create_bucket,
                max_in_flight=jobs,
                progress=show,
            )
        except PartialFailureError as error:
            show_failures(error, "upload")
            raise
    tell(report, "Uploaded", as_json)


def tell(report: transfer.TransferReport, verb: str, as_json: bool) -> None:
    """What a transfer did."""
    if as_json:
        print_json({"objects": report.objects, "bytes": report.bytes, "skipped": report.skipped, "deleted": report.deleted})
        return
    more = f", skipped {report.skipped}" if report.skipped else ""
    more += f", deleted {report.deleted}" if report.deleted else ""
    click.echo(f"{verb} {report.objects} objects ({report.bytes} bytes){more}", err=True)


@click.command()
@click.argument("urls", nargs=-1, required=True)
@click.option("-r", "--recursive", "-p", is_flag=True, help="All objects below, not only those directly there.")
@click.option(
    "-j", "--jobs", type=click.IntRange(min=1), default=1000, help="Taken as the document has it; a request deletes 1000."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@pattern_options
@json_option
def delete(
    urls: tuple[str, ...], recursive: bool, jobs: int, dry_run: bool, regex: str | None, literal: bool, as_json: bool
) -> None:
    """Delete objects: one, those that match a glob, or (with a slash at the end of a URL) those in a folder.

    Deletes exactly what was listed; that there is nothing is an error.
    """
    from s3loader.toolbox import many, single

    del jobs
    doomed: list[str] = []
    for url in urls:
        target = parse_target(url, literal=literal, regex=regex)
        if target.is_pattern or recursive or url.endswith("/") or _is_bucket(url):
            found = [entry.url for entry in found_by(target, recursive=recursive)]
            if not found:
                raise ObjectNotFoundError(
                    "there is nothing to delete",
                    op="delete",
                    url=url,
                    hint="-r also looks below the folders; nothing was deleted",
                )
            doomed += found
        else:
            single.stat(url)
            doomed.append(url)
    doomed = list(dict.fromkeys(doomed))
    if as_json:
        if not dry_run:
            many.delete_exactly(doomed)
        print_json({"dry_run": dry_run, "urls": doomed})
        return
    if dry_run:
        for url in doomed:
            click.echo(url)
        click.echo(f"Would delete {len(doomed)} objects.", err=True)
        return
    click.echo(f"Deleting {len(doomed)} objects…", err=True)
    many.delete_exactly(doomed)
    click.echo("Done.", err=True)


def _is_bucket(url: str) -> bool:
    return "://" in url and not url.partition("://")[2].partition("/")[2] and not url.startswith("file:")


@click.command("create-bucket")
@click.argument("name")
@json_option
def create_bucket(name: str, as_json: bool) -> None:
    """Make a bucket (NAME or s3://NAME), or a local folder; one that is there is fine."""
    from s3loader.toolbox import single

    made = single.create_bucket(name)
    if as_json:
        print_json({"bucket": name, "created": made})
    else:
        click.echo(f"Successfully created or verified bucket '{_bare(name)}'.")


@click.command("delete-bucket")
@click.argument("name")
@click.option("--dry-run", is_flag=True, help="Only say whether it could be deleted.")
@json_option
def delete_bucket(name: str, dry_run: bool, as_json: bool) -> None:
    """Delete a bucket, which must be empty."""
    from s3loader.toolbox import many, single

    if dry_run:
        url = name if "://" in name or name.startswith(("/", ".", "~")) else f"s3://{name}"
        count = len(many.list(url.removesuffix("/") + "/"))
        message = f"bucket '{_bare(name)}' {'is not empty' if count else 'is empty and would be deleted'}"
        print_json({"bucket": name, "dry_run": True, "empty": not count}) if as_json else click.echo(message)
        return
    single.delete_bucket(name)
    if as_json:
        print_json({"bucket": name, "deleted": True})
    else:
        click.echo(f"Successfully deleted bucket '{_bare(name)}'.")


def _bare(name: str) -> str:
    return name.removeprefix("s3://").removesuffix("/")
