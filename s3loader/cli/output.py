"""Data on stdout: a plain table for people, JSON for programs. Progress on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import click

from s3loader.progress import showing

__all__ = ["json_option", "print_json", "print_table", "progress", "rich_table", "write_page"]

F = TypeVar("F", bound=Callable[..., Any])


def json_option(command: F) -> F:
    """Add ``--json`` as the argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def print_json(value: Any) -> None:
    """Print `value` as one JSON document; what JSON cannot say is printed as text."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under a header, columns aligned (numbers to the right)."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    numeric = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    for row in [list(header), *cells]:
        line = (
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        click.echo("  ".join(line).rstrip())


def rich_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table with lines where a person watches and rich is installed, else as `print_table`; numbers to the right."""
    try:
        if not sys.stdout.isatty():
            raise ImportError
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        if title:
            click.echo(title)
        print_table(header, rows)
        return
    drawn = Table(title=title or None, title_justify="left", header_style="bold")
    for number, name in enumerate(header):
        drawn.add_column(name, justify="left" if number == 0 else "right", no_wrap=number > 0)
    for row in rows:
        drawn.add_row(*(Text(str(cell)) for cell in row))
    Console().print(drawn)


def write_page(path: str, page: str) -> None:
    """Write an HTML page to a local file, whole or not at all; ``-`` is stdout.

    Raises:
        StoreError: it cannot be written.
    """
    from s3loader.errors import StoreError

    if path == "-":
        click.echo(page, nl=False)
        return
    special = os.path.exists(path) and not os.path.isfile(path)  # a device or a pipe is written to, not replaced
    temporary = path if special else f"{path}.{os.getpid()}.tmp"
    try:
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(page)
            if not special:
                os.replace(temporary, path)
        except BaseException:
            if not special and os.path.exists(temporary):
                os.unlink(temporary)
            raise
    except OSError as error:
        why = error.strerror or str(error)
        raise StoreError(
            why, op="write", url=path, hint="name a file in a folder that is there, with room on its disk"
        ) from error


# -- progress, on stderr ---------------------------------------------------------------------------


@contextlib.contextmanager
def progress(what: str, unit: str = "objects", *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Gives a function to call with ``(done, total=None, size=0)``: how many of how many, and bytes moved so far.

    Args:
        what: Before the bar.
        unit: What is counted.
        quiet: Show nothing.
    """
    with showing(not quiet, what, unit) as show:
        yield show or (lambda done, total=None, size=0: None)
