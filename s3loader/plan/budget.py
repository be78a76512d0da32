"""How a process's memory limit is divided, and which way of fetching follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from s3loader.units import KIB, MIB

__all__ = ["GET_WORTH", "Budget", "Strategy"]

GET_WORTH: Final = 256 * KIB
"""Bytes that cost about as much as one more request: gaps up to this size are read over."""
LOOK_AHEAD: Final = 8 * MIB
"""Bytes of samples planned at a time where blocks are kept anyway."""
_KEPT: Final = 0.7
"""Most of the memory limit that is kept between batches; the rest is for what is on its way."""

Strategy: TypeAlias = Literal["whole", "blocks", "samples"]
"""``"whole"``: what the process needs of the dataset is fetched once, in large ranges, and kept until it was used.
``"blocks"``: whole blocks of the order are fetched and kept while their windows last. ``"samples"``: only the samples of a
look-ahead are fetched, neighbours together."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Made by `divide`. All sizes in bytes, by the average size of a sample."""

    strategy: Strategy
    resident: int
    """Kept between batches."""
    in_flight: int
    """Fetched or being fetched, not yet taken."""
    look_ahead: int
    """Samples planned at a time."""

    @classmethod
    def divide(
        cls,
        memory_limit: int,
        prefetch: int,
        *,
        open_bytes: int,
        total_bytes: int,
        whole_bytes: int | None = None,
        in_units: bool = False,
    ) -> Budget:
        """The budget of one process.

        Args:
            memory_limit: Bytes it may hold.
            prefetch: Most bytes that are fetched ahead.
            open_bytes: Bytes of the blocks it has open at a time; 0: an order without blocks.
            total_bytes: Bytes of the dataset.
            whole_bytes: The same, where keeping all of it would save requests; None: it would not.
            in_units: Samples can only be fetched with all of their block.
        """
        most = int(_KEPT * memory_limit)
        if whole_bytes is not None and whole_bytes <= most:
            return cls("whole", whole_bytes, max(1, min(prefetch, memory_limit - whole_bytes)), max(1, whole_bytes))
        if open_bytes and open_bytes <= most and (in_units or total_bytes > min(LOOK_AHEAD, memory_limit // 3)):
            return cls("blocks", open_bytes, max(1, min(prefetch, memory_limit - open_bytes)), LOOK_AHEAD)
        third = max(1, memory_limit // 3)
        return cls("samples", min(third, max(1, total_bytes)), min(prefetch, third), third)
