"""``s3loader config show``: every setting with where it came from."""

from __future__ import annotations

import click

from s3loader.cli.output import json_option, print_json

__all__ = ["config"]


@click.group()
def config() -> None:
    """Settings."""


@config.command()
@json_option
def show(as_json: bool) -> None:
    """Show every setting and its origin; secrets are masked."""
    from s3loader.config import S3Settings

    settings = S3Settings()
    if not as_json:
        click.echo(settings.describe())
        return
    lines = (line.split(" = ", 1) for line in settings.describe().splitlines())
    shown = {name.strip(): value.rsplit("  (", 1)[0] for name, value in lines}
    print_json({name: {"value": value, "origin": settings.origins.get(name)} for name, value in shown.items()})
