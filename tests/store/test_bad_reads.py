"""Reads over a network that breaks, and answers that are odd: the right bytes, or one typed error."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
from bad_network import DATA, IMPATIENT, RANGED, READS, SILENCE, Open, in_time

from s3loader.errors import (
    ObjectChangedError,
    S3LoaderError,
    TruncatedError,
)
from s3loader.testing import Rule, ServerKind
from s3loader.types import ReadRequest

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.mark.parametrize("action", ["truncate", "reset", "stall", "refuse", "drop_reply"])
def test_a_read_that_breaks_once_is_whole_in_the_end(through: Open, action: Any) -> None:
    rule = Rule(action, method="GET", path="/k$", times=0)
    store, _, _ = through(rule, read_timeout=0.3 if action == "stall" else 300, max_attempts=8)
    for verb, read in READS.items():
        rule.times = rule.fired + 1
        assert in_time(lambda read=read: read(store)) == DATA, verb  # type: ignore[misc]
        assert rule.fired == rule.times


@pytest.mark.parametrize("action", ["truncate", "reset", "stall"])
def test_a_read_that_always_breaks_is_an_error(through: Open, action: Any) -> None:
    store, _, _ = through(Rule(action, method="GET", path="/k$"), **IMPATIENT)
    for verb in ("get", "pump", "threads", "read_into"):
        with pytest.raises(SILENCE) as caught:
            in_time(lambda verb=verb: READS[verb](store))  # type: ignore[misc]
        assert caught.value.url is not None
        assert caught.value.url.endswith("/k")
        assert caught.value.attempts == 2, verb
        assert caught.value.hint or isinstance(caught.value, TruncatedError), verb


ODD: dict[str, Rule] = {
    "chunked": Rule("chunked"),
    "no etag": Rule("rewrite", headers={"ETag": None}),
    "other range": Rule("rewrite", status=206, headers={"Content-Range": "bytes 4-9/2000000"}),
    "encoded": Rule("rewrite", headers={"Content-Encoding": "x-unknown"}),
    "short": Rule("rewrite", headers={"Content-Length": "7"}),
    "long": Rule("rewrite", headers={"Content-Length": "200000"}),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_answers_give_the_right_bytes_or_an_error(through: Open, what: str) -> None:
    """The direct engine takes one kind of answer; what it hands over must be as strict."""
    odd = ODD[what]
    store, _, _ = through(Rule(odd.action, method="GET", path="/k$", status=odd.status, headers=odd.headers), **IMPATIENT)
    # Of a whole object nothing else tells the size, so a length that is too short cannot be seen there.
    for verb, read in (RANGED if what in ("short", "long") else READS).items():
        found: Any = None
        with contextlib.suppress(S3LoaderError):
            found = in_time(lambda read=read: read(store))  # type: ignore[misc]
        assert found in (None, DATA), verb


@pytest.mark.parametrize("kind", ["ministack", "rclone"])
def test_an_object_that_changes_between_two_ranges(through: Open, engine: str, kind: ServerKind) -> None:
    """Also on a server that ignores If-Match: the ETag that came is checked."""
    first = Rule("hold_reply", method="GET", path="/k$", nth=1)
    second = Rule("hold", method="GET", path="/k$", nth=1)  # of those that the first rule leaves
    store, _, plain = through(first, second, kind=kind)
    outcome: list[Any] = []

    def read() -> None:
        try:
            outcome.append([bytes(data) for data in store.get_ranges("k", [(0, 10), (50_000, 50_010)], max_gap=0)])
        except BaseException as error:  # noqa: BLE001  looked at below
            outcome.append(type(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    assert first.reached.wait(600)
    assert second.reached.wait(600)
    plain.put("k", DATA[::-1])
    first.release.set()
    second.release.set()
    thread.join(600)
    assert not thread.is_alive()
    assert outcome == [ObjectChangedError]


def test_an_iterator_left_while_the_server_is_silent(through: Open) -> None:
    rule = Rule("hold", method="GET", path="/silent$")
    store, _, plain = through(rule, read_timeout=600, connect_timeout=600)
    plain.put("silent", DATA)
    before = set(threading.enumerate())
    requests = [ReadRequest("k", 0, len(DATA)), *(ReadRequest("silent", 0, len(DATA)) for _ in range(30))]
    results = store.read_many(requests, max_bytes=4 * len(DATA), concurrency=4, driver="threads")
    assert bytes(in_time(lambda: next(results)).data) == DATA
    assert rule.reached.wait(600)
    in_time(results.close)  # type: ignore[attr-defined]
    in_time(store.close)
    rule.release.set()
    ours = {thread for thread in threading.enumerate() if "fault-proxy" not in thread.name} - before
    for thread in ours:
        thread.join(600)
    assert not [thread for thread in ours if thread.is_alive()]
