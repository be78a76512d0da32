"""Which ranges to fetch for which members, and how to cut members out of what came. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from s3loader.errors import ShardReadError
from s3loader.shard.index import ShardIndex
from s3loader.types import Buffer

__all__ = ["AT_ONCE", "SPAN", "Run", "plan_runs", "unpack_frames"]

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
    offsets, sizes = index.offsets, index.sizes
    run: list[int] = []
    low = high = 0
    for i in wanted:
        start, size = int(offsets[i]), int(sizes[i])
        alone = size == 0 or size > AT_ONCE
        if run and (alone or not (0 <= start - high <= GAP and start + size - low <= SPAN)):
            yield Run(run, low, high)
            run = []
        if alone:
            yield Run([i], 0, 0)
            continue
        if not run:
            low = start
        run.append(i)
        high = start + size
    if run:
        yield Run(run, low, high)


def unpack_frames(index: ShardIndex, data: Buffer, low: int, start: int, end: int, url: str) -> Buffer:
    """Bytes ``[start, end)`` of the tar stream out of whole zstd frames that begin at archive byte `low`.

    Raises:
        ShardReadError: a frame is damaged or holds another number of bytes than the index says.
    """
    import numpy as np
    import zstandard

    assert index.frames is not None
    assert index.frames_tar is not None
    first = int(np.searchsorted(index.frames, low, side="right")) - 1
    view = memoryview(data)
    plain = []
    at = first
    while int(index.frames_tar[at]) < end:
        lo, hi = int(index.frames[at]) - low, int(index.frames[at + 1]) - low
        size = int(index.frames_tar[at + 1]) - int(index.frames_tar[at])
        try:
            piece = zstandard.ZstdDecompressor().decompress(view[lo:hi], max_output_size=size)
        except zstandard.ZstdError as error:
            raise ShardReadError(f"zstd frame {at} is damaged: {error}", op="read", url=url) from error
        if len(piece) != size:
            raise ShardReadError(f"zstd frame {at} holds {len(piece)} bytes, the index says {size}", op="read", url=url)
        plain.append(piece)
        at += 1
    base = int(index.frames_tar[first])
    joined = plain[0] if len(plain) == 1 else b"".join(plain)
    return memoryview(joined)[start - base : end - base]
