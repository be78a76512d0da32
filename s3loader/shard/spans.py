"""Which ranges to fetch for which members, and how to cut members out of what came. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from s3loader.errors import FormatError, ShardReadError
from s3loader.ranges import neighbours
from s3loader.shard.compression import unpack
from s3loader.shard.index import ShardIndex
from s3loader.types import Buffer

__all__ = ["AT_ONCE", "SPAN", "Run", "inflate", "plan_runs", "unpack_frames"]

AT_ONCE: Final = 16 << 20
"""Members up to this size are fetched whole and verified before use; larger ones are streamed."""
SPAN: Final = 8 << 20
"""Bytes of one request when neighbouring members are read one after another."""
GAP: Final = 64 << 10
"""Bytes fetched in vain to save a request."""


class Run(NamedTuple):
    """Members that come with one request."""

    positions: list[int]
    low: int
    """First byte in the tar stream."""
    high: int
    """End; ``low == high``: nothing to fetch together, the members (large or empty) are opened one by one."""


def plan_runs(index: ShardIndex, wanted: Sequence[int]) -> Iterator[Run]:
    """Cut `wanted` into runs, in order; neighbours in the archive that follow each other in `wanted` share one."""
    positions = np.asarray(wanted, dtype=np.int64)
    sizes = index.sizes[positions]
    starts = index.offsets[positions]
    alone = ((sizes == 0) | (sizes > AT_ONCE)).tolist()
    low, high = starts.tolist(), (starts + sizes).tolist()
    places = positions.tolist()
    for first, end in neighbours(low, high, max_gap=GAP, max_size=SPAN, alone=alone):
        if alone[first]:
            yield Run([places[first]], 0, 0)
        else:
            yield Run(places[first:end], low[first], high[end - 1])


def unpack_frames(index: ShardIndex, data: Buffer, low: int, start: int, end: int, url: str) -> Buffer:
    """Bytes ``[start, end)`` of the tar stream out of whole zstd frames that begin at archive byte `low`.

    Raises:
        ShardReadError: a frame is damaged or holds another number of bytes than the index says.
    """
    base, plain = inflate(index, data, low, end, url)
    return memoryview(plain)[start - base : end - base]


def inflate(index: ShardIndex, data: Buffer, low: int, end: int, url: str) -> tuple[int, Buffer]:
    """(tar offset, plain bytes) of whole zstd frames that begin at archive byte `low`, up to the frame that holds `end`.

    Raises:
        ShardReadError: a frame is damaged, cut off, or holds another number of bytes than the index says.
    """
    assert index.frames is not None
    assert index.frames_tar is not None
    first = int(np.searchsorted(index.frames, low, side="right")) - 1
    last = max(first + 1, int(np.searchsorted(index.frames_tar, end, side="left")))
    packed, inside = index.frames[first : last + 1].tolist(), index.frames_tar[first : last + 1].tolist()
    view = memoryview(data)
    if len(view) < packed[-1] - low:
        raise ShardReadError(f"{packed[-1] - low} bytes were expected at {low}, {len(view)} came", op="read", url=url)
    plain = []
    for number, (lo, hi) in enumerate(itertools.pairwise(packed)):
        try:
            plain.append(unpack(view[lo - low : hi - low], inside[number + 1] - inside[number]))
        except FormatError as error:
            raise ShardReadError(f"zstd frame {first + number}: {error.message}", op="read", url=url) from error
    return inside[0], plain[0] if len(plain) == 1 else b"".join(plain)
