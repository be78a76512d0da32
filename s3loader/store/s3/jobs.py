"""One request and its response, without I/O: bytes to send, where the response's bytes go, the outcome. And what all
requests to one bucket share (`EndpointContext`): where it is, who signs, what was learnt of the server.

A driver (the pump, a background thread, a single blocking call) sends `wire()`, receives into
`target()` and tells `feed()` how much came, until that says that the response is complete. What the
fast path cannot take, `ask_carefully` sends once more, over urllib3 (`careful.py`), with the same
signature and the same checks.
"""

from __future__ import annotations

import errno
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol, TypeAlias
from urllib.parse import urlsplit

from s3loader import events
from s3loader.credentials import CredentialsSource
from s3loader.endpoint import Endpoint
from s3loader.errors import ConfigError, S3LoaderError, StoreConnectionError, StoreError
from s3loader.store.buffers import BufferPool, aligned_block
from s3loader.store.client_errors import from_socket, no_descriptor
from s3loader.store.options import StoreOptions
from s3loader.store.retry import current_attempt
from s3loader.store.s3.careful import CarefulPath, Response
from s3loader.store.s3.connection import Connections
from s3loader.store.s3.http import MAX_HEAD, ErrorResponse, Head, Signer, UnexpectedResponse, parse_head
from s3loader.store.s3errors import STALE_KEYS, Where, from_status
from s3loader.types import Buffer, ObjectMeta, ReadGate
from s3loader.units import KIB

__all__ = [
    "HEDGED",
    "SMALL",
    "EndpointContext",
    "EndpointHealth",
    "Job",
    "Scratch",
    "Source",
    "TlsReader",
    "Wire",
]

_log = logging.getLogger("s3loader.s3")

_PATIENCE: Final = 8
_RETRY_EVERY: Final = 64
_WRONG_REGION: Final = (
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "TemporaryRedirect",
    "IllegalLocationConstraintException",
    "IncorrectEndpoint",
)


class EndpointHealth:
    """Whether it is worth trying the fast path first, for one kind of request.

    Where it fails again and again, as at a server whose dialect it does not take, the careful path
    is asked at once, and the fast one only now and then.
    """

    __slots__ = ("refusals",)

    def __init__(self) -> None:
        self.refusals = 0
        """Responses that the fast path could not take since the last one that it could."""

    def try_fast(self) -> bool:
        """Whether the next request is to go the fast way."""
        if self.refusals < _PATIENCE:
            return True
        self.refusals += 1
        return self.refusals % _RETRY_EVERY == 0

    def distrust(self) -> None:
        """Let the requests that follow go the careful way."""
        self.refusals = max(self.refusals, _PATIENCE)


class TlsReader(Protocol):
    """Another client that reads over TLS without needing the GIL for every record."""

    def usable(self) -> bool:
        """Whether it works in this process."""
        ...

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """Bytes ``[start, end)`` of an object, with the errors of `Backend.get`."""
        ...


