"""``--engine`` and ``--address``: who runs the tasks of a job."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

__all__ = ["engine_options"]


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options; the command takes them as `job`, keywords of the function it calls."""

    @functools.wraps(command)
    def with_job(*args: Any, engine: str, address: str | None, **options: Any) -> Any:
        local = engine == "local" and address is None
        return command(*args, job={} if local else {"engine": engine, "address": address}, **options)

    for option in (
        click.option("--address", help="Of the Ray cluster; default: RAY_ADDRESS, else one here, for this command."),
        click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="Who does it."),
    ):
        with_job = option(with_job)
    return with_job
