"""``s3loader ckpt``: look at, check, compare, export and clean up checkpoints."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from s3loader.cli.objects import place
from s3loader.cli.output import json_option, print_json, print_table
from s3loader.errors import CheckpointNotFoundError, IntegrityError
from s3loader.types import ObjectURL
from s3loader.units import format_size, parse_duration

__all__ = ["ckpt"]


@contextmanager
def _manager(url: str) -> Iterator[Any]:
    """The manager of the run at `url`.

    Raises:
        CheckpointNotFoundError: there is nothing there. Making a manager would make the folder, and hide a typing mistake.
    """
    from s3loader.checkpoint import CheckpointManager
    from s3loader.store import open_store

    where = ObjectURL.parse(url)
    missing = CheckpointNotFoundError(
        "there is no such run", url=str(where), hint="check the path; a run's folder is made by the first save"
    )
    if where.scheme == "file" and not os.path.isdir(where.key):
        raise missing
    with open_store(url, **place()) as store, CheckpointManager(store, rank=0, world_size=1) as manager:
        if where.scheme != "file" and next(iter(manager.store.list()), None) is None:
            raise missing
        yield manager


def _none_yet(url: str) -> str:
    return f"no step is committed in {url}"


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")


_step_option = click.option("--step", type=click.IntRange(min=0), help="Which step; default: the newest.")


@click.group()
def ckpt() -> None:
    """Checkpoints of a training run (URL is the run's folder)."""


@ckpt.command("ls")
@click.argument("url")
@json_option
def list_steps(url: str, as_json: bool) -> None:
    """List the committed steps."""
    with _manager(url) as manager:
        facts = [dict(root.facts) for root in manager.roots()]
    if as_json:
        print_json([{**f, "time": _when(f["time"])} for f in facts])
        return
    rows = [
        (
            f["step"],
            _when(f["time"]),
            format_size(f["bytes"]),
            format_size(f["written"]),
            f["tensors"],
            f["world"],
            f["epoch"],
            " ".join(f"{name}={value:g}" if value is not None else f"{name}=nan" for name, value in f["metrics"].items()),
        )
        for f in facts
    ]
    print_table(("step", "saved", "state", "written", "tensors", "ranks", "epoch", "metrics"), rows)
    if not rows:
        click.echo(_none_yet(url), err=True)


@ckpt.command()
@click.argument("url")
@json_option
def latest(url: str, as_json: bool) -> None:
    """Print the newest committed step."""
    with _manager(url) as manager:
        step = manager.latest()
    if as_json:
        print_json({"step": step})
    elif step is not None:
        click.echo(step)
    if step is None:
        raise CheckpointNotFoundError(
            "no step is committed",
            url=url,
            hint="a save that was interrupted leaves none; `s3loader ckpt gc` deletes what it left",
        )


@ckpt.command()
@click.argument("url")
@_step_option
@click.option("--values", is_flag=True, help="Also show what is no tensor: loader state, counters, ...")
@json_option
def inspect(url: str, step: int | None, values: bool, as_json: bool) -> None:
    """Show one step: facts, files, tensors."""
    with _manager(url) as manager:
        found = manager.open(step)
        tensors = [(name, found.chunks(name)) for name in found]
        rows = [(n, c[0].dtype, "x".join(map(str, c[0].shape)), sum(i.end - i.begin for i in c), len(c)) for n, c in tensors]
        if as_json:
            shown = [{"name": n, "dtype": c[0].dtype, "shape": c[0].shape, "chunks": len(c)} for n, c in tensors]
            extra = {"values": found.tree} if values else {}
            print_json({**found.info, "files": found.files(), "tensors": shown, **extra})
            return
        for name, value in found.info.items():
            if name not in ("format", "kind", "digest", "index"):
                click.echo(f"  {name:<10}{_when(value) if name == 'time' else value}")
        click.echo()
        print_table(("file", "bytes"), list(found.files().items()))
        click.echo()
        print_table(("tensor", "dtype", "shape", "bytes", "pieces"), rows)
        if values:
            click.echo()
            print_json(found.tree)


@ckpt.command()
@click.argument("url")
@_step_option
@click.option("--all", "every", is_flag=True, help="Verify every step.")
@json_option
def verify(url: str, step: int | None, every: bool, as_json: bool) -> None:
    """Read steps whole and compare every checksum. Exit code 6 where something is damaged."""
    with _manager(url) as manager:
        steps = [root.step for root in manager.run.newest_first()] if every else [manager.find(step).step]
        results: dict[int, list[str]] = {}
        for number in steps:
            try:
                results[number] = [error.message for error in manager.open(number).verify()]
            except Exception as error:  # noqa: BLE001 - a step that cannot even be opened is a result; the others still count
                results[number] = [str(error).split("\n", 1)[0]]
    if as_json:
        print_json([{"step": number, "ok": not wrong, "problems": wrong} for number, wrong in results.items()])
    else:
        for number, wrong in results.items():
            click.echo(f"step {number}: {'ok' if not wrong else f'{len(wrong)} problems'}")
            for line in wrong:
                click.echo(f"  {line}")
    bad = [number for number, wrong in results.items() if wrong]
    if bad:
        raise IntegrityError(
            f"{len(bad)} of {len(results)} steps are damaged: {', '.join(map(str, bad))}",
            url=url,
            hint="restore(on_corruption='previous') goes back to a good step; `s3loader ckpt delete` removes a bad one",
        )


@ckpt.command()
@click.argument("url")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option("--grace", default="1d", show_default=True, help="Leave alone what was touched within this time.")
@json_option
def gc(url: str, dry_run: bool, grace: str, as_json: bool) -> None:
    """Delete what no committed step needs: abandoned attempts, leftovers, open uploads."""
    with _manager(url) as manager:
        report = manager.gc(dry_run=dry_run, grace=parse_duration(grace))
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    for key in report.keys:
        click.echo(key)
    for key in report.uploads:
        click.echo(f"{key} (open upload)")
    for number, why in report.skipped.items():
        click.echo(f"step {number} left alone: {why}", err=True)
    verb = "would delete" if dry_run else "deleted"
    if report.compacted:
        click.echo(f"{verb} the tombstones of {len(report.compacted)} steps", err=True)
    click.echo(f"{verb} {len(report.keys)} objects, {format_size(report.bytes)}, {len(report.uploads)} open uploads", err=True)


@ckpt.command()
@click.argument("url")
@click.argument("first", type=int)
@click.argument("second", type=int)
@json_option
def diff(url: str, first: int, second: int, as_json: bool) -> None:
    """Compare two steps of a run by their checksums; nothing is read but their indexes."""
    from s3loader.checkpoint.export import diff as compare

    with _manager(url) as manager:
        found = compare(manager.open(first), manager.open(second))
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    for label, names in (
        (f"only in {first}", found.only_in_first),
        (f"only in {second}", found.only_in_second),
        ("reshaped", found.reshaped),
        ("changed", found.changed),
    ):
        for name in names:
            click.echo(f"{label:<16}{name}")
    for name, (one, other) in found.values.items():
        click.echo(f"{'value':<16}{name}: {one!r} -> {other!r}")
    click.echo(f"{len(found.same)} tensors are the same", err=True)


@ckpt.command()
@click.argument("url")
@click.argument("target")
@_step_option
@click.option("--item", help="Only this item's tensors, under their names in it, e.g. model.")
@click.option(
    "--safetensors", "_format", flag_value="safetensors", default=True, help="As one safetensors file (the only format)."
)
@json_option
def export(url: str, target: str, step: int | None, item: str | None, _format: str, as_json: bool) -> None:
    """Write a step's tensors to TARGET (a path or URL) as one plain safetensors file."""
    from s3loader.checkpoint.export import export_safetensors

    with _manager(url) as manager:
        found = manager.open(step)
        size = export_safetensors(found, target, item=item)
    if as_json:
        print_json({"step": found.step, "target": target, "bytes": size})
    else:
        click.echo(f"step {found.step}: {format_size(size)} written to {target}")


@ckpt.command()
@click.argument("url")
@click.argument("step", type=int)
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@json_option
def delete(url: str, step: int, dry_run: bool, as_json: bool) -> None:
    """Delete one step: un-publish it, then delete its files."""
    with _manager(url) as manager:
        files = dict(manager.find(step).keys.values())
        if not dry_run:
            manager.delete(step)
    if as_json:
        print_json({"step": step, "dry_run": dry_run, "files": files})
    else:
        click.echo(
            f"step {step}: {'would delete' if dry_run else 'deleted'} {len(files)} files, {format_size(sum(files.values()))}"
        )


@ckpt.command()
@click.argument("url")
@click.argument("step", type=int)
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@json_option
def rollback(url: str, step: int, dry_run: bool, as_json: bool) -> None:
    """Go back to STEP for good: delete every step after it, the newest first. A job that still saves there is fenced."""
    with _manager(url) as manager:
        gone = manager.rollback(step, dry_run=dry_run)
    if as_json:
        print_json({"step": step, "dry_run": dry_run, "steps": gone})
        return
    for number in gone:
        click.echo(number)
    click.echo(
        f"{'would delete' if dry_run else 'deleted'} {len(gone)} steps; the newest {'would be' if dry_run else 'is'} {step}",
        err=True,
    )
