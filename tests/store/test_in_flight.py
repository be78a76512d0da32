"""How many requests are under way follows the store: a simulated link, no clock of the machine."""

from __future__ import annotations

import heapq

import pytest

from s3loader.store.s3.in_flight import InFlight


class Link:
    """A store with a time to the first byte, a rate per connection, one for all, and a bound on requests per second."""

    def __init__(self, first: float, rate: float, total: float, most_per_second: float = 1e12) -> None:
        self.first, self.rate, self.total, self.most_per_second = first, rate, total, most_per_second
        self.now = 0.0
        self.flight = InFlight(clock=lambda: self.now)

    def move(self, count: int, size: int, *, most: int = 64, busy: float = 0.0) -> float:
        """Bytes per second over `count` requests; the caller works `busy` seconds on each."""
        began, ends = self.now, [0.0] * 0
        link_free = self.now
        token = self.now
        sent = done = moved = 0
        while done < count:
            while sent < count and len(ends) < min(most, self.flight.limit):
                token = max(token, self.now - 0.2)
                if token > self.now + 0.2:
                    self.flight.rejected()
                    heapq.heappush(ends, self.now + self.first)
                else:
                    token += 1 / self.most_per_second
                    link_free = max(link_free, self.now + self.first) + size / self.total
                    heapq.heappush(ends, max(self.now + self.first + size / self.rate, link_free))
                    moved += size
                sent += 1
            end = heapq.heappop(ends)
            waited = max(0.0, end - self.now)
            self.flight.waited(waited)
            self.now = max(self.now, end) + busy
            done += 1
            self.flight.completed(size, full=sent < count, most=most)
        return moved / (self.now - began)


def test_far_store_gets_all_connections() -> None:
    link = Link(first=0.025, rate=90e6, total=100e9)
    before = link.move(16, 1 << 20)
    link.move(2000, 1 << 20)
    assert link.flight.limit == 64
    assert link.move(2000, 1 << 20) > 2 * before


def test_small_objects_count_by_answers() -> None:
    link = Link(first=0.025, rate=90e6, total=100e9)
    link.move(3000, 4096)
    assert link.flight.limit == 64


def test_the_start_doubles_with_every_round() -> None:
    """From the first answer on: nobody waits for a round to be judged."""
    link = Link(first=0.025, rate=90e6, total=100e9)
    link.move(16, 1 << 20)
    assert link.flight.limit == 32
    link.move(32, 1 << 20)
    assert link.flight.limit == 64


def test_one_bad_round_does_not_end_the_start() -> None:
    """New connections have to be opened first, and a straggler may be among the answers."""
    link = Link(first=0.025, rate=90e6, total=100e9)
    link.move(16, 1 << 20)
    link.rate = 20e6
    link.move(32, 1 << 20)
    link.rate = 90e6
    link.move(600, 1 << 20)
    assert link.flight.limit == 64


def test_a_full_link_gets_no_more() -> None:
    link = Link(first=0.0002, rate=1e9, total=1e9)
    link.move(5000, 1 << 20)
    assert link.flight.limit <= 24
    assert "no more than" in link.flight.why


def test_what_is_expected_begins_at_once_unless_the_store_has_refused() -> None:
    link = Link(first=0.025, rate=90e6, total=100e9)
    link.flight.expect(4)
    assert link.flight.limit == 16
    link.flight.expect(64)
    assert link.flight.limit == 64
    assert link.move(64, 16 << 20) > 0.9 * 64 * (16 << 20) / (0.025 + (16 << 20) / 90e6)  # one round
    link.flight.rejected()
    link.flight.expect(64)
    assert link.flight.limit == 32


def test_what_is_known_to_be_sent_does_not_fall_back_to_the_start() -> None:
    """A save whose last parts find nothing behind them says nothing of the network."""
    flight = InFlight(start=64)
    for left in reversed(range(64)):
        flight.completed(16 << 20, full=left > 0, most=64)
    assert flight.limit == 64


def test_bytes_follow_the_connections() -> None:
    mib = 1 << 20
    link = Link(first=0.025, rate=90e6, total=100e9)
    assert [link.flight.room(most) for most in (mib, 64 * mib, 256 * mib)] == [mib, 64 * mib, 128 * mib]
    link.move(2000, mib)
    assert link.flight.room(256 * mib) == 256 * mib
    link.flight.limit = 1
    assert link.flight.room(256 * mib) == 64 * mib


def test_a_busy_caller_changes_nothing() -> None:
    link = Link(first=0.025, rate=90e6, total=100e9)
    link.move(2000, 1 << 20, busy=0.02)
    assert link.flight.limit == 16


def test_a_callers_bound_is_kept() -> None:
    link = Link(first=0.025, rate=90e6, total=100e9)
    link.move(2000, 1 << 20, most=20)
    assert link.flight.limit <= 20


@pytest.mark.parametrize("most_per_second", [50.0, 400.0])
def test_a_store_that_throttles_is_asked_less_and_recovers(most_per_second: float) -> None:
    link = Link(first=0.025, rate=90e6, total=100e9)
    link.move(2000, 1 << 20)
    link.most_per_second = most_per_second
    link.move(4000, 1 << 20)
    assert link.flight.throttled
    assert link.flight.limit < 64
    throttled, link.most_per_second = link.flight.limit, 1e12
    link.move(20_000, 1 << 20)
    assert link.flight.limit >= max(32, throttled)


@pytest.mark.parametrize("together", [1, 3, 8])
def test_completions_may_be_told_together(together: int) -> None:
    """At the start the limit grows by one for each, however many are told at once, and never above the driver's bound."""
    now = 0.0
    flight = InFlight(clock=lambda: now)
    told = 0
    while flight.limit < 64:
        before = flight.limit
        flight.waited(0.025)
        now += 0.025
        flight.completed(together << 20, full=together, most=64, count=together)
        told += together
        assert flight.limit == min(64, before + together)
    assert told >= 64 - 16
    flight.completed(together << 20, full=together, most=64, count=together)
    assert flight.limit <= 64
