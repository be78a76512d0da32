"""One request and its answer, without I/O: bytes to send, where the answer's bytes go, the outcome.

A driver (the pump, a background thread, a single blocking call) sends `wire()`, receives into
`target()` and tells `feed()` how much came, until that says that the answer is complete.
"""

from __future__ import annotations

import errno
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from s3loader import events
from s3loader.endpoint import Endpoint
from s3loader.errors import S3LoaderError
from s3loader.store.base import Backend
from s3loader.store.buffers import BufferPool
from s3loader.store.client_errors import no_descriptor
from s3loader.store.direct.head import MAX_HEAD, Head, OddAnswer, parse_head
from s3loader.store.direct.refusal import asks_for_patience, is_complete, refusal, room_for
from s3loader.store.direct.signer import Signer
from s3loader.store.s3errors import Where
from s3loader.store.threads import current_attempt
from s3loader.types import Buffer
from s3loader.units import KIB

_log = logging.getLogger("s3loader.direct")

__all__ = ["SMALL", "Job", "Scratch", "Setting", "Source", "Trust", "Wire", "harmless"]

Wire: TypeAlias = tuple[bytes, *tuple[Buffer, ...]]
"""A request as pieces to send: its head, and what may follow."""

SMALL: Final = 32 * KIB
"""Bodies up to this many bytes are received into the driver's scratch memory and copied out: a copy
costs less than a lease, and scratch memory is always in the cache."""
_PATIENCE: Final = 8
_DOUBT: Final = 256
_RETRY_EVERY: Final = 64
_PLAIN_ANSWERS: Final = (404, 412, 416)
"""Errors that are the request's own, and say nothing against the way it went."""
_BUSY: Final = (429, 503)
"""Errors that say nothing against it either: whoever asks, the store has too much to do."""


class Scratch:
    """Memory that one driver receives heads and small bodies into."""

    __slots__ = ("block", "view")

    def __init__(self) -> None:
        self.block = bytearray(2 * SMALL)
        self.view = memoryview(self.block)


class Trust:
    """Whether it is worth trying this engine first, for one kind of request.

    Where it fails again and again, as at a server whose dialect it does not take, the general engine
    is asked at once, and this one only now and then.
    """

    __slots__ = ("refusals",)

    def __init__(self) -> None:
        self.refusals = 0
        """Attempts that failed since the last one that did not, missing keys and the like left out."""

    def try_direct(self) -> bool:
        """Whether the next request is to be sent by this engine."""
        if self.refusals < _PATIENCE:
            return True
        self.refusals += 1
        return self.refusals % _RETRY_EVERY == 0


@dataclass(slots=True)
class Setting:
    """What all jobs of one backend share."""

    endpoint: Endpoint
    signer: Callable[[], Signer]
    buffers: BufferPool
    general: Backend
    size_hint: int = 0
    """Bytes that an object of unknown size is expected to have: about what the last ones had."""
    head_length: int = 0
    """Bytes that heads have here. Foreseen, it lets bodies begin at an aligned address."""
    doubt: int = 0
    """How many jobs shall not rely on `Job.least`, for it was wrong of late."""
    reads: Trust = field(default_factory=Trust)
    writes: Trust = field(default_factory=Trust)


