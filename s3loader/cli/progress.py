"""Progress of a command, on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from s3loader.progress import showing

__all__ = ["progress"]


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
