"""Requests in a row: the longest chain of requests of which each began after the one before had ended.

On a distant store this number, times the time to the first byte, is what an operation takes at least, however many
requests run beside the chain. It counts events and no seconds; let a proxy delay every request by more than the code between
two of them takes, so that requests which are sent side by side are seen side by side.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from s3loader import events
from s3loader.events import OpEvent

__all__ = ["in_a_row", "recorded"]

_NO_REQUEST = {"RETRY", "WAIT", "RESUME"}


def in_a_row(found: Iterable[OpEvent]) -> list[OpEvent]:
    """The longest chain of `found`, in order; of several the one that ends first."""
    by_end = sorted((event for event in found if event.op not in _NO_REQUEST), key=lambda event: event.end)
    ends: list[float] = []
    """For each length, from 1: when the chain of it that ends first has ended; `heads`: its last link in `chains`."""
    chains: list[tuple[OpEvent, int]] = []
    heads: list[int] = []
    for event in by_end:
        length = bisect_right(ends, event.start)
        before = heads[length - 1] if length else -1
        chains.append((event, before))
        if length == len(ends):
            ends.append(event.end)
            heads.append(len(chains) - 1)
        # a chain of this length that ended earlier is kept: `by_end` rises
    at = heads[-1] if heads else -1
    chain = []
    while at >= 0:
        event, at = chains[at]
        chain.append(event)
    return chain[::-1]


@contextmanager
def recorded() -> Iterator[list[OpEvent]]:
    """The events of this process while the block runs."""
    found: list[OpEvent] = []
    stop = events.subscribe(found.append)
    try:
        yield found
    finally:
        stop()
