"""Where the next iteration of a dataset begins, in memory that the workers of a DataLoader share."""

from __future__ import annotations

from typing import Final

import torch
from torch.utils.data import get_worker_info

from s3loader.adapters import checked_epoch

__all__ = ["SharedStart", "iteration_name"]

_EPOCH: Final = 0
_START: Final = 1
_OVER: Final = 2
_TAKEN: Final = 3
_LAST: Final = 4


def iteration_name(before: int) -> int:
    """A number that all workers of one iteration have in common, and no other iteration has.

    torch draws a seed for each iteration and tells it to the workers; persistent ones keep the first, and count.

    Args:
        before: Iterations that this process has begun before.
    """
    info = get_worker_info()
    return -1 - before if info is None else (info.seed - info.id + before) % (1 << 62) + 1


class SharedStart:
    """Epoch and start in it of the next iteration: a chosen start is that of one iteration, those after it begin at 0.

    Workers begin one by one, and a torch iteration has no word for the training process; so the iteration whose worker
    comes first takes the start by its name, and its other workers know it by that.
    """

    def __init__(self, epoch: int = 0, start: int = 0) -> None:
        self._cells = torch.zeros(5, dtype=torch.int64)
        self._cells.share_memory_()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.choose(epoch, start)

    def copy(self) -> SharedStart:
        """Another, where as much is chosen."""
        twin = SharedStart()
        twin.choose(*self.chosen, over=bool(self._cells[_OVER]))
        return twin

    def choose(self, epoch: int, start: int, *, over: bool = False) -> None:
        """The next iteration begins here; `over`: nothing is left of that epoch, so it begins with the one behind it."""
        self._cells[:_LAST] = torch.tensor([checked_epoch(epoch), start, int(over), 0])

    def set_epoch(self, epoch: int) -> None:
        """The next iterations are of this epoch; a start in it that was not taken is kept."""
        if checked_epoch(epoch) != int(self._cells[_EPOCH]) or self._cells[_TAKEN]:
            self.choose(epoch, 0)
        self._cells[_OVER] = 0

    @property
    def chosen(self) -> tuple[int, int]:
        """Epoch and start as they were chosen last."""
        return int(self._cells[_EPOCH]), int(self._cells[_START])

    @property
    def epoch(self) -> int:
        """The epoch of the next iteration."""
        return int(self._cells[_EPOCH] + self._cells[_OVER])

    @property
    def taken(self) -> int:
        """The name of the iteration that has taken the start; 0 if none has."""
        return int(self._cells[_TAKEN])

    @property
    def last(self) -> tuple[int, int]:
        """Epoch and start of the iteration that began last; of the next one, if none did since they were chosen."""
        return self._of(int(self._cells[_LAST]) if self.taken else 0)

    def take(self, name: int) -> tuple[int, int]:
        """The iteration of this name begins; where."""
        if not self.taken:
            self._cells[_TAKEN] = name
        self._cells[_LAST] = name
        return self._of(name)

    def restored(self, epoch: int, name: int) -> None:
        """The iteration of this name was restored in `epoch` by itself; those after it are of that epoch, and whole."""
        self._cells[:] = torch.tensor([epoch, 0, 0, name, name])

    def _of(self, name: int) -> tuple[int, int]:
        epoch, start, over, taken, _ = self._cells.tolist()
        return (epoch, start) if taken == name and not over else (epoch + over, 0)
