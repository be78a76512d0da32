"""``s3loader check``: whether the samples of a dataset are whole."""

from __future__ import annotations

import sys
from typing import Any

import click

from s3loader.cli.engine import engine_options
from s3loader.cli.objects import place
from s3loader.cli.output import json_option, print_json

__all__ = ["check"]


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
