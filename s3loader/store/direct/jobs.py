"""One request and its answer, without I/O: bytes to send, where the answer's bytes go, the outcome.

A driver (the pump, a background thread, a single blocking call) sends `wire()`, receives into
`target()` and tells `feed()` how much came, until that says that the answer is complete.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from s3loader import events
from s3loader.endpoint import Endpoint
from s3loader.store.base import Backend
from s3loader.store.buffers import BufferPool
from s3loader.store.direct.head import MAX_HEAD, Head, OddAnswer, parse_head
from s3loader.store.direct.signer import Signer
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
        self.direct = direct and (not trust.refusals or trust.try_direct())
        """Whether this engine is to send it."""
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
        self._check(head)
        have = self.at - stop
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
        """The direct attempt failed; `ask_general` comes next."""
        status = reason.status if isinstance(reason, OddAnswer) else None
        if status not in _PLAIN_ANSWERS:
            self._trust.refusals += 1
        _log.debug("%s %s goes to the general engine: %s (%s)", self.op, self._where(), reason, status)
        if self._started:
            self._emit(0, status, f"{type(reason).__name__}: {reason}")

    def fail(self, error: BaseException) -> None:
        """No engine can do this."""
        self.error = error
        self.done = True

    def ask_general(self) -> None:
        """Let the general engine do it, in this thread; never raises."""
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
    def _where(self) -> str: ...

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
            events.OpEvent(self.op, self._where(), size, self._started, now, first, engine="direct", status=status, error=error)
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
