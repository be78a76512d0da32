"""Pure arithmetic on byte ranges: what to fetch so that what is wanted can be cut from it; which of them share a request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Span", "coalesce", "first_byte", "neighbours", "split"]


@dataclass(frozen=True, slots=True)
class Span:
    """One range to fetch, ``[start, end)``, and the wanted ranges that lie in it."""

    start: int
    end: int
    members: tuple[int, ...]
    """Indices into the wanted ranges, in the order of their start."""


def coalesce(ranges: Sequence[tuple[int, int]], *, max_gap: int, max_size: int) -> list[Span]:
    """Merge wanted ``(start, end)`` ranges into spans, in order of start.

    Two neighbours share a span when at most `max_gap` bytes lie between them and the span stays
    within `max_size` bytes (a single wanted range larger than that is a span of its own, and
    overlapping ranges are always merged). An empty range joins no fetch: it is in no span.
    """
    order = sorted((i for i, (start, end) in enumerate(ranges) if end > start), key=lambda i: ranges[i])
    spans: list[Span] = []
    members: list[int] = []
    low = high = 0
    for i in order:
        start, end = ranges[i]
        joins = members and (start < high or (start - high <= max_gap and max(end, high) - low <= max_size))
        if joins:
            members.append(i)
            high = max(high, end)
            continue
        if members:
            spans.append(Span(low, high, tuple(members)))
        members, low, high = [i], start, end
    if members:
        spans.append(Span(low, high, tuple(members)))
    return spans


def first_byte(start: int, size: int) -> int:
    """Where a read of an object of `size` bytes begins: at `start`, or, where that is negative, so many bytes before the end
    (at the object's beginning, if it has fewer)."""
    return start if start >= 0 else max(0, size + start)


def split(start: int, end: int, size: int) -> list[tuple[int, int]]:
    """Cut ``[start, end)`` into pieces of at most `size` bytes, in order."""
    return [(at, min(at + size, end)) for at in range(start, end, size)]


def neighbours(
    starts: Sequence[int], ends: Sequence[int], *, max_gap: int, max_size: int, alone: Sequence[bool] | None = None
) -> Iterator[tuple[int, int]]:
    """Cut a sequence of ranges into runs, in its order; ranges that follow each other in the object share one.

    Args:
        starts: First byte of each range.
        ends: Its end.
        max_gap: Bytes that may lie between two of a run, fetched in vain to save a request.
        max_size: Bytes of a run, unless it is one range.
        alone: Whether a range shares a run with no other.

    Yields:
        ``(first, end)``: positions in the sequence.
    """
    first = low = high = 0
    shut = True
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        single = alone is not None and alone[i]
        if i and (shut or single or not (0 <= start - high <= max_gap and end - low <= max_size)):
            yield first, i
            first = i
        if first == i:
            low = start
        high = end
        shut = single
    if len(starts):
        yield first, len(starts)
