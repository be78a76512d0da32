"""Which byte ranges share a request. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["neighbours"]


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