@dataclass(slots=True)
class EndpointContext:
    """What all jobs of one backend share. Threads share it: what is written here is a hint, or one assignment."""

    connections: Connections
    credentials: CredentialsSource
    buffers: BufferPool
    options: StoreOptions
    careful: CarefulPath
    url: str
    """``s3://bucket``, for errors and events."""
    tls_reader: TlsReader | None = None
    """Reads over TLS beside a busy main thread; None: our own threads do it."""
    careful_only: bool = False
    """A proxy stands between us and the endpoint, which only the careful path speaks to."""
    checksums: bool = True
    """Uploads carry a CRC32C; False once the server refused one: then a Content-MD5."""
    size_hint: int = 0
    """Bytes that an object of unknown size is expected to have: about what the last ones had."""
    head_length: int = 0
    """Bytes that heads have here. Foreseen, it lets bodies begin at an aligned address."""
    doubt: int = 0
    """How many jobs shall not rely on `Job.least`, for it was wrong of late."""
    reads: EndpointHealth = field(default_factory=EndpointHealth)
    writes: EndpointHealth = field(default_factory=EndpointHealth)
    heads: EndpointHealth = field(default_factory=EndpointHealth)
    _signer: tuple[Signer, Endpoint] | None = None
    """Made for this endpoint."""

    @property
    def endpoint(self) -> Endpoint:
        """Where requests go now."""
        return self.connections.endpoint

    def object_path(self, key: str) -> str:
        """Request path of `key`, quoted.

        Raises:
            ConfigError: it is empty, which would name the bucket itself, or cannot be written as UTF-8.
        """
        if not key:
            raise ConfigError("the key is empty", url=self.url, hint="name an object")
        return self.connections.endpoint.path(key)

    def signer(self) -> Signer:
        """Signs for the endpoint with the credentials of this moment.

        Raises:
            CredentialsError: there are none.
        """
        keys = self.credentials()
        known, endpoint = self._signer, self.connections.endpoint
        if known is None or known[0].credentials is not keys or known[1] is not endpoint:
            signer = Signer(keys, endpoint.region, endpoint.host_header, always=self.always)
            known = self._signer = signer, endpoint
        return known[0]

    @property
    def always(self) -> dict[str, str]:
        """Headers of every request."""
        return {"x-amz-request-payer": "requester"} if self.options.requester_pays else {}

    def learn(self, error: S3LoaderError, region: str | None, location: str | None, asked: str) -> bool:
        """Take in what an error response says of credentials and region.

        Args:
            error: What the response is.
            region: Where it says that the bucket is.
            location: Its Location header.
            asked: Region that the bucket was taken for when the request was made.

        Returns:
            Whether the request is to be sent once more, since it now goes where the bucket is.
        """
        if error.code in STALE_KEYS:
            error.retryable = not self.credentials.static
            if error.retryable:
                self.credentials.refresh()
            return False
        moved = error.status in (301, 302, 307, 308) or error.code in _WRONG_REGION
        if not moved and not (error.status == 400 and error.code is None):
            return False
        return self._move(region, location, asked)

    def _move(self, region: str | None, location: str | None, asked: str) -> bool:
        here = self.endpoint
        if region and region == here.region != asked:
            return True  # a request beside this one has learned it first
        there = here.in_region(region) if region and region != here.region else None
        if there is None and location:
            there = here.at(urlsplit(location))
        if there is None or there == here:
            return False
        self.connections.move(there)
        return True


# -- jobs ------------------------------------------------------------------------------------------

Wire: TypeAlias = tuple[bytes, *tuple[Buffer, ...]]
"""A request as pieces to send: its head, and what may follow."""

HEDGED: Final = "Hedged: another request for it came first"
"""What the event of a request says that lost against another one for the same."""
SMALL: Final = 32 * KIB
"""Bodies up to this many bytes are received into the driver's scratch memory and copied out: a copy
costs less than a lease, and scratch memory is always in the cache."""


class Scratch:
    """Memory that one driver receives heads and small bodies into."""

    __slots__ = ("block", "view")

    def __init__(self) -> None:
        self.block = aligned_block(2 * SMALL)
        self.view = memoryview(self.block)


