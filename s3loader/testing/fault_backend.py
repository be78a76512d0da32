"""A store that fails as told: seeded, counted, without delays. For tests of whatever stands on a store."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, TypeVar

from s3loader.errors import (
    ConfigError,
    ConflictError,
    S3LoaderError,
    StoreConnectionError,
    StoreTimeoutError,
    ThrottledError,
    TruncatedError,
    UnavailableError,
)
from s3loader.store import ObjectStore, StoreOptions, open_store
from s3loader.store.arguments import said
from s3loader.store.backend import Backend, ForwardingBackend, Op
from s3loader.store.open import assemble
from s3loader.store.pipeline import innermost
from s3loader.types import Buffer, CommonPrefix, ObjectMeta, ObjectURL, PartResult, PutMode, PutResult

__all__ = ["Fault", "FaultBackend", "FaultKind", "Moment", "Seen", "open_faulty_store"]

T = TypeVar("T")

FaultKind: TypeAlias = Literal[
    "unavailable", "throttled", "conflict", "timeout", "refused", "reset", "drop_reply", "truncate", "flip"
]
"""
===============  =======================================================================
``unavailable``  503 before anything is done
``throttled``    503 SlowDown before anything is done
``conflict``     409 before anything is done
``timeout``      no answer in time; nothing is done
``refused``      the connection is refused: it is known that nothing was done
``reset``        the connection breaks before anything is done, which the caller cannot know
``drop_reply``   it is done, then the connection breaks: the answer is lost
``truncate``     the second half of a body, or of a listing, is missing
``flip``         one bit of the body is wrong: of what is read, or of what gets written
===============  =======================================================================
"""

Moment: TypeAlias = Literal["before", "after"]
_ERRORS: Final[dict[str, tuple[type[S3LoaderError], str, int | None, str | None]]] = {
    "unavailable": (UnavailableError, "the store failed", 503, "ServiceUnavailable"),
    "throttled": (ThrottledError, "slow down", 503, "SlowDown"),
    "conflict": (ConflictError, "another writer is at work", 409, "ConditionalRequestConflict"),
    "timeout": (StoreTimeoutError, "no answer in time", None, None),
    "refused": (StoreConnectionError, "the connection was refused", None, None),
    "reset": (StoreConnectionError, "the connection broke", None, None),
    "drop_reply": (StoreConnectionError, "the connection broke", None, None),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One rule: which requests fail, and how.

    A request is hit when verb and key match and it is number `nth` among those that match, or,
    without `nth`, by chance; after `times` hits the rule is spent.
    """

    kind: FaultKind
    op: Op | None = None
    """Verb; None: any."""
    key: str = ""
    """Text the key contains; empty: any."""
    nth: int | None = None
    """1-based count among matching requests."""
    probability: float = 1.0
    times: int | None = 1
    """Most hits; None: no end."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One request that came by."""

    number: int
    """1-based, over all verbs."""
    op: Op
    key: str
    fault: FaultKind | None


