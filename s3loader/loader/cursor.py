"""Where an iteration stands, and where the next one begins."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

from s3loader.errors import ConfigError

__all__ = ["Cursor", "OnBreak", "checked_epoch"]

OnBreak: TypeAlias = Literal["next", "rest", "again"]
"""Where an iteration begins after one that was broken off (``break``, ``islice``, a trainer's limit of batches). ``"next"``: at
the next epoch, as torch's sampler would. ``"rest"``: at the batch after the last one delivered. ``"again"``: where that one
began. A loaded state or `set_epoch` beats it, and a state always says what was delivered."""

_EPOCHS: Final = 1 << 40
_BEGINNING: Final = threading.Lock()


def checked_epoch(epoch: int) -> int:
    """`epoch`, where it is one that a state can hold.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(epoch, bool) or not hasattr(epoch, "__index__") or not 0 <= epoch < _EPOCHS:
        raise ConfigError(f"an epoch is a whole number from 0, not {epoch!r}", hint="epochs count from 0")
    return epoch.__index__()


class Cursor:
    """Epoch and count of consumed positions, as they move with iterations.

    An iteration begins where a loaded state or `set_epoch` says; else at the next epoch if the last iteration came to
    its end, where it began if it ended in an error, and where `OnBreak` says if it was broken off.

    Only the iteration that began last moves it, and only until another epoch or position is chosen: what an
    older one still delivers must not change what was chosen.

    Raises:
        ConfigError: there is no such epoch.
    """

    __slots__ = ("_on_break", "_phase", "_start", "consumed", "epoch", "over", "restart", "turn")

    def __init__(self, epoch: int = 0, on_break: OnBreak = "next") -> None:
        self.epoch = checked_epoch(epoch)
        self.consumed = 0
        self.turn = 0
        """Names the iteration that may move this."""
        self.over = False
        """Nothing was left of the epoch where it was loaded: the next iteration is of the one behind it, unless
        `set_epoch` asks for this one."""
        self._on_break: OnBreak = on_break
        self._phase: Literal["chosen", "begun", "failed", "done"] = "chosen"
        self._start = 0
        self.restart = False
        """This very epoch was chosen while it ran."""

    @property
    def coming(self) -> tuple[int, int]:
        """Epoch and start in it of the running iteration; if there is none, of the next one."""
        if self._phase == "done" or self.over:
            return self.epoch + 1, 0
        return self.epoch, 0 if self.restart else self._start

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is of this epoch; a loaded position in it is kept."""
        if checked_epoch(epoch) != self.epoch:
            self.load(epoch, 0)
        elif self._phase == "chosen":
            self.over = False
        elif self._phase == "done":
            self._phase, self._start, self.consumed = "chosen", 0, 0
        else:
            self.restart = True

    def load(self, epoch: int, consumed: int, *, over: bool = False) -> None:
        """The next iteration goes on from here; `over`: nothing is left of this epoch."""
        self.epoch = checked_epoch(epoch)
        self.consumed = self._start = consumed
        self.over, self.restart = over, False
        self._phase = "chosen"
        self.turn += 1

    def begin(self, left: Callable[[int], bool]) -> tuple[int, int, int]:
        """An iteration begins; returns its epoch, where in it, and the name (`turn`) under which it moves this.

        Args:
            left: Whether anything of this epoch is left behind so many positions.
        """
        rest = self._on_break == "rest" and left(self.consumed)
        with _BEGINNING:  # iterations of several threads are of an epoch each
            epoch, start = self.coming
            if self._phase == "begun" and not self.restart:
                if rest:
                    start = self.consumed
                elif self._on_break != "again":
                    epoch, start = epoch + 1, 0
            elif self._phase == "failed" and rest and not self.restart:
                start = self.consumed
            self.load(epoch, start)
            self._phase = "begun"
            return epoch, start, self.turn

    def move(self, turn: int, consumed: int) -> None:
        """The iteration `turn` has delivered so much."""
        if turn == self.turn:
            self.consumed = consumed

    def finish(self, turn: int, size: int) -> None:
        """The iteration `turn` came to its end."""
        if turn == self.turn:
            self.consumed, self._phase = size, "done"

    def fail(self, turn: int) -> None:
        """The iteration `turn` ended in an error."""
        if turn == self.turn:
            self._phase = "failed"
