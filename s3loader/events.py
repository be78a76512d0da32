"""The one hook everything observes through: op-log, stats and progress are subscribers.

With no subscriber an operation pays one truth test (``if events.active():``).
A subscriber that raises never breaks I/O: it is logged once and removed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Hook", "OpEvent", "active", "emit", "subscribe"]

_log = logging.getLogger("s3loader.events")


@dataclass(frozen=True, slots=True)
class OpEvent:
    """One finished attempt at one operation. Never holds a credential."""

    op: str
    """``GET PUT HEAD LIST DELETE COPY PUTPART MULTIPART RETRY WAIT RESUME ...``; of ``RESUME``, bytes that need not be sent."""
    url: str
    bytes: int
    """Body bytes moved."""
    start: float
    """`time.perf_counter` seconds."""
    end: float
    first_byte: float | None = None
    engine: str = ""
    attempt: int = 1
    status: int | None = None
    error: str | None = None
    """The error's type name and message; None on success."""
    objects: int = 1
    """How many objects it concerns: the keys of a bulk delete, the entries of a page of a listing."""
    offset: int | None = None
    """Of a read: the first byte asked for."""
    endpoint: str = ""
    """``http(s)://host[:port]``, where the engine knows it."""


Hook: TypeAlias = Callable[[OpEvent], None]
_hooks: tuple[Hook, ...] = ()
now = time.perf_counter


def active() -> bool:
    """Whether anybody listens."""
    return bool(_hooks)


def subscribe(hook: Hook) -> Callable[[], None]:
    """Call `hook` with every event of this process; returns the function that ends it."""
    global _hooks
    _hooks = (*_hooks, hook)

    def unsubscribe() -> None:
        global _hooks
        _hooks = tuple(h for h in _hooks if h is not hook)

    return unsubscribe


def emit(event: OpEvent) -> None:
    """Give `event` to every subscriber."""
    global _hooks
    for hook in _hooks:
        try:
            hook(event)
        except Exception:  # noqa: BLE001 - an observer must not break what it observes
            _log.exception("an event subscriber failed and was removed: %r", hook)
            _hooks = tuple(h for h in _hooks if h is not hook)
