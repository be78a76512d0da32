"""Preemption: a job that is asked to end has a few seconds, and must leave either a whole checkpoint or none."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Final

from s3loader.arguments import checked
from s3loader.checkpoint.manager import CheckpointManager
from s3loader.units import parse_duration

__all__ = ["Preemption"]

_AGAIN: Final = 0.1
"""Seconds after which a signal that was not handled is sent again."""


@checked
class Preemption:
    """Within the block, a signal does not end the process at once; it is true from then on.

    ::

        with Preemption(manager, deadline="25s") as preempted:
            for step, batch in enumerate(loader):
                train(batch)
                if preempted:
                    manager.save(step, items)
                    break

    At the end of the block, saves under way get what is left of the deadline; what is not committed by then is
    abandoned: nothing of it is published. With ``exit=True`` nobody needs to ask: saves under way are finished or
    abandoned in the background, then the process ends by the signal.

    Args:
        manager: Whose saves are finished.
        deadline: Seconds (or ``"25s"``) from the signal to the end.
        signum: The signal.
        exit: End the process by itself.

    It must be entered in the main thread.
    """

    def __init__(
        self, manager: CheckpointManager, *, deadline: float | str = "25s", signum: int = signal.SIGTERM, exit: bool = False
    ) -> None:
        self._manager = manager
        self._seconds = parse_duration(deadline)
        self._signum = signum
        self._exit = exit
        self._until: float | None = None
        self._before: Any = None
        self._ended = False
        self._passed_on = False
        self._left = False

    def __bool__(self) -> bool:
        """Whether the signal came."""
        return self._until is not None

    @property
    def remaining(self) -> float:
        """Seconds that are left; infinite while no signal came."""
        return float("inf") if self._until is None else max(0.0, self._until - time.monotonic())

    def __enter__(self) -> Preemption:
        self._before = signal.signal(self._signum, self._on_signal)
        return self

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._ended:  # sent by `_end`: now it means what it meant before the block
            if not self._passed_on:
                self._passed_on = True
                signal.signal(signum, self._before)
                os.kill(os.getpid(), signum)
            return
        if self._until is not None:
            return
        self._until = time.monotonic() + self._seconds
        if self._exit:
            threading.Thread(target=self._end, name="s3loader-ckpt-preemption", daemon=True).start()

    def _end(self) -> None:
        self._manager.finish(self.remaining)
        self._ended = True
        while not self._passed_on:
            # Python runs handlers between two of its instructions: a signal that comes just before the main thread
            # blocks in the system is not handled until that call ends. The next one wakes it.
            left = self._left
            os.kill(os.getpid(), self._signum)
            if left:
                return
            time.sleep(_AGAIN)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._until is not None:
            self._manager.finish(self.remaining)
        signal.signal(self._signum, self._before)
        self._left = True
