"""How a store behaves, whatever the engine: attempts, timeouts, rate, concurrency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from s3loader.arguments import checked
from s3loader.errors import ConfigError
from s3loader.options import at_least, fill
from s3loader.units import MIB, parse_duration, parse_size

__all__ = ["MAX_PARTS", "MOST_CONNECTIONS", "MOST_THREADS", "StoreOptions"]

MAX_PARTS = 10_000
"""The most parts a multipart upload may have, on S3 and on all that speak its protocol."""

MOST_CONNECTIONS = 64
"""To one S3 endpoint, where nobody names a bound."""
MOST_THREADS = 16
"""Of a bulk call on other stores, where nobody names a number."""


@checked
@dataclass(frozen=True, slots=True, init=False)
class StoreOptions:
    """Options of `open_store`. Durations and sizes are taken as numbers or as text (``"30s"``, ``"8MiB"``).

    Args:
        max_attempts: Most tries of one request, the first included. None: 5, and up to 30 (with growing waits, until
            `retry_budget` is over) while the store says "slow down", so that one that throttles for a minute is waited for.
        retry_budget: Seconds after which no further try of one request is begun.
        hedge_reads: Ask once more for a range whose answer takes unusually long, and take what comes first: of many ranges read
            together, by the direct engine, at most 2 % of them (10 % while the second requests come first).
        connect_timeout: Seconds to wait for a connection.
        read_timeout: Seconds to wait for the next bytes of an answer.
        request_timeout: Seconds that one request may take in all, beside one more for each MiB that it moves: what drips in
            byte by byte ends too.
        follow_redirects: Redirects to another host than the endpoint's own service: False refuses them, True follows them
            without the session token, a list of host names follows only to these, and sends them the session token as well.
            S3 only.
        max_requests_per_second: Upper bound on the requests of this store in this process; None: none.
        concurrency: Most connections or threads of a bulk call, and of the parts of a large read. Of connections to S3 as many
            are used as pay, which is measured. None: up to 64 of them, 16 threads elsewhere.
        part_size: Bytes of a part of a multipart upload; grows where an object would need more than `MAX_PARTS`.
        unsigned: Send requests without credentials, for public buckets.
        requester_pays: Say with each request that its costs are ours (``x-amz-request-payer``), as S3's requester-pays buckets
            demand. S3 only.

    Raises:
        ConfigError: a value is out of range.
    """

    max_attempts: int | None
    retry_budget: float
    hedge_reads: bool
    connect_timeout: float
    read_timeout: float
    request_timeout: float
    follow_redirects: bool | tuple[str, ...]
    max_requests_per_second: float | None
    concurrency: int | None
    part_size: int
    unsigned: bool
    requester_pays: bool

    def __init__(
        self,
        *,
        max_attempts: int | None = None,
        retry_budget: float | str = 120.0,
        hedge_reads: bool = True,
        connect_timeout: float | str = 5.0,
        read_timeout: float | str = 30.0,
        request_timeout: float | str = 300.0,
        follow_redirects: bool | Sequence[str] = False,
        max_requests_per_second: float | None = None,
        concurrency: int | None = None,
        part_size: int | str = 8 * MIB,
        unsigned: bool = False,
        requester_pays: bool = False,
    ) -> None:
        if max_requests_per_second is not None and not max_requests_per_second > 0:
            raise ConfigError(
                f"max_requests_per_second must be positive or None, not {max_requests_per_second!r}", hint="None means no limit"
            )
        if not isinstance(follow_redirects, bool):
            if isinstance(follow_redirects, str) or not all(isinstance(host, str) for host in follow_redirects):
                raise ConfigError(
                    f"follow_redirects must be True, False or a list of host names, not {follow_redirects!r}",
                    hint='["node-1.example.org"] sends the session token to that host only',
                )
            follow_redirects = tuple(host.lower() for host in follow_redirects)
        values = {
            "max_attempts": None if max_attempts is None else at_least("max_attempts", max_attempts),
            "retry_budget": parse_duration(retry_budget),
            "hedge_reads": bool(hedge_reads),
            "connect_timeout": parse_duration(connect_timeout),
            "read_timeout": parse_duration(read_timeout),
            "request_timeout": parse_duration(request_timeout),
            "follow_redirects": follow_redirects,
            "max_requests_per_second": max_requests_per_second,
            "concurrency": None if concurrency is None else at_least("concurrency", concurrency),
            "part_size": parse_size(part_size, "part_size"),
            "unsigned": bool(unsigned),
            "requester_pays": bool(requester_pays),
        }
        for name in ("connect_timeout", "read_timeout", "request_timeout", "part_size"):
            if not values[name]:
                raise ConfigError(f"{name} must be more than zero", hint="leave it out for the default")
        fill(self, **values)
