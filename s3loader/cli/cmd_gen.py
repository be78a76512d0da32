"""``s3loader gen``: made-up objects, for tests and benchmarks."""

from __future__ import annotations

import time
from typing import Any

import click

from s3loader.cli.output import json_option, print_json, progress
from s3loader.units import format_duration, format_rate, format_size, parse_size

__all__ = ["gen"]

_TYPES = ("raw", "npz", "tfrecord", "hdf5", "parquet")  # datagen.OBJECT_TYPES, which is not imported for --help


@click.command()
@click.argument("url")
@click.option("-n", "--num", type=click.IntRange(min=1), default=1, show_default=True, help="Objects.")
@click.option("-s", "--size", default="20MiB", show_default=True, help="Of each: bytes, or with a unit.")
@click.option(
    "-o",
    "--object-type",
    type=click.Choice(_TYPES, case_sensitive=False),
    default="raw",
    show_default=True,
    help="Their format.",
)
@click.option("-t", "--template", default="object_{}_of_{}.dat", show_default=True, help="Of names: number, and how many.")
@click.option("-d", "--dedup", type=float, default=1.0, show_default=True, help="Of so many 4 KiB blocks one is unique.")
@click.option("-x", "--compress", type=float, default=1.0, show_default=True, help="zlib makes it so many times smaller.")
@click.option("--seed", type=click.IntRange(min=0), help="The same seed makes the same objects; default: drawn and shown.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=16, show_default=True, help="Uploads at once.")
@click.option("--endpoint-url", help="Of the store; default: from the environment.")
@json_option
def gen(
    url: str,
    num: int,
    size: str,
    object_type: str,
    template: str,
    dedup: float,
    compress: float,
    seed: int | None,
    jobs: int,
    endpoint_url: str | None,
    as_json: bool,
) -> None:
    """Write made-up objects below URL: no two alike, the same for the same --seed."""
    from s3loader.datagen import Generator, generate_chunks
    from s3loader.store import open_store
    from s3loader.store.ordered import map_ordered

    each = parse_size(int(size), "size_bytes") if size.isdecimal() else parse_size(size, "size")
    drawn = Generator(0, seed=seed, dedup=dedup, compress=compress).seed
    names = [template.replace("{}", str(number), 1).replace("{}", str(num), 1) for number in range(num)]
    if len(set(names)) < num:
        raise click.UsageError("--template gives several objects one name: put {} in it")
    keywords: dict[str, Any] = {} if endpoint_url is None else {"endpoint_url": endpoint_url}
    begin = time.perf_counter()
    total = 0
    with open_store(url, **keywords) as store, progress("gen", quiet=as_json) as show:

        def one(number: int) -> int:
            with store.multipart(names[number]) as out:
                for piece in generate_chunks(each, object_type, seed=drawn, index=number, dedup=dedup, compress=compress):
                    out.write(piece)
                return out.tell()

        for done, written in enumerate(map_ordered(one, range(num), concurrency=min(jobs, num), name="s3loader-gen"), 1):
            total += written
            show(done, num, total)
    seconds = time.perf_counter() - begin
    if as_json:
        print_json({"objects": num, "bytes": total, "seconds": seconds, "seed": drawn, "names": names})
        return
    click.echo(
        f"{num:,} objects, {format_size(total)} in {format_duration(seconds)} "
        f"({num / seconds:,.1f} objects/s, {format_rate(total / seconds)}), seed {drawn}"
    )
