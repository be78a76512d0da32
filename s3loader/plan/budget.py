"""How a process's memory limit is divided, and which way of fetching follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from s3loader.units import MIB

__all__ = ["Budget"]

CHUNK_BYTES: Final = 8 * MIB
"""Samples planned at a time, and datasets so small that a look-ahead of this size holds them."""
_KEPT: Final = 0.7


@dataclass(frozen=True, slots=True)
class Budget:
    """Made by `divide`."""

    whole_blocks: bool
    """Fetch whole blocks and keep them while their windows last; else only the samples of a look-ahead."""
    resident: int
    """Bytes kept between batches, by average size."""
    in_flight: int
    """Bytes fetched or being fetched, not yet taken."""
    look_ahead: int
    """Bytes of samples planned at a time."""

    @classmethod
    def divide(cls, memory_limit: int, prefetch: int, *, open_bytes: int, total_bytes: int) -> Budget:
        """The budget for a process that has `open_bytes` of blocks open at a time (0: an order without blocks).

        Blocks are kept where they fill at most 70 % of the limit. A dataset that fits into one look-ahead
        needs none: few reads fetch all of it.
        """
        if open_bytes and open_bytes <= _KEPT * memory_limit and total_bytes > min(CHUNK_BYTES, memory_limit // 3):
            return cls(True, open_bytes, max(1, min(prefetch, memory_limit - open_bytes)), CHUNK_BYTES)
        third = max(1, memory_limit // 3)
        return cls(False, third, min(prefetch, third), third)
