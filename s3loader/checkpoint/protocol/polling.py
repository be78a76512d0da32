"""Waiting for other ranks: they are looked for again and again in the store, ever less often."""

from __future__ import annotations

import time
from typing import Final

__all__ = ["Polling"]

_FIRST: Final = 0.02
_SLOWER: Final = 1.5


class Polling:
    """Pauses between looks, and when to give up.

    Args:
        seconds: For how long.
        longest: Seconds of the longest pause.
    """

    def __init__(self, seconds: float, *, longest: float = 0.5) -> None:
        self._begin = time.monotonic()
        self._end = self._begin + seconds
        self._pause = _FIRST
        self._longest = longest

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._end

    @property
    def waited(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._begin

    def pause(self) -> None:
        """Sleep until the next look."""
        time.sleep(self._pause)
        self._pause = min(self._longest, self._pause * _SLOWER)
