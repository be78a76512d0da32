"""How a store behaves, whatever the engine: attempts, timeouts, rate, concurrency."""

from __future__ import annotations

from dataclasses import dataclass

from s3loader.errors import ConfigError
from s3loader.units import MIB, parse_duration, parse_size

__all__ = ["MAX_PARTS", "StoreOptions"]

MAX_PARTS = 10_000
"""The most parts a multipart upload may have, on S3 and on all that speak its protocol."""


@dataclass(frozen=True, slots=True, init=False)
class StoreOptions:
    """Options of `open_store`. Durations and sizes are taken as numbers or as text (``"30s"``, ``"8MiB"``).

    Args:
        max_attempts: Most tries of one request, the first included.
        retry_budget: Seconds after which no further try of one request is begun.
        connect_timeout: Seconds to wait for a connection.
        read_timeout: Seconds to wait for the next bytes of an answer.
        max_requests_per_second: Upper bound on the requests of this store in this process; None: none.
        concurrency: Connections or threads of a bulk call, and of the parts of a large read.
        part_size: Bytes of a part of a multipart upload; grows where an object would need more than `MAX_PARTS`.
        unsigned: Send requests without credentials, for public buckets.
        requester_pays: Say with each request that its costs are ours (``x-amz-request-payer``), as S3's requester-pays buckets
            demand. S3 only.

    Raises:
        ConfigError: a value is out of range.
    """

    max_attempts: int
    retry_budget: float
    connect_timeout: float
    read_timeout: float
    max_requests_per_second: float | None
    concurrency: int
    part_size: int
    unsigned: bool
    requester_pays: bool

    def __init__(
        self,
        *,
        max_attempts: int = 5,
        retry_budget: float | str = 60.0,
        connect_timeout: float | str = 5.0,
        read_timeout: float | str = 30.0,
        max_requests_per_second: float | None = None,
        concurrency: int = 16,
        part_size: int | str = 8 * MIB,
        unsigned: bool = False,
        requester_pays: bool = False,
    ) -> None:
        for name, number in (("max_attempts", max_attempts), ("concurrency", concurrency)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ConfigError(
                    f"{name} must be a whole number from 1 up, not {number!r}", hint="leave it out for the default"
                )
        if max_requests_per_second is not None and not max_requests_per_second > 0:
            raise ConfigError(
                f"max_requests_per_second must be positive or None, not {max_requests_per_second!r}", hint="None means no limit"
            )
        values = {
            "max_attempts": max_attempts,
            "retry_budget": parse_duration(retry_budget),
            "connect_timeout": parse_duration(connect_timeout),
            "read_timeout": parse_duration(read_timeout),
            "max_requests_per_second": max_requests_per_second,
            "concurrency": concurrency,
            "part_size": parse_size(part_size),
            "unsigned": bool(unsigned),
            "requester_pays": bool(requester_pays),
        }
        for name in ("connect_timeout", "read_timeout", "part_size"):
            if not values[name]:
                raise ConfigError(f"{name} must be more than zero", hint="leave it out for the default")
        for name, value in values.items():
            object.__setattr__(self, name, value)
