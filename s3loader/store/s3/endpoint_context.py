"""What all requests to one bucket share: where it is, who signs, what was learnt of the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Protocol
from urllib.parse import urlsplit

from s3loader.credentials import CredentialsSource
from s3loader.endpoint import Endpoint
from s3loader.errors import ConfigError, S3LoaderError
from s3loader.store.buffers import BufferPool
from s3loader.store.options import StoreOptions
from s3loader.store.s3.careful import CarefulPath
from s3loader.store.s3.connection import Connections
from s3loader.store.s3.signer import Signer
from s3loader.types import Buffer, ObjectMeta

__all__ = ["EndpointContext", "EndpointHealth", "TlsReader"]

_PATIENCE: Final = 8
_RETRY_EVERY: Final = 64
_STALE_KEYS: Final = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")
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

    def learn(self, error: S3LoaderError, region: str | None, location: str | None) -> bool:
        """Take in what an error response says of credentials and region.

        Args:
            error: What the response is.
            region: Where it says that the bucket is.
            location: Its Location header.

        Returns:
            Whether the request is to be sent once more, since it now goes where the bucket is.
        """
        if error.code in _STALE_KEYS:
            error.retryable = not self.credentials.static
            if error.retryable:
                self.credentials.refresh()
            return False
        moved = error.status in (301, 302, 307, 308) or error.code in _WRONG_REGION
        if not moved and not (error.status == 400 and error.code is None):
            return False
        return self._move(region, location)

    def _move(self, region: str | None, location: str | None) -> bool:
        here = self.endpoint
        there = here.in_region(region) if region and region != here.region else None
        if there is None and location:
            there = here.at(urlsplit(location))
        if there is None or there == here:
            return False
        self.connections.move(there)
        return True
