"""How many requests are under way at a time, and when one is asked for again: measured, not configured. Pure, but for a lock.

Near a store a few connections saturate it; far from it each waits most of the time for the first
byte, and a link is full only with many. Nobody knows beforehand, so it is tried: while whoever asked
waits for the network and every connection has work, more are added; if the bytes (or answers) per
second grew by at least a part of that, so it stays and the next step is tried, else the step is taken
back and tried again much later. A store that says "slow down" is believed at once.

Rules, enough to build it again. A *round* is as many completed requests as the limit at its start. Its
rate is bytes per second; for requests below 64 KiB, answers per second. At the start each completed
request adds one to the limit, up to the most, so that it doubles with every round (not where the first
byte comes within 2 ms: there 16 are enough, and 64 cost the processor's cache); from the first
round on that does not pay, a step multiplies it by 1.5. A round pays where its rate is at least 1.15
times that of the last round with a lower limit. After two in a row that do not, the limit goes back, and 8
rounds pass until the next step, then 16, 32 and 64. A rejection halves the limit once a round and
counts as a step that did not pay. Rounds in which the caller waited less than 30 % of the time, or in
which work or room for bytes was short, prove nothing, and the former add nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Final

from s3loader.units import KIB, MIB

__all__ = ["Hedges", "InFlight"]

_START: Final = 16
_STEP: Final = 1.5
_PAYS: Final = 1.15
_WAITED: Final = 0.3
_FULL: Final = 0.5
_HOLD: Final = 8
_LONGEST_HOLD: Final = 64
_SMALL: Final = 64 * KIB
_ROOM_EACH: Final = 8 * MIB
_LEAST_ROOM: Final = 64 * MIB


class InFlight:
    """The limit of one endpoint, shared by all drivers of a process; safe to use from several threads.

    Args:
        clock: Seconds, for tests.
        start: The limit to begin with.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, start: int = _START) -> None:
        self.limit = start
        """Requests that may be under way at a time; a driver's own bound may be lower."""
        self.why = "the start"
        """What the limit goes back to, in words for people."""
        self.throttled = 0
        """Answers that said "slow down"."""
        self._clock = clock
        self._lock = threading.Lock()
        self._before: tuple[int, float] | None = None
        """Limit and rate before the step that is being tried."""
        self._hold, self._next_hold = 0, _HOLD
        self.starting = True
        """No step was in vain yet: what is completed adds to the limit."""
        self._doubted = False
        """The step that is being tried had one round that did not pay."""
        self._begin()

    def _begin(self) -> None:
        self._round = self.limit
        self._began = self._clock()
        self._count = self._bytes = self._full = 0
        self._waited = 0.0
        self._rejected = False

    def room(self, max_bytes: int) -> int:
        """Bytes of lent memory that may be under way or not yet taken, of the `max_bytes` that the caller allows: as
        connections grow, so do they. 8 MiB for each connection, and at least 64 MiB."""
        return max(min(max_bytes, _LEAST_ROOM), min(max_bytes, self.limit * _ROOM_EACH))

    def expect(self, count: int) -> None:
        """So many large requests are going to come at once: the limit is at least that from now on. Not where the store has
        ever said that it gets too many."""
        with self._lock:
            if count > self.limit and not self.throttled:
                self.limit, self.why = count, f"{count} requests were expected at once"
                self._before, self._doubted = None, False
                self._begin()

    def waited(self, seconds: float) -> None:
        """Whoever asked had nothing to do for so long but to wait for a result."""
        self._waited += seconds

    def completed(self, size: int, *, full: int, most: int, count: int = 1, near: bool = False) -> None:
        """Requests are done.

        Args:
            size: Bytes that they moved.
            full: For how many of them there was a next request, and room for it.
            most: The driver's own bound.
            count: How many they are.
            near: The first byte comes so soon (`Hedges.near`) that a round is judged before more connections could pay: they
                are tried in steps only.
        """
        with self._lock:
            self._count += count
            self._bytes += size
            self._full += full
            if self.starting and not near and not self._doubted and self.limit < most:
                self.limit = min(most, self.limit + count)
            if self._count >= min(self._round, most):
                self._judge(most)

    def rejected(self) -> None:
        """The store said that it gets too many requests."""
        with self._lock:
            self.throttled += 1
            if self._rejected:
                return
            self.limit = max(1, self.limit // 2)
            self.why = "the store said slow down"
            self._wait_longer()
            self._begin()
            self._rejected = True

    def _judge(self, most: int) -> None:
        elapsed = max(1e-9, self._clock() - self._began)
        small = self._bytes < self._count * _SMALL
        rate = (self._count if small else self._bytes) / elapsed
        waited = self._waited >= _WAITED * elapsed
        telling = waited and self._full >= _FULL * self._count
        limit = self._round
        if self.starting and not waited:  # whoever asks is slower than the network: what was added waits as well
            self.limit = limit
        self._begin()
        if not telling:
            return
        if self._before is not None:
            before, old = self._before
            self._before = None
            if rate < _PAYS * old and not self._doubted:
                self._doubted, self._before = True, (before, old)  # new connections had to be opened: the next round has none
                return
            if rate < _PAYS * old:
                self.limit, self.why = before, f"{limit} brought no more than {before}"
                self._wait_longer()
                return
            self.why = f"{rate / old:.1f} times as much as with {before}"
            self._doubted = False
            self._next_hold = _HOLD
        if self.starting:
            self.starting = limit < most
            if self.starting:
                self._before = (limit, rate)
        elif self._hold:
            self._hold -= 1
        elif self.limit < most:
            self._before = (self.limit, rate)
            self.limit = self._round = min(most, max(self.limit + 1, int(self.limit * _STEP)))

    def _wait_longer(self) -> None:
        self.starting = self._doubted = False
        self._before = None
        self._round = self.limit
        self._hold = self._next_hold
        self._next_hold = min(_LONGEST_HOLD, 2 * self._next_hold)


# -- stragglers ------------------------------------------------------------------------------------

_FEW: Final = 4
"""First bytes after which something is known of them."""
_SOME: Final = 16
"""First bytes after which the delay is computed, and computed again."""
_KEPT: Final = 64
_TIMES: Final = 4.0
_SHARP: Final = 2.0
_LEAST: Final = 0.02
_NEAR: Final = 0.002
_EARNED: Final = 0.02
_EARNED_WINNING: Final = 0.1
_MOST_TOKENS: Final = 16.0
_SHORTEST_LOOK: Final = 0.005
_LONGEST_LOOK: Final = 0.05
_URGENT: Final = 4.0
_MOST_DEBT: Final = 8.0
_MEMORY: Final = 0.1
"""Weight of the last outcome in the share of second requests that came first."""


class Hedges:
    """When a read is asked for once more because its answer takes unusually long: measured, and within a budget.

    Dean and Barroso, "The Tail at Scale", CACM 2013. A straggler is a request without a first byte after four times the first
    quartile of the last first bytes: that is what one takes which nothing, such as our own work, holds up. Where all take
    nearly as long as each other, twice what nineteen in twenty take is less, and enough; below 20 ms none is a straggler. The
    second request costs a token; each request earns two hundredths of one, and a tenth of one while most second requests come
    first: then it is the store that has stragglers, and not the network that is full. What has waited four times as long
    again, as on a connection that is dead, may borrow a few tokens.

    One thread at a time uses it; what several do at once may be miscounted, no more.
    """

    def __init__(self) -> None:
        self.delay = math.inf
        """Seconds without a first byte after which a request is a straggler."""
        self.usual = 0.0
        """Seconds to the first byte: the first quartile; 0: unknown."""
        self.asked = 0
        """Second requests so far."""
        self.won = 0
        """Those that came first."""
        self.sent = 0
        """Requests that were sent: whoever sends one counts it here."""
        self._earned = 0
        """Of them, those that were turned into tokens."""
        self._winning = 0.5
        self._tokens = 1.0
        self._times: list[float] = []
        self._new = 0

    def first_byte(self, seconds: float) -> None:
        """So long after a request was sent its answer began."""
        times = self._times
        times.append(seconds)
        self._new += 1
        if self._new < (_SOME if self.usual else _FEW):
            return
        ordered = sorted(times)
        self.usual = ordered[len(times) // 4]
        if len(times) >= _SOME:
            self._new = 0
            del times[:-_KEPT]
            self.delay = max(_LEAST, min(_TIMES * self.usual, _SHARP * ordered[len(ordered) * 19 // 20]))

    @property
    def near(self) -> bool:
        """Whether the first byte is known to come at once."""
        return 0 < self.usual < _NEAR

    @property
    def interval(self) -> float:
        """Seconds between two looks for stragglers."""
        return max(_SHORTEST_LOOK, min(_LONGEST_LOOK, self.delay / 4))

    def may_ask(self, waited: float) -> bool:
        """Whether the budget has room for a second request for what has waited so many seconds; takes it."""
        earned = (self.sent - self._earned) * (_EARNED_WINNING if self._winning >= 0.5 else _EARNED)
        self._tokens, self._earned = min(_MOST_TOKENS, self._tokens + earned), self.sent
        if self._tokens < 1 and (waited < _URGENT * self.delay or self._tokens < 1 - _MOST_DEBT):
            return False
        self._tokens -= 1
        self.asked += 1
        return True

    def settled(self, won: bool) -> None:
        """A second request came first, or did not."""
        self.won += won
        self._winning += _MEMORY * (won - self._winning)
