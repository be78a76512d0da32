"""Reads whose answers do not begin are asked for once more, within a budget, and the first answer counts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3loader import StoreOptions, events
from s3loader.store.s3.in_flight import Hedges
from s3loader.testing import FaultProxy, Rule, Server, recorded, server
from s3loader.types import ReadRequest


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with server("moto") as running:
        yield running


COUNT = 120
SIZE = 1000


def fill(s3: Server) -> str:
    bucket = s3.bucket()
    with s3.open_store(bucket) as store:
        store.put("data", b"".join(i.to_bytes(4, "big") * (SIZE // 4) for i in range(COUNT)))
    return bucket


def ranges() -> list[ReadRequest]:
    return [ReadRequest("data", i * SIZE, (i + 1) * SIZE) for i in range(COUNT)]


def test_an_answer_that_never_comes_holds_nobody_up(s3: Server) -> None:
    bucket = fill(s3)
    stuck = [Rule("hold", method="GET", path="/data", nth=nth) for nth in (40, 55, 90)]
    with FaultProxy(s3.endpoint_url, stuck) as proxy, s3.open_store(bucket, endpoint_url=proxy.endpoint_url) as store:
        seen: list[events.OpEvent] = []
        stop = events.subscribe(seen.append)
        try:
            found = [bytes(answer.data) for answer in store.read_many(ranges(), driver="pump")]
        finally:
            stop()
        assert found == [i.to_bytes(4, "big") * (SIZE // 4) for i in range(COUNT)]
        assert [rule.fired for rule in stuck] == [1, 1, 1]
        assert proxy.count("GET", "/data") >= COUNT + 3
    reads = [event for event in seen if event.op == "GET"]
    assert sum(event.error is None for event in reads) == COUNT  # each delivered range once
    assert sum((event.error or "").startswith("Hedged") for event in reads) >= 3


@pytest.mark.parametrize("driver", ["pump", "threads"])
def test_an_answer_that_never_comes_to_the_callers_memory_holds_nobody_up(
    s3: Server, driver: Literal["pump", "threads"]
) -> None:
    bucket = fill(s3)
    stuck = [Rule("hold", method="GET", path="/data", nth=nth) for nth in (60, 85, 110)]
    rules = [*stuck, Rule("delay", method="GET", path="/data", seconds=0.01)]
    memory = bytearray(COUNT * SIZE)
    requests = [
        ReadRequest("data", i * SIZE, (i + 1) * SIZE, into=memoryview(memory)[i * SIZE : (i + 1) * SIZE], tag=i)
        for i in range(COUNT)
    ]
    with (
        FaultProxy(s3.endpoint_url, rules) as proxy,
        s3.open_store(bucket, endpoint_url=proxy.endpoint_url) as store,
        recorded() as seen,
    ):
        answers = list(store.read_many(requests, driver=driver, concurrency=32))
        assert [answer.request.tag for answer in answers] == list(range(COUNT))
        assert all(answer.data == memory[i * SIZE : (i + 1) * SIZE] for i, answer in enumerate(answers))
        assert memory == b"".join(i.to_bytes(4, "big") * (SIZE // 4) for i in range(COUNT))
        assert [rule.fired for rule in stuck] == [1, 1, 1]
    reads = [event for event in seen if event.op == "GET"]
    assert sum(event.error is None for event in reads) == COUNT
    assert sum((event.error or "").startswith("Hedged") for event in reads) >= 3


def test_requests_that_are_left_under_way_have_an_event_too(s3: Server) -> None:
    bucket = fill(s3)
    stuck = Rule("hold", method="GET", path="/data", nth=3)
    with FaultProxy(s3.endpoint_url, [stuck]) as proxy, s3.open_store(bucket, endpoint_url=proxy.endpoint_url) as store:
        seen: list[events.OpEvent] = []
        stop = events.subscribe(seen.append)
        try:
            answers = store.read_many(ranges(), driver="pump", concurrency=4)
            next(answers)
            stuck.reached.wait(60)
            answers.close()
        finally:
            stop()
        # connections are opened side by side, so the one that is stuck may be the first: then it was asked for once more
        assert sum((event.error or "").startswith(("Abandoned", "Hedged")) for event in seen) >= 1
        assert len([event for event in seen if event.op == "GET"]) >= proxy.count("GET", "/data")


def test_who_does_not_want_it_gets_each_request_once(s3: Server) -> None:
    bucket = fill(s3)
    options = StoreOptions(hedge_reads=False)
    rule = Rule("delay", method="GET", path="/data", nth=60, seconds=1.0)
    with (
        FaultProxy(s3.endpoint_url, [rule]) as proxy,
        s3.open_store(bucket, endpoint_url=proxy.endpoint_url, options=options) as store,
    ):
        found = [bytes(answer.data) for answer in store.read_many(ranges(), driver="pump")]
        assert len(found) == COUNT
        assert rule.fired == 1
        assert proxy.count("GET", "/data") == COUNT


def test_nothing_is_known_before_some_answers_came() -> None:
    hedges = Hedges()
    for _ in range(15):
        hedges.first_byte(0.02)
    assert hedges.delay == float("inf")
    hedges.first_byte(0.02)
    assert hedges.delay == pytest.approx(0.04)


@given(st.lists(st.floats(0.0001, 3.0), min_size=16, max_size=200))
def test_a_straggler_is_told_by_what_the_others_take(times: list[float]) -> None:
    """Never later than four times the first quartile, never before 20 ms, and never for more than one of the known ones in
    twenty where they are near each other."""
    hedges = Hedges()
    for seconds in times[: len(times) // 16 * 16]:
        hedges.first_byte(seconds)
    assert 0.02 <= hedges.delay <= max(0.02, 4 * hedges.usual)
    if hedges.delay < 4 * hedges.usual:
        last = times[: len(times) // 16 * 16][-64:]
        assert sum(seconds > hedges.delay for seconds in last) <= len(last) / 20 + 1


def test_where_answers_differ_much_nothing_is_asked_for_earlier_than_before() -> None:
    hedges = Hedges()
    for i in range(64):
        hedges.first_byte(0.02 if i % 4 else 0.06)
    assert hedges.delay == pytest.approx(0.08)


@pytest.mark.parametrize(("wins", "most"), [(True, 0.1), (False, 0.02)])
def test_the_budget_holds_whatever_happens(wins: bool, most: float) -> None:
    hedges, rng = Hedges(), random.Random(3)
    requests = 20_000
    for _ in range(requests):
        hedges.sent += 1
        if rng.random() < 0.5 and hedges.may_ask(0.1):
            hedges.settled(wins)
    assert hedges.asked <= most * requests + 30
    assert hedges.asked >= 0.9 * most * requests
    assert hedges.won == (hedges.asked if wins else 0)


def test_what_waits_very_long_may_borrow_a_little() -> None:
    hedges = Hedges()
    for _ in range(16):
        hedges.first_byte(0.02)
    assert [hedges.may_ask(0.1) for _ in range(3)] == [True, False, False]
    assert sum(hedges.may_ask(1.0) for _ in range(100)) == 8
