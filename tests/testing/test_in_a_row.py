"""The counter of requests in a row: laws on made-up events, and a real store behind a delay."""

from __future__ import annotations

import itertools
import threading

from hypothesis import given
from hypothesis import strategies as st

from s3loader import events
from s3loader.events import OpEvent
from s3loader.testing import FaultProxy, Rule, in_a_row, recorded, server


def event(start: float, end: float, op: str = "GET") -> OpEvent:
    return OpEvent(op, "s3://b/k", 0, start, end)


spans = st.tuples(st.integers(0, 30), st.integers(0, 6)).map(lambda s: (s[0], s[0] + s[1] + 1))


@given(st.lists(spans, max_size=8))
def test_it_is_the_longest_chain(found: list[tuple[int, int]]) -> None:
    def longest(after: float) -> int:
        return max((1 + longest(end) for start, end in found if start >= after), default=0)

    chain = in_a_row([event(*span) for span in found])
    assert len(chain) == longest(0)
    assert all(one.end <= two.start for one, two in itertools.pairwise(chain))


def test_waits_are_no_requests() -> None:
    assert len(in_a_row([event(0, 1), event(1, 2, "WAIT"), event(2, 3, "RETRY"), event(3, 4)])) == 2
    assert in_a_row([]) == []


def test_what_is_asked_side_by_side_counts_once() -> None:
    with server("moto") as s3, FaultProxy(s3.endpoint_url, [Rule("delay", seconds=0.3)]) as proxy:
        store = s3.open_store(s3.bucket(), endpoint_url=proxy.endpoint_url)
        store.put("a", b"1")
        with recorded() as found:
            threads = [threading.Thread(target=store.get, args=("a",)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            store.get("a")
        assert len(found) == 5
        assert len(in_a_row(found)) == 2
        store.close()
    assert not events.active()