class Job(ABC):
    """One request on its way. A job belongs to one driver and is used once."""

    __slots__ = (
        "_block", "_first_byte", "_origin", "_scratch", "_setting", "_started", "_trust", "_view", "at",
        "cost", "direct", "done", "error", "head", "result",
    )  # fmt: skip

    op = ""
    """As events name it."""
    _block: bytearray
    _view: memoryview

    def __init__(self, setting: Setting, trust: Trust, cost: int, direct: bool) -> None:
        self._setting = setting
        self._trust = trust
        self.cost = cost
        """Bytes it takes of the driver's bound; corrected when the answer's head has come."""
        self.direct = direct and (not trust.refusals or (current_attempt() == 1 and trust.try_direct()))
        """Whether this engine is to send it. A second try of what failed here goes the general way."""
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.head: Head | None = None
        self.at = 0
        self._started = 0.0

    # -- what a driver calls ---------------------------------------------------------------------

    @abstractmethod
    def wire(self) -> Wire:
        """The request."""

    def begin(self, scratch: Scratch) -> None:
        """Prepare to receive the answer from its first byte."""
        self._block, self._view = scratch.block, scratch.view
        self._origin = self.at = 0
        self._scratch = scratch
        self.head = None
        self._started = events.now() if events.active() else 0.0

    def target(self) -> memoryview:
        """Where the next bytes go."""
        return self._view[self.at :]

    def feed(self, count: int) -> bool:
        """`count` bytes came into `target()`. True: the job is done.

        Raises:
            OddAnswer: this is no answer to take; the connection is spoilt.
        """
        self.at += count
        if self.head is not None:
            if self.head.status >= 400:
                return self._go_on_refused(self.head)
            if self.at < len(self._view):
                return False
            return self._finish()
        if self._started:
            self._first_byte = events.now()
        stop = self._block.find(b"\r\n\r\n", self._origin, self.at)
        if stop < 0:
            self._keep_partial_head()
            return False
        stop += 4
        head = parse_head(bytes(self._view[self._origin : stop]))
        have = self.at - stop
        if head.status >= 400:
            return self._begin_refused(head, stop, have)
        self._check(head)
        if have > head.length:
            raise OddAnswer("more bytes than Content-Length says", head.status)
        self.head = head
        self._place(head, stop, have)
        self.at = have
        return have == head.length and self._finish()

    def least(self) -> int:
        """Bytes that the answer will have at least, if all goes well; 0: nobody knows."""
        return 0

    def was_short(self) -> None:
        """The answer had fewer bytes than `least`."""
        self._setting.doubt = _DOUBT

    @property
    def untouched(self) -> bool:
        """Whether nothing of an answer has come yet."""
        return self.head is None and self.at == self._origin

    def refuse(self, reason: BaseException) -> None:
        """The direct attempt failed; `ask_general` comes next, unless the job is done now: where the
        store asks for patience, and where a lack of descriptors stops every engine."""
        status = reason.status if isinstance(reason, OddAnswer) else None
        if self.head is not None and self.head.status >= 400:  # the end of its body never came
            self._refused(self.head)
            return
        if status is not None and asks_for_patience(status):
            self._end_refused(refusal(status, None, b"", self._asked()), status)
            return
        if isinstance(reason, OSError) and reason.errno in (errno.EMFILE, errno.ENFILE):
            asked = self._asked()
            self._end_refused(no_descriptor(asked.op, asked.url), None)
            return
        if status not in _PLAIN_ANSWERS:
            self._trust.refusals += 1
        _log.debug("%s %s goes to the general engine: %s (%s)", self.op, self._asked().url, reason, status)
        if self._started:
            self._emit(0, status, f"{type(reason).__name__}: {reason}")

    def fail(self, error: BaseException) -> None:
        """No engine can do this."""
        self.error = error
        self.done = True

    def ask_general(self) -> None:
        """Let the general engine do it, in this thread, unless it is done; never raises."""
        if self.done:
            return
        try:
            self.result = self._ask(self._setting.general)
        except BaseException as error:  # noqa: BLE001 - it is the caller's, and is raised at this job's place
            self.error = error
        self.done = True

    # -- what kinds of job differ in -------------------------------------------------------------

    @abstractmethod
    def _check(self, head: Head) -> None:
        """Raise `OddAnswer` unless this is the answer to take."""

    @abstractmethod
    def _place(self, head: Head, stop: int, have: int) -> None:
        """Set `_view` to where the body goes; `have` bytes of it lie in `_view` from `stop`."""

    @abstractmethod
    def _finish(self) -> bool:
        """The body is complete: set `result`. Returns True."""

    @abstractmethod
    def _ask(self, general: Backend) -> Any: ...

    @abstractmethod
    def _asked(self) -> Where:
        """What errors say was asked."""

    # -- answers that ask for patience -----------------------------------------------------------

    def _begin_refused(self, head: Head, stop: int, have: int) -> bool:
        if not asks_for_patience(head.status):
            raise OddAnswer("not a success", head.status)
        room = room_for(head)
        if have > room:
            head.keep_alive = False
            have = room
        view = memoryview(bytearray(room))
        view[:have] = self._view[stop : stop + have]
        self._view, self.at, self.head = view, have, head
        return self._go_on_refused(head)

    def _go_on_refused(self, head: Head) -> bool:
        if self.at < len(self._view) and not is_complete(head, self._view[: self.at]):
            return False
        self._refused(head)
        return True

    def _refused(self, head: Head) -> None:
        self._end_refused(refusal(head.status, head, bytes(self._view[: self.at]), self._asked()), head.status)

    def _end_refused(self, error: S3LoaderError, status: int | None) -> None:
        if status not in _BUSY:
            self._trust.refusals += 1
        if self._started:
            self._emit(0, status, f"{type(error).__name__}: {error.message}")
        self.fail(error)

    # -- shared ----------------------------------------------------------------------------------

    def _keep_partial_head(self) -> None:
        got = self.at - self._origin
        if got >= MAX_HEAD:
            raise OddAnswer("the head is too long")
        if self._block is self._scratch.block:  # others use it meanwhile
            own = bytearray(MAX_HEAD)
            own[:got] = self._view[self._origin : self.at]
            self._block, self._view, self._origin, self.at = own, memoryview(own), 0, got

    def _emit(self, size: int, status: int | None, error: str | None = None) -> None:
        now = events.now()
        first = self._first_byte if self.head is not None else None
        events.emit(
            events.OpEvent(
                self.op,
                self._asked().url,
                size,
                self._started,
                now,
                first,
                engine="direct",
                attempt=current_attempt(),
                status=status,
                error=error,
            )
        )


class Source:
    """The jobs to run. What their iterator raises is kept until all jobs before it are done."""

    def __init__(self, jobs: Iterator[Job]) -> None:
        self._jobs = jobs
        self._ahead: Job | None = None
        self.exhausted = False
        self.error: Exception | None = None

    def take(self, room: int) -> Job | None:
        """The next job if it costs no more than `room` bytes; None: it does, or there is none."""
        job = self._ahead
        if job is None:
            if self.exhausted:
                return None
            try:
                job = next(self._jobs)
            except StopIteration:
                self.exhausted = True
                return None
            except Exception as error:  # noqa: BLE001 - the caller's own, raised at its place
                self.exhausted = True
                self.error = error
                return None
        if job.cost > room:
            self._ahead = job
            return None
        self._ahead = None
        return job


def harmless(value: str | None) -> bool:
    """Whether `value` can stand in a header."""
    return value is None or (value.isascii() and value.isprintable() and value == value.strip())
