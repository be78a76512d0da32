"""What goes wrong between a client and a server, as rules: pure, seeded, counted."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, get_args
from urllib.parse import unquote

from s3loader.errors import ConfigError

__all__ = ["FaultAction", "Plan", "Request", "Rule"]

FaultAction: TypeAlias = Literal[
    "refuse",
    "delay",
    "hold",
    "hold_reply",
    "drop_reply",
    "duplicate",
    "error",
    "truncate",
    "reset",
    "stall",
    "flip",
    "flip_request",
    "rate",
    "rewrite",
    "chunked",
]
"""
==============  =====================================================================================
refuse          close the connection; the server never sees the request
delay           wait `seconds` before the request is forwarded, as a distant store would
hold            wait for `Rule.release` before the request is forwarded
hold_reply      forward, then wait for `Rule.release` before the reply is sent
drop_reply      forward, then close the connection instead of answering: a lost acknowledgement
duplicate       forward twice; the client gets the first answer
error           answer `status`, `code` as S3 does, without forwarding (or after it: `forward`);
                with status 200 the error is in the body, as S3 may do when it completes or copies
truncate        send the head and `at` bytes of the body, then close
reset           the same, then reset the connection
stall           the same, then send nothing more until `Rule.release`
flip            flip bit `bit` of the body
flip_request    flip bit `bit` of the request's body before it is forwarded
rate            send the body at `bytes_per_second`
rewrite         change the reply's `headers` (None removes one) and, where given, its `status`
chunked         send the body with Transfer-Encoding: chunked, without a Content-Length
==============  =====================================================================================
"""

_MESSAGES: Final = {
    "SlowDown": "Please reduce your request rate.",
    "InternalError": "We encountered an internal error. Please try again.",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One request the proxy saw, and what became of it. Holds no signature."""

    method: str
    path: str
    """``/bucket/key``, percent-decoded, without the query."""
    query: str = ""
    """As it came, without the ``?``."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Names in lower case, without ``authorization``."""
    sent: int = 0
    """Bytes of the request's body."""
    status: int | None = None
    """What the client was answered; None while nothing was."""
    received: int = 0
    """Bytes of the reply's body that were sent to the client."""
    fault: FaultAction | None = None

    @property
    def range(self) -> tuple[int, int | None] | None:
        """``[start, end)`` of a ``Range: bytes=a-b`` header; `end` None for an open one."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if match is None:
            return None
        return int(match[1]), int(match[2]) + 1 if match[2] else None


@dataclass(eq=False)
class Rule:
    """One fault, and the requests it strikes.

    All conditions must hold: `method` (any where empty), `path` (a regular expression searched
    in ``/bucket/key?query``), then `nth` (only the nth such request, 1-based), `times` (at most so
    often) and `probability` (drawn from the proxy's seed).
    """

    action: FaultAction
    method: str = ""
    path: str = ""
    nth: int | None = None
    times: int | None = None
    probability: float = 1.0
    status: int | None = None
    """For ``error``: 500 unless given."""
    code: str = "InternalError"
    body: bytes | None = None
    """For ``error``: the whole body, in place of S3's XML with `code`."""
    forward: bool = False
    at: int | None = None
    """Bytes of the body that still come; half of it where None."""
    bit: int | None = None
    """Bit number in the body; drawn from the seed where None."""
    bytes_per_second: int = 1 << 20
    seconds: float = 0.1
    headers: Mapping[str, str | None] = field(default_factory=dict)
    seen: int = field(default=0, init=False)
    """Requests that matched method and path."""
    fired: int = field(default=0, init=False)
    """Requests this rule struck."""
    reached: threading.Event = field(default_factory=threading.Event, init=False, repr=False)
    """Set when the rule strikes; for ``hold``, ``hold_reply`` and ``stall`` when it waits."""
    release: threading.Event = field(default_factory=threading.Event, init=False, repr=False)
    """Set it to let what is held go on."""

    def __post_init__(self) -> None:
        if self.action not in get_args(FaultAction):
            raise ConfigError(f"unknown fault {self.action!r}", hint=f"use one of {', '.join(get_args(FaultAction))}")
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"a probability lies between 0 and 1, not {self.probability}")
        re.compile(self.path)

    def error_body(self, path: str) -> bytes:
        """`body`, or the XML that S3 answers an error with."""
        if self.body is not None:
            return self.body
        message = _MESSAGES.get(self.code, "A fault that a test asked for.")
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{self.code}</Code><Message>{message}</Message>"
            f"<Resource>{path.replace('&', '&amp;').replace('<', '&lt;')}</Resource><RequestId>FAULT</RequestId></Error>"
        ).encode()


class Plan:
    """The rules of one proxy; decides for each request, in the order they come."""

    def __init__(self, rules: Iterable[Rule], seed: int = 0) -> None:
        self.rules = list(rules)
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def strike(self, method: str, target: str) -> Rule | None:
        """The first rule that strikes this request, if any."""
        path, _, query = target.partition("?")
        text = f"{unquote(path)}?{query}" if query else unquote(path)
        with self._lock:
            return next((rule for rule in self.rules if self._strikes(rule, method, text)), None)

    def _strikes(self, rule: Rule, method: str, text: str) -> bool:
        if (rule.method and rule.method != method) or re.search(rule.path, text) is None:
            return False
        rule.seen += 1
        if rule.nth is not None and rule.seen != rule.nth:
            return False
        if rule.times is not None and rule.fired >= rule.times:
            return False
        if rule.probability < 1 and self._random.random() >= rule.probability:
            return False
        rule.fired += 1
        return True

    def draw(self, below: int) -> int:
        """A number in ``[0, below)`` from the plan's seed."""
        with self._lock:
            return self._random.randrange(below)
