"""``s3loader pack``: a folder of images, a table or another dataset, as shards on a store, ready to train on."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from s3loader.cli.objects import engine_options
from s3loader.cli.output import json_option, print_json, progress
from s3loader.units import format_size

__all__ = ["pack"]


@click.command()
@click.argument("source")
@click.argument("url")
@click.option(
    "--labels",
    default="auto",
    show_default=True,
    help="auto: names of the folders; folders: must be so; none; or a CSV or JSONL file with the columns file and label.",
)
@click.option("--shard-size", default="64MiB", show_default=True, help="Bytes of a shard.")
@click.option("--shard-samples", type=click.IntRange(min=1), help="Samples of a shard at most.")
@click.option("--compression", type=click.Choice(["zstd"]), help="Compress shards; members stay readable one by one.")
@click.option("--no-shuffle", is_flag=True, help="Keep the order of names; default: an order drawn from --seed.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the order.")
@click.option("-j", "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that pack.")
@click.option("--overwrite", is_flag=True, help="Replace another dataset at URL.")
@click.option(
    "--verify", type=click.Choice(["index", "full", "none"]), default="index", show_default=True, help="What is read back."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be packed.")
@click.option("--endpoint-url", help="Of the store; default: from the environment.")
@engine_options
@json_option
def pack(
    source: str,
    url: str,
    labels: str,
    shard_size: str,
    shard_samples: int | None,
    compression: str | None,
    no_shuffle: bool,
    seed: int,
    workers: int,
    overwrite: bool,
    verify: Any,
    dry_run: bool,
    endpoint_url: str | None,
    as_json: bool,
    job: dict[str, Any],
) -> None:
    """Pack SOURCE into shards at URL: manifest, shards with indexes, classes. Run again, it goes on where it was stopped.

    SOURCE is a folder (by class or flat), tar shards, an MDS folder, Parquet or TFRecord files, or another dataset.
    """
    from s3loader.packing import pack as pack_samples
    from s3loader.packing import plan_pack

    store: dict[str, Any] = {} if endpoint_url is None else {"endpoint_url": endpoint_url}
    wanted = None if labels == "none" else labels
    if dry_run:
        plan = plan_pack(source, url, labels=wanted, shard_size=shard_size, shuffle=not no_shuffle, seed=seed, **store)
        if as_json:
            print_json(dataclasses.asdict(plan))
            return
        size = "" if plan.bytes is None else f", {format_size(plan.bytes)}"
        shards = "" if plan.shards is None else f" in about {plan.shards:,} shards"
        click.echo(f"{plan.url}: {'?' if plan.samples is None else f'{plan.samples:,}'} samples{size}{shards}")
        for name, count in sorted(plan.classes.items()):
            click.echo(f"  {name}: {count:,}")
        _left_out(plan.left_out)
        click.echo(f"{plan.done} of {plan.parts} parts are there already; nothing was written")
        return
    with progress("pack", "samples", quiet=as_json) as show:
        report = pack_samples(
            source,
            url,
            labels=wanted,
            shard_size=shard_size,
            shard_samples=shard_samples,
            compression=compression,
            shuffle=not no_shuffle,
            seed=seed,
            workers=workers,
            exists="replace" if overwrite else "resume",
            verify=verify,
            progress=show,
            **job,
            **store,
        )
    if as_json:
        print_json({**dataclasses.asdict(report), "example": report.example()})
        return
    classes = f", {len(report.classes):,} classes" if report.classes else ""
    done = "already there" if report.unchanged else "packed"
    checked = {"index": ", checked", "full": ", every byte read back", "none": ""}[report.verified]
    click.echo(f"{report.samples:,} samples in {report.shards:,} shards, {format_size(report.bytes)}{classes}: {done}{checked}")
    _left_out(report.left_out)
    click.echo(f"\n{report.example()}")


def _left_out(left_out: Any) -> None:
    for reason, names in sorted(left_out.items()):
        some = ", ".join(repr(name)[1:-1] for name in names[:3])
        click.echo(f"not packed: {len(names):,} {reason} ({some}{', ...' if len(names) > 3 else ''})")