class FaultBackend(ForwardingBackend):
    """Stands around an engine and lets requests fail by `faults`.

    Args:
        faults: The first rule that hits counts.
        seed: Of all chances and positions; the same requests in the same order fail in the same way.
        hook: Called with each request before and after it is done, e.g. to kill the process at
            request n; what it raises is raised to the caller.

    Not for pickling. The engine's own bulk verbs are not used through it: every request passes here.
    """

    def __init__(
        self,
        inner: Backend,
        faults: Sequence[Fault] = (),
        *,
        seed: int = 0,
        hook: Callable[[Seen, Moment], None] | None = None,
    ) -> None:
        super().__init__(inner)
        for fault in faults:
            if fault.nth is not None and fault.nth < 1:
                raise ConfigError(f"nth counts from 1, not {fault.nth}", hint="leave nth out for every matching request")
        self.faults = tuple(faults)
        self.hook = hook
        self.seen: list[Seen] = []
        """All requests so far."""
        self._random = random.Random(seed)
        self._matched = [0] * len(self.faults)
        self._hits = [0] * len(self.faults)
        self._lock = threading.Lock()

    def around(self, op: Op, key: str, size: int, run: Callable[[], T]) -> T:
        """Do it, unless a rule says how it goes wrong."""
        return self._carry_out(self._note(op, key), run)

    def _carry_out(self, seen: Seen, run: Callable[[], T]) -> T:
        if self.hook is not None:
            self.hook(seen, "before")
        if seen.fault in _ERRORS and seen.fault != "drop_reply":
            raise self._error(seen)
        result = run()
        if self.hook is not None:
            self.hook(seen, "after")
        if seen.fault == "drop_reply":
            raise self._error(seen)
        return result

    def get(
        self, key: str, start: int = 0, end: int | None = None, *, if_match: str | None = None, version_id: str | None = None
    ) -> tuple[ObjectMeta, Buffer]:
        """Bytes ``[start, end)`` (to the end of the object where `end` is None or beyond it). What is truncated or flipped is
        not told by an error."""
        seen = self._note("get", key)
        meta, data = self._carry_out(seen, lambda: self.inner.get(key, start, end, if_match=if_match, version_id=version_id))
        if seen.fault == "truncate":
            return meta, data[: len(data) // 2]
        return meta, self._flipped(data) if seen.fault == "flip" else data

    def read_into(self, key: str, start: int, buffer: memoryview, *, if_match: str | None = None) -> ObjectMeta:
        """Fill `buffer` (1-D, format ``B``, writable) with ``len(buffer)`` bytes from `start`. Truncated, it raises what an
        engine does that misses bytes."""
        seen = self._note("read", key)
        meta = self._carry_out(seen, lambda: self.inner.read_into(key, start, buffer, if_match=if_match))
        if seen.fault == "truncate":
            half = len(buffer) // 2
            buffer[half:] = bytes(len(buffer) - half)
            raise TruncatedError(f"{half} bytes came, not {len(buffer)}", op="read", url=f"{self.url}/{key}")
        if seen.fault == "flip":
            buffer[:] = self._flipped(buffer)
        return meta

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        mode: PutMode = "overwrite",
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> PutResult:
        """Write one object atomically: readers see the old one or the new one, whole."""
        seen = self._note("put", key)
        body = self._flipped(data) if seen.fault == "flip" else data
        return self._carry_out(
            seen, lambda: self.inner.put(key, body, mode=mode, content_type=content_type, metadata=metadata, **said(attributes))
        )

    def upload_part(self, key: str, upload_id: str, number: int, data: Buffer) -> PartResult:
        """Upload part `number` (1-based; all parts but the last at least 5 MiB on S3)."""
        seen = self._note("upload part", key)
        body = self._flipped(data) if seen.fault == "flip" else data
        return self._carry_out(seen, lambda: self.inner.upload_part(key, upload_id, number, body))

    def list(self, prefix: str = "", *, delimiter: str = "", start_after: str = "") -> Iterator[ObjectMeta | CommonPrefix]:
        """Entries whose key starts with `prefix`, in order of the UTF-8 bytes of their keys. Truncated, it breaks after half of
        the entries."""
        seen = self._note("list", prefix)
        entries = self._carry_out(seen, lambda: self.inner.list(prefix, delimiter=delimiter, start_after=start_after))
        return self._half(seen, [*entries]) if seen.fault == "truncate" else entries

    def _half(self, seen: Seen, entries: Sequence[ObjectMeta | CommonPrefix]) -> Iterator[ObjectMeta | CommonPrefix]:
        yield from entries[: len(entries) // 2]
        raise self._error(seen)

    def _note(self, op: Op, key: str) -> Seen:
        with self._lock:
            kind: FaultKind | None = None
            for i, fault in enumerate(self.faults):
                if fault.op not in (None, op) or fault.key not in key:
                    continue
                self._matched[i] += 1
                spent = fault.times is not None and self._hits[i] >= fault.times
                due = self._matched[i] == fault.nth if fault.nth is not None else self._random.random() < fault.probability
                if kind is None and due and not spent:
                    self._hits[i] += 1
                    kind = fault.kind
            seen = Seen(len(self.seen) + 1, op, key, kind)
            self.seen.append(seen)
            return seen

    def _error(self, seen: Seen) -> S3LoaderError:
        kind, why, status, code = _ERRORS.get(seen.fault or "", _ERRORS["reset"])
        error = kind(why + " (injected)", op=seen.op, url=f"{self.url}/{seen.key}", status=status, code=code)
        if seen.fault == "refused":
            error.details["sent"] = False
        return error

    def _flipped(self, data: Buffer) -> bytes:
        copy = bytearray(data)
        if copy:
            with self._lock:
                at = self._random.randrange(len(copy) * 8)
            copy[at // 8] ^= 1 << at % 8
        return bytes(copy)


# -- a store whose requests fail by rules, between its engine and our retries ----------------------


def open_faulty_store(
    url: Any,
    faults: Sequence[Fault] = (),
    *,
    seed: int = 0,
    hook: Callable[[Seen, Moment], None] | None = None,
    options: StoreOptions | None = None,
    **arguments: Any,
) -> tuple[ObjectStore, FaultBackend]:
    """Open `url` as `s3loader.open_store` does, with `faults` below the retries and above the engine.

        store, faults = open_faulty_store("memory://t", [Fault("drop_reply", op="put", nth=1)])
        store.put("k", b"x", mode="create")  # its answer was lost, and it is known to have happened
        assert [seen.fault for seen in faults.seen][0] == "drop_reply"

    Args:
        url: Any store.
        faults: Which requests fail, and how; the first rule that hits counts.
        seed: Of all chances.
        hook: Called before and after each request, e.g. to kill the process at request n.
        options: As for `open_store`; ``StoreOptions(max_attempts=1)`` lets every fault through.
        arguments: Passed on to `open_store`.

    Returns:
        The store, which cannot be pickled, and the backend that injects and records.
    """
    options = options or StoreOptions()
    plain = open_store(url, options=options, **arguments)
    faulty = FaultBackend(innermost(plain.backend), faults, seed=seed, hook=hook)
    return ObjectStore(plain.url, assemble(faulty, ObjectURL.parse(url), options), options=options), faulty
