"""What `save` returns: a save under way, and what came of it."""

from __future__ import annotations

import atexit
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from s3loader.arguments import checked
from s3loader.checkpoint.threads import Gate
from s3loader.errors import StoreTimeoutError

_log = logging.getLogger("s3loader.checkpoint")

__all__ = ["Cleanup", "Progress", "SaveHandle", "SaveResult"]


class Progress(NamedTuple):
    """How far an upload is, in bytes."""

    sent: int
    """What the store has, `resumed` included."""
    total: int
    resumed: int = 0
    """What an interrupted save of the same step had sent before, and is not sent again."""


class Cleanup:
    """What follows a commit: old steps go, in the background."""

    def __init__(self) -> None:
        self.retired: tuple[int, ...] = ()
        self.error: Exception | None = None
        self._ended = Gate()

    def __reduce__(self) -> tuple[Any, ...]:
        return _ended, self.result()

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self._ended.is_open()

    def end(self) -> None:
        """There is no more to come."""
        self._ended.open()

    def result(self) -> tuple[tuple[int, ...], Exception | None]:
        """What was deleted, and what went wrong, when it has ended."""
        self._ended.wait()
        return self.retired, self.error


def _ended(retired: tuple[int, ...] = (), error: Exception | None = None) -> Cleanup:
    cleanup = Cleanup()
    cleanup.retired, cleanup.error = retired, error
    cleanup.end()
    return cleanup


@dataclass(frozen=True, slots=True)
class SaveResult:
    """A committed checkpoint."""

    step: int
    attempt: str
    bytes: int
    """Of state, on this rank."""
    written: int
    """Bytes of files this rank wrote (less than `bytes` where tensors were unchanged or another rank's)."""
    staged_s: float
    """Seconds that `save` kept the caller."""
    seconds: float
    """Seconds from `save` to the commit."""
    skipped: bool = False
    """Whether the step was there already and was left as it is (``on_exists="skip"``)."""
    resumed: int = 0
    """Of `written`, the bytes that an interrupted save of the same step had sent before, and that were not sent again."""
    _cleanup: Cleanup = field(default_factory=_ended, repr=False, compare=False)

    @property
    def retired(self) -> tuple[int, ...]:
        """Steps that retention deleted afterwards, which it does in the background: asking waits for it."""
        return self._cleanup.result()[0]

    @property
    def cleanup_error(self) -> Exception | None:
        """What kept retention from its work, if anything; the checkpoint itself is safe. Asking waits, as `retired` does."""
        return self._cleanup.result()[1]


@checked
@dataclass(slots=True, eq=False, weakref_slot=True)
class SaveHandle:
    """A save under way. Whoever does not ask for the `result` gets its error from the manager's next call.

    Where there is no such call, it is logged when the handle is dropped or the interpreter ends.
    """

    step: int
    attempt: str
    _progress: Callable[[], Progress]
    _staged: Gate = field(default_factory=Gate)
    _finished: Gate = field(default_factory=Gate)
    _result: SaveResult | None = None
    _error: BaseException | None = None
    observed: bool = False
    """Whether somebody got the error."""

    def __post_init__(self) -> None:
        _handles.add(self)

    def __del__(self) -> None:
        self._complain()

    def _complain(self) -> None:
        if (error := self.failed()) is not None:
            _log.error("step %d was not saved, and nobody asked for its result: %s: %s", self.step, type(error).__name__, error)

    @property
    def done(self) -> bool:
        """Whether it is committed or has failed."""
        return self._finished.is_open()

    @property
    def error(self) -> BaseException | None:
        """What it failed with so far; asking does not count as having seen it."""
        return self._error

    @property
    def progress(self) -> Progress:
        """Bytes sent and to be sent by this rank."""
        return self._progress()

    def staged(self, timeout: float | None = None) -> bool:
        """Wait until the state was copied, so that it may be changed. `save` returns after that by itself."""
        return self._staged.wait(timeout)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is committed or has failed; returns whether it is."""
        return self._finished.wait(timeout)

    def result(self, timeout: float | None = None) -> SaveResult:
        """Wait for the commit.

        Args:
            timeout: Seconds; None waits as long as it takes.

        Raises:
            StoreTimeoutError: it is still under way.
            S3LoaderError: it failed.
        """
        if not self._finished.wait(timeout):
            raise StoreTimeoutError(
                f"step {self.step} is not committed after {timeout} s",
                op="save",
                retryable=False,
                hint="it goes on in the background: ask again, or wait longer",
            )
        if self._error is not None:
            self.observed = True
            raise self._error
        assert self._result is not None
        return self._result

    @property
    def over(self) -> bool:
        """Whether it is done and nobody needs to hear of it any more."""
        return self.done and (self._error is None or self.observed)

    def failed(self) -> BaseException | None:
        """The error of a finished save that nobody has seen yet; then it counts as seen."""
        if self._error is None or not self.done or self.observed:
            return None
        self.observed = True
        return self._error


_handles: weakref.WeakSet[SaveHandle] = weakref.WeakSet()


@atexit.register  # saves under way have ended by then: their threads are waited for first
def _at_exit() -> None:
    for handle in list(_handles):
        handle._complain()
