"""``s3loader loader URL``: a dataset as a loader sees it, in the terminal or as a page with pictures."""

from __future__ import annotations

from typing import Any

import click

from s3loader.cli.objects import place
from s3loader.cli.output import json_option, print_json, print_table, write_page
from s3loader.units import format_size

__all__ = ["loader"]

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