class Job(ABC):
    """One request on its way. A job belongs to one driver and is used once.

    Args:
        context: Of the bucket.
        health: Of this kind of request.
        cost: Bytes it takes of the driver's bound.
        fast: Whether the fast path can send it at all.
    """

    __slots__ = (
        "_block", "_context", "_first_byte", "_health", "_mended", "_origin", "_region", "_scratch", "_started", "_view", "at",
        "cost", "done", "error", "fast", "head", "hedge_of", "in_place", "result", "time_limit", "winner",
    )  # fmt: skip

    op: ClassVar[str] = ""
    """As events name it."""
    bodiless: ClassVar[bool] = False
    """The response has no body, whatever its head says (HEAD)."""
    _block: bytearray
    _view: memoryview

    def __init__(self, context: EndpointContext, health: EndpointHealth, cost: int, fast: bool) -> None:
        self._context = context
        self._region = context.connections.endpoint.region
        self._health = health
        self.cost = cost
        """Bytes it takes of the driver's bound; corrected when the response's head has come."""
        self.fast = (
            fast and not context.careful_only and (not health.refusals or (current_attempt() == 1 and health.try_fast()))
        )
        """Whether the fast path is to send it. A second try of what failed there goes the careful way."""
        self.time_limit = context.options.request_timeout + cost / 1048576
        """Seconds it may take in all."""
        self.in_place = False
        """Whether its bytes go to memory of the caller's, so that none is lent for them."""
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.head: Head | None = None
        self.at = 0
        self.hedge_of: Job | None = None
        """The job that this one is a second request for."""
        self.winner: Job | None = None
        """The other one of two requests for the same, once it has come first; then this one's connection is shut."""
        self._started = 0.0
        self._mended = False

    # -- what a driver calls ---------------------------------------------------------------------

    def check_credentials(self) -> None:
        """Whether it can be signed at all, before a connection is made for it.

        Raises:
            CredentialsError: no.
        """
        self._context.signer()

    @abstractmethod
    def wire(self) -> Wire:
        """The request, signed now."""

    def begin(self, scratch: Scratch) -> None:
        """Prepare to receive the response from its first byte."""
        self._block, self._view = scratch.block, scratch.view
        self._origin = self.at = 0
        self._scratch = scratch
        self.head = None
        self._started = events.now() if events.active() else 0.0

    def target(self) -> memoryview:
        """Where the next bytes go."""
        return self._view[self.at :]

    def feed(self, count: int) -> bool:
        """`count` bytes came into `target()`. True: the response is complete, and the job done, unless it has to be sent
        once more by `ask_carefully`.

        Raises:
            UnexpectedResponse: this is no response to take; the connection is spoilt.
        """
        self.at += count
        if self.head is not None:
            if self.head.status >= 300:
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
        head = parse_head(bytes(self._view[self._origin : stop]), self.bodiless)
        have = self.at - stop
        if head.status >= 300:
            return self._begin_refused(head, stop, have)
        self._check(head)
        length = 0 if self.bodiless else head.length
        if have > length:
            raise UnexpectedResponse("more bytes than Content-Length says", head.status)
        self.head = head
        self._place(head, stop, have)
        self.at = have
        return have == length and self._finish()

    def least(self) -> int:
        """Bytes that the response will have at least, if all goes well; 0: nobody knows."""
        return 0

    def was_short(self) -> None:  # noqa: B027 - only reads promise anything
        """The response had fewer bytes than `least`."""

    @property
    def gate(self) -> ReadGate | None:
        """Is asked before it is done in a thread, and told afterwards."""
        return None

    @property
    def resendable(self) -> bool:
        """Whether sending it twice does the same as sending it once."""
        return True

    @property
    def untouched(self) -> bool:
        """Whether nothing of a response has come yet."""
        return self.head is None and self.at == self._origin

    def again(self) -> Job | None:
        """A second request for the same, into memory of its own; None: there can be none."""
        return None

    def give_up(self, why: str) -> None:
        """It is cut off: its event says why."""
        if self._started:
            self._emit(0, None, why)

    def take_over(self, other: Job) -> None:
        """What `other`, a second request for the same, has brought is the result of this one."""
        self.give_up(HEDGED)
        self.head, self.result, self.done = other.head, other.result, True

    def refuse(self, reason: BaseException) -> None:
        """The fast path failed. The job is done then, with its error, unless `ask_carefully` may do better: where the
        response was one that only the careful path can read."""
        where = self.where()
        if self.head is not None and self.head.status >= 300:  # the end of its body never came
            self._refused(self.head)
        elif isinstance(reason, UnexpectedResponse):
            self._unexpected(reason, where)
        elif isinstance(reason, OSError) and reason.errno in (errno.EMFILE, errno.ENFILE):
            self._fail(no_descriptor(where.op, where.url), None)
        else:
            self._fail(from_socket(reason, where, in_body=self.head is not None), None)

    def fail(self, error: BaseException) -> None:
        """It cannot be done."""
        self.error = error
        self.done = True

    def ask_carefully(self) -> None:
        """Do it over the careful path, in this thread, unless it is done; never raises."""
        if self.done:
            return
        try:
            self._ask_carefully()
        except BaseException as error:  # noqa: BLE001 - it is the caller's, and is raised at this job's place
            self.error = error
        self.done = True

    # -- what kinds of job differ in -------------------------------------------------------------

    @abstractmethod
    def where(self) -> Where:
        """What errors say was asked."""

    @abstractmethod
    def _check(self, head: Head) -> None:
        """Raise `UnexpectedResponse` unless this is the response to take."""

    @abstractmethod
    def _place(self, head: Head, stop: int, have: int) -> None:
        """Set `_view` to where the body goes; `have` bytes of it lie in `_view` from `stop`."""

    @abstractmethod
    def _finish(self) -> bool:
        """The body is complete: set `result`. Returns True."""

    @abstractmethod
    def _take(self, response: Response) -> None:
        """Check a success that the careful path received, read its body, set `result`."""

    def _mend(self, error: S3LoaderError) -> bool:
        """Whether the job has been changed so that sending it once more may help against `error`."""
        return False

    # -- the careful path --------------------------------------------------------------------------

    def _ask_carefully(self) -> None:
        self._started = events.now() if events.active() else 0.0
        self.head = None
        try:
            with self._context.careful.send(self.wire(), self.where(), self.time_limit, self.bodiless) as response:
                self._first_byte = self._started and events.now()
                self.head = response.head
                if response.head.status < 300:
                    self._take(response)
                    return
                body = response.read_up_to(ErrorResponse.MAX_BODY)
                self._refused(response.head, ErrorResponse(response.head, bytes(body)))
        except UnexpectedResponse as reason:
            self._fail(self._as_error(reason), reason.status)
        except S3LoaderError as error:
            self._fail(error, error.status)
        if not self.done:  # it was mended
            self._ask_carefully()

    # -- responses that are errors ------------------------------------------------------------------

    def _begin_refused(self, head: Head, stop: int, have: int) -> bool:
        room = 0 if self.bodiless else ErrorResponse.room_for(head)
        if have > room:
            head.keep_alive = False
            have = room
        view = memoryview(bytearray(room))
        view[:have] = self._view[stop : stop + have]
        self._view, self.at, self.head = view, have, head
        return self._go_on_refused(head)

    def _go_on_refused(self, head: Head) -> bool:
        whole = ErrorResponse.is_complete(head, self._view[: self.at])
        if self.at < len(self._view) and not whole:
            return False
        if head.chunked and not whole:
            head.keep_alive = False  # the rest of it stays in the connection
        self._refused(head)
        return True

    def _refused(self, head: Head, response: ErrorResponse | None = None) -> None:
        if response is None:
            response = ErrorResponse(head, bytes(self._view[: self.at]))
        error = response.error(self.where())
        again = (
            self._context.learn(error, response.region, response.location, self._region)
            or self._mend(error)
            or bool(response.location and self.fast and self._context.options.follow_redirects)
        )
        if again and not self._mended:
            self._mended = True
            self._tell(error, head.status)
        else:
            self._fail(error, head.status)

    def _unexpected(self, reason: UnexpectedResponse, where: Where) -> None:
        if reason.kind is not None:
            self._fail(self._as_error(reason), reason.status)
            return
        if reason.status is not None and reason.status >= 300:  # its status is all that could be read of an error
            self._fail(from_status(reason.status, None, "", where), reason.status)
            return
        self._health.refusals += 1
        _log.debug("%s %s goes the careful way: %s (%s)", self.op, where.url, reason, reason.status)
        if self.resendable:
            self._tell(self._as_error(reason), reason.status)
        else:  # it may have been carried out; whoever tries again finds out
            self._health.distrust()
            text = f"the response cannot be read: {reason}"
            self._fail(StoreConnectionError(text, op=where.op, url=where.url, status=reason.status), reason.status)

    def _as_error(self, reason: UnexpectedResponse) -> S3LoaderError:
        where = self.where()
        if reason.kind is not None:
            return reason.kind(str(reason), op=where.op, url=where.url)
        text = f"the response is not what was asked for: {reason}"
        return StoreError(text, op=where.op, url=where.url, status=reason.status, retryable=True)

    def _fail(self, error: S3LoaderError, status: int | None) -> None:
        self._tell(error, status)
        self.fail(error)

    def _tell(self, error: S3LoaderError, status: int | None) -> None:
        if self._started:
            self._emit(0, status, f"{type(error).__name__}: {error.message}")

    @property
    def _offset(self) -> int | None:
        """Of a read: the first byte asked for."""
        return None

    # -- shared ----------------------------------------------------------------------------------

    def _keep_partial_head(self) -> None:
        got = self.at - self._origin
        if got >= MAX_HEAD:
            raise UnexpectedResponse("the head is too long")
        if self._block is self._scratch.block:  # others use it meanwhile
            own = bytearray(MAX_HEAD)
            own[:got] = self._view[self._origin : self.at]
            self._block, self._view, self._origin, self.at = own, memoryview(own), 0, got

    def _emit(
        self, size: int, status: int | None, error: str | None = None, objects: int = 1, first_byte: float | None = None
    ) -> None:
        now = events.now()
        first = self._first_byte if self.head is not None else first_byte
        events.emit(
            events.OpEvent(
                self.op,
                self.where().url,
                size,
                self._started,
                now,
                first,
                engine="direct",
                attempt=current_attempt(),
                status=status,
                error=error,
                objects=objects,
                offset=self._offset,
                endpoint=self._context.endpoint.root,
            )
        )


class Source:
    """The jobs to run. What their iterator raises is kept until all jobs before it are done."""

    def __init__(self, jobs: Iterator[Job]) -> None:
        self._jobs = jobs
        self._ahead: Job | None = None
        self.exhausted = False
        self.error: Exception | None = None

    def take(self, room: int, in_place: int) -> Job | None:
        """The next job if it costs no more than `room` bytes; `in_place`: the same for one into the caller's memory. None: it
        does, or there is none."""
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
        if job.cost > (in_place if job.in_place else room):
            self._ahead = job
            return None
        self._ahead = None
        return job
