"""Where an iteration stands, and where the next one begins."""

from __future__ import annotations

__all__ = ["Position"]


class Position:
    """Epoch and count of consumed positions, as they move with iterations.

    An iteration begins where a loaded state says; else at the next epoch if the last iteration came to
    its end; else (it was broken off, or there was none) at the beginning of the same epoch.
    """

    __slots__ = ("_done", "_resume", "consumed", "epoch")

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch
        self.consumed = 0
        self._resume: int | None = None
        self._done = False

    @property
    def start(self) -> int:
        """Where the next iteration begins in its epoch."""
        return self._resume or 0

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is of this epoch; a loaded position in it is kept."""
        if epoch != self.epoch:
            self.epoch, self.consumed, self._resume = epoch, 0, None
        elif self._done:
            self.consumed, self._resume = 0, None
        self._done = False

    def load(self, epoch: int, consumed: int) -> None:
        """The next iteration goes on from here."""
        self.epoch = epoch
        self.consumed = self._resume = consumed
        self._done = False

    def begin(self) -> int:
        """An iteration begins; returns where in its epoch."""
        if self._done:
            self.epoch += 1
        self.consumed, self._resume, self._done = self._resume or 0, None, False
        return self.consumed

    def skip_to_next_epoch(self) -> int:
        """There was nothing left; returns where the iteration begins instead."""
        self.epoch, self.consumed = self.epoch + 1, 0
        return 0

    def finish(self, size: int) -> None:
        """The iteration came to its end."""
        self.consumed, self._done = size, True
