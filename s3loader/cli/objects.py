"""What commands share: how a URL with a pattern is read, how results are told, who runs the tasks of a job."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import click

from s3loader.errors import ConfigError, PartialFailureError
from s3loader.types import ObjectURL

if TYPE_CHECKING:
    from s3loader.toolbox.selecting import Found
import functools

__all__ = [
    "Target",
    "duration",
    "engine_options",
    "found_by",
    "megabytes",
    "parse_target",
    "pattern_options",
    "place",
    "show_failures",
]

F = TypeVar("F", bound=Callable[..., Any])

_GLOB: Final = re.compile(r"[*?\[]")
_REGEX: Final = re.compile(r"[*+?^$|(){}\[\]\\]")


class Target(NamedTuple):
    """A URL as it was typed: what is fixed, and the pattern in its last component."""

    url: str
    glob: str | None = None
    regex: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The pattern, as the functions take it."""
        return {"glob": self.glob, "regex": self.regex}

    @property
    def is_pattern(self) -> bool:
        """Whether it may name several objects without `recursive`."""
        return self.glob is not None or self.regex is not None


def parse_target(text: str, *, literal: bool = False, regex: str | None = None) -> Target:
    """Read a URL whose last component may be a pattern: a glob; under the name ``s3-cli`` a regular expression, as there.

    Args:
        literal: Every character is meant as it stands.
        regex: Given apart; then the URL has none.
    """
    if regex is not None:
        return Target(text, None, regex)
    folder, slash, last = text.rpartition("/")
    if literal or not slash or not last:
        return Target(text)
    if _as_document() and _REGEX.search(last):
        return Target(folder + slash, None, last)
    if _GLOB.search(last):
        return Target(folder + slash, last)
    if _GLOB.search(folder.partition("://")[2]):
        raise ConfigError(
            f"a pattern before the last slash: {text}",
            hint="only the last component may be one (`**` there goes deeper); --literal takes every character as it stands",
        )
    return Target(text)


def _as_document() -> bool:
    return os.path.basename(sys.argv[0]).startswith("s3-cli")


def pattern_options(command: F) -> F:
    """Add ``--regex`` and ``--literal``."""
    command = click.option("--regex", help="Only names below URL in which this regular expression is found.")(command)
    return click.option("--literal", is_flag=True, help="Take * ? [ in URL as they stand.")(command)


def place() -> dict[str, Any]:
    """Keywords of `open_store`, as the options before the command say."""
    from s3loader.toolbox.stores import configured

    return dict(configured({}))


def found_by(target: Target, *, recursive: bool) -> list[Found]:
    """The objects that a command will work on, which are then exactly those that it says."""
    from s3loader.toolbox.selecting import select

    found = select(target.url, {}, recursive=recursive, **target.options)
    return [entry for entry in found if entry.meta is not None]


def show_failures(error: PartialFailureError, what: str) -> None:
    """Name each object that failed, on stderr."""
    failures: Sequence[tuple[str, Exception]] = error.failures
    for url, why in failures[:20]:
        click.echo(f"cannot {what} {ObjectURL.parse(url) if '://' in url else url}: {getattr(why, 'message', why)}", err=True)
    if len(failures) > 20:
        click.echo(f"... and {len(failures) - 20} more", err=True)


def duration(seconds: float) -> str:
    """Seconds as the document shows them."""
    return f"{seconds:.9f}s"


def megabytes(size: float) -> str:
    """Mebibytes, which the document calls MB."""
    return f"{size / (1 << 20):.2f}"


# -- who runs the tasks of a job -------------------------------------------------------------------


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--engine`` and ``--address``; the command takes them as `job`, keywords of the function it calls."""

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
