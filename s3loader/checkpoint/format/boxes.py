"""Pure arithmetic on boxes of an N-dimensional array: which bytes of one are which of another.

A box is ``(offset, shape)`` in elements of the whole array; its bytes are stored in C order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

__all__ = ["Box", "Overlap", "intersect", "linear", "problem_in_tiling", "row_blocks"]

Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


class Overlap(NamedTuple):
    """Where two boxes meet, seen from each of them."""

    shape: tuple[int, ...]
    source: tuple[int, ...]
    """Where it begins inside the first box."""
    target: tuple[int, ...]
    """Where it begins inside the second box."""


def intersect(source: Box, target: Box) -> Overlap | None:
    """Where two boxes of one array meet; None where they do not."""
    low = [max(a, b) for a, b in zip(source[0], target[0], strict=True)]
    high = [min(a + n, b + m) for a, n, b, m in zip(source[0], source[1], target[0], target[1], strict=True)]
    if any(h <= lo for lo, h in zip(low, high, strict=True)):
        return None
    return Overlap(
        tuple(h - lo for lo, h in zip(low, high, strict=True)),
        tuple(lo - a for lo, a in zip(low, source[0], strict=True)),
        tuple(lo - b for lo, b in zip(low, target[0], strict=True)),
    )


def _strides(shape: Sequence[int]) -> list[int]:
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    return strides


def linear(start: Sequence[int], shape: Sequence[int], inside: Sequence[int]) -> tuple[int, int, bool]:
    """Flat extent of the box at `start` of `shape` inside an array of shape `inside`.

    Returns:
        ``(first, end, contiguous)``: the elements ``[first, end)`` span the box, and whether they
        are exactly the box.
    """
    strides = _strides(inside)
    first = sum(a * s for a, s in zip(start, strides, strict=True))
    last = sum((a + n - 1) * s for a, n, s in zip(start, shape, strides, strict=True))
    return first, last + 1, last + 1 - first == math.prod(shape)


def row_blocks(overlap: Overlap, source_shape: Sequence[int], max_elements: int) -> list[Overlap]:
    """`overlap`, cut along its outermost dimension of more than one element into pieces whose extent in
    the source stays near `max_elements`."""
    axis = next((i for i, n in enumerate(overlap.shape) if n > 1), None)
    if axis is None:
        return [overlap]
    stride = _strides(source_shape)[axis]
    rows = max(1, max_elements // max(1, stride))
    pieces = []
    for at in range(0, overlap.shape[axis], rows):
        n = min(rows, overlap.shape[axis] - at)

        def moved(start: tuple[int, ...], by: int = at) -> tuple[int, ...]:
            return (*start[:axis], start[axis] + by, *start[axis + 1 :])

        shape = (*overlap.shape[:axis], n, *overlap.shape[axis + 1 :])
        pieces.append(Overlap(shape, moved(overlap.source), moved(overlap.target)))
    return pieces


def problem_in_tiling(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """What is wrong with `boxes` as an exact tiling of an array of `shape`: a gap, or an overlap; None if nothing is."""
    filled = [box for box in boxes if math.prod(box[1])]
    volume = sum(math.prod(size) for _, size in filled)
    whole = math.prod(shape)
    axis = max(range(len(shape)), key=lambda d: len({offset[d] for offset, _ in filled}), default=0)
    if shape:
        filled.sort(key=lambda box: box[0][axis])
    for i, box in enumerate(filled):
        for other in filled[i + 1 :]:
            if shape and other[0][axis] >= box[0][axis] + box[1][axis]:
                break
            if intersect(box, other) is not None:
                return f"boxes {list(box[0])}+{list(box[1])} and {list(other[0])}+{list(other[1])} overlap"
    return None if volume == whole else f"{whole - volume} of {whole} elements are missing"
