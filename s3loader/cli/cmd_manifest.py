"""``s3loader manifest``: what a manifest lists, and making them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from s3loader.cli.objects import place, show_failures
from s3loader.cli.output import json_option, print_json
from s3loader.errors import PartialFailureError
from s3loader.units import format_size

if TYPE_CHECKING:
    from s3loader.toolbox.manifests import Written

__all__ = ["manifest"]

_overwrite = click.option("--overwrite", is_flag=True, help="Replace a manifest that is there.")


@click.group()
def manifest() -> None:
    """Manifests: lists of objects and shards that are one dataset (URLs of .jsonl objects)."""


@manifest.command()
@click.argument("url")
@click.option("-n", "--limit", type=click.IntRange(min=0), help="Most entries; default: all.")
@click.option("--refs", is_flag=True, help="Show references to other manifests as they stand.")
@click.option("--members", is_flag=True, help="Members in place of their shards.")
@json_option
def show(url: str, limit: int | None, refs: bool, members: bool, as_json: bool) -> None:
    """Show the entries of the manifest at URL: kind, size, key."""
    from itertools import islice

    from s3loader.toolbox.manifests import open_manifest

    if refs and members:
        raise click.UsageError("--refs and --members exclude each other")
    store, key = open_manifest(url, **place())
    whole = store.get_manifest(key)
    entries = whole.list_files() if members else whole.iter_entries(resolve_refs=not refs)
    if as_json:
        print_json(list(islice(entries, limit)))
        return
    counts: dict[str, int] = {}
    total = 0
    for entry in islice(entries, limit):
        facts: dict[str, Any] = dict(entry)
        kind, size = facts["kind"], facts.get("size_bytes")
        counts[kind] = counts.get(kind, 0) + 1
        total += size or 0
        name = str(facts["archive_key"] if kind == "shard" else facts["key"])
        more = f"  {facts['count']:,} members" if kind == "shard" and facts.get("count") is not None else ""
        shown = name if name.isprintable() else repr(name)[1:-1]
        click.echo(f"{kind:<12}  {'' if size is None else format_size(size):>10}  {shown}{more}")
    said = ", ".join(f"{count:,} {kind}{'s' if count != 1 else ''}" for kind, count in counts.items()) or "no entries"
    click.echo(
        f"{said.replace('manifest_ref', 'reference')}; {format_size(total)}; keys are relative to {store.objects.url}", err=True
    )


@manifest.command()
@click.argument("source")
@click.argument("target", required=False)
@click.option("--keep-refs", is_flag=True, help="Keep references to other manifests as they are.")
@click.option("--keep-missing", is_flag=True, help="Keep entries whose object is gone; nothing is asked for them then.")
@click.option("--expand-shards", is_flag=True, help="Members in place of their shards.")
@click.option("--delete-parts", is_flag=True, help="Delete the old parts afterwards (only without TARGET).")
@click.option("--dry-run", is_flag=True, help="Only say what would be written and which parts would be deleted.")
@json_option
def compact(
    source: str,
    target: str | None,
    keep_refs: bool,
    keep_missing: bool,
    expand_shards: bool,
    delete_parts: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the manifest SOURCE with its parts as one manifest, TARGET or itself, at once or not at all."""
    from s3loader.toolbox import manifests

    if delete_parts and (target is not None or keep_refs):
        raise click.UsageError("--delete-parts: the manifest would still need its parts")
    store, key = manifests.open_manifest(source, **place())
    parts = manifests.parts_of(store, key) if delete_parts else []
    if dry_run:
        entries = sum(1 for _ in store.get_manifest(key).iter_entries(resolve_refs=not keep_refs))
        facts: dict[str, Any] = {"dry_run": True, "total_entries": entries, "delete": parts}
    else:
        done = manifests.compact(
            source,
            target,
            place=place(),  # type: ignore[arg-type]
            resolve_refs=not keep_refs,
            apply_deletes=not keep_missing,
            expand_shards=expand_shards,
            delete_parts=delete_parts,
        )
        facts = {**done, "deleted": parts}
    if as_json:
        print_json({"source": source, "target": target or source, **facts})
        return
    for part in parts:
        click.echo(part)
    if dry_run:
        click.echo(f"would write {facts['total_entries']:,} entries, and delete {len(parts):,} parts", err=True)
        return
    gone = f", {facts['removed_entries']:,} left out whose object is gone" if facts["removed_entries"] else ""
    deleted = f"; deleted {len(parts):,} parts" if parts else ""
    click.echo(f"{facts['total_entries']:,} entries, {facts['resolved_refs']:,} references followed{gone}{deleted}")


@manifest.command()
@click.argument("url")
@click.argument("objects", nargs=-1, required=True)
@json_option
def append(url: str, objects: tuple[str, ...], as_json: bool) -> None:
    """Add OBJECTS (URLs, patterns, folders of shards with a slash at the end) to the manifest at URL.

    It gets a new part, safe beside others that append; a manifest that is missing is made.
    """
    from s3loader.toolbox.manifests import append_to_manifest

    _tell(append_to_manifest(url, objects, **place()), as_json)


@manifest.command()
@click.argument("sources", nargs=-1, required=True)
@click.argument("target")
@_overwrite
@json_option
def merge(sources: tuple[str, ...], target: str, overwrite: bool, as_json: bool) -> None:
    """Write the entries of the manifests SOURCES as one manifest TARGET; the first of each key counts."""
    from s3loader.toolbox.manifests import merge_manifests

    _tell(merge_manifests(sources, target, overwrite=overwrite, **place()), as_json)


@manifest.command("from-prefix")
@click.argument("url")
@click.argument("target")
@_overwrite
@json_option
def from_prefix(url: str, target: str, overwrite: bool, as_json: bool) -> None:
    """Write a manifest TARGET of what lies in the folder URL (or matches a pattern).

    Tar archives are listed as shards, all else as objects; indexes and hidden objects are left out.
    """
    from s3loader.toolbox.manifests import manifest_from_prefix

    _tell(manifest_from_prefix(url, target, overwrite=overwrite, **place()), as_json)


@manifest.command()
@click.argument("url")
@click.option("--root", help="The folder that its keys are relative to; default: where its first entry is, if that is certain.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@json_option
def delete(url: str, root: str | None, dry_run: bool, as_json: bool) -> None:
    """Delete all that the manifest at URL lists, with the indexes of its shards, its parts, and itself last.

    Nothing but what it lists is touched. A deletion that was interrupted can be made again.
    """
    from s3loader.toolbox.manifests import delete_manifest

    doomed: list[tuple[str, str]] = []
    counts = {"object": 0, "archive": 0, "manifest": 0}

    def note(what: str, name: str) -> None:
        counts[what] += 1
        if as_json:
            doomed.append((what, name))
        else:
            click.echo(f"{'would delete' if dry_run else 'delete'} {name}")

    try:
        report = delete_manifest(url, root=root, dry_run=dry_run, planned=note, **place())
    except PartialFailureError as error:
        show_failures(error, "delete")
        raise
    if as_json:
        print_json({"dry_run": dry_run, **report, "urls": [name for _, name in doomed]})
        return
    told = f"{counts['object']:,} objects, {counts['archive']:,} shards with their indexes, {counts['manifest']:,} manifests"
    click.echo(f"{'Would delete' if dry_run else 'Deleted'} {told}.", err=True)


def _tell(done: Written, as_json: bool) -> None:
    if as_json:
        print_json(done._asdict())
        return
    repeated = f"; {done.repeated:,} that were there already left out" if done.repeated else ""
    click.echo(f"{done.url}: {done.entries:,} entries, {done.shards:,} of them shards{repeated}")
