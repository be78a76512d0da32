"""Where an iteration stands, and where the next one begins."""

from __future__ import annotations

from typing import Final

from s3loader.errors import ConfigError

__all__ = ["Position", "checked_epoch"]

_EPOCHS: Final = 1 << 40


def checked_epoch(epoch: int) -> int:
    """`epoch`, where it is one that a state can hold.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(epoch, bool) or not hasattr(epoch, "__index__") or not 0 <= epoch < _EPOCHS:
        raise ConfigError(f"an epoch is a whole number from 0, not {epoch!r}", hint="epochs count from 0")
    return epoch.__index__()


class Position:
    """Epoch and count of consumed positions, as they move with iterations.

    An iteration begins where a loaded state says; else at the next epoch if the last iteration came to
    its end; else (it was broken off, or there was none) at the beginning of the same epoch.

    Only the iteration that began last moves it, and only until another epoch or position is chosen: what an
    older one still delivers must not change what was chosen.

    Raises:
        ConfigError: there is no such epoch.
    """

    __slots__ = ("_done", "_resume", "consumed", "epoch", "turn")

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = checked_epoch(epoch)
        self.consumed = 0
        self.turn = 0
        """Names the iteration that may move this."""
        self._resume: int | None = None
        self._done = False

    @property
    def start(self) -> int:
        """Where the next iteration begins in its epoch."""
        return self._resume or 0

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is of this epoch; a loaded position in it is kept."""
        if epoch != self.epoch:
            self.epoch, self.consumed, self._resume = checked_epoch(epoch), 0, None
            self.turn += 1
        elif self._done:
            self.consumed, self._resume = 0, None
        self._done = False

    def load(self, epoch: int, consumed: int) -> None:
        """The next iteration goes on from here."""
        self.epoch = checked_epoch(epoch)
        self.consumed = self._resume = consumed
        self._done = False
        self.turn += 1

    def begin(self) -> int:
        """An iteration begins; returns where in its epoch. `turn` is its name."""
        if self._done:
            self.epoch += 1
        self.turn += 1
        self.consumed, self._resume, self._done = self._resume or 0, None, False
        return self.consumed

    def skip_to_next_epoch(self) -> int:
        """There was nothing left; returns where the iteration begins instead."""
        self.epoch, self.consumed = self.epoch + 1, 0
        return 0

    def move(self, turn: int, consumed: int) -> None:
        """The iteration `turn` has delivered so much."""
        if turn == self.turn:
            self.consumed = consumed

    def finish(self, turn: int, size: int) -> None:
        """The iteration `turn` came to its end."""
        if turn == self.turn:
            self.consumed, self._done = size, True
