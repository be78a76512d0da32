"""A bulk call that is left: by its consumer, by Ctrl-C, by a fork; nothing goes on behind it."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from bulk_helpers import bulk_threads, make, wait_until
from forking import in_child

from s3loader.errors import (
    ClosedError,
)
from s3loader.store import ObjectStore, Pipeline, RetryPolicy
from s3loader.store.ordered import pause
from s3loader.testing import Fault, Moment, Seen, Server, ServerKind
from s3loader.types import ReadRequest


def test_an_abandoned_iterator_stops_its_threads() -> None:
    store, broken = make()
    store.put("k", bytes(1000))
    for leave in ("close", "del"):
        results: Any = store.get_many(["k"] * 1000, max_bytes=10_000, concurrency=4, driver="threads")
        next(results)
        assert bulk_threads() > 0
        if leave == "close":
            results.close()
        del results
        gc.collect()
        assert wait_until(lambda: bulk_threads() == 0)
    assert len(broken.seen) < 200


@pytest.mark.parametrize("engine", ["direct", "memory"])
def test_ctrl_c_while_a_thread_is_being_started_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch, servers: Callable[[ServerKind], Server], engine: str
) -> None:
    """The thread ends by itself; that it cannot be waited for yet must not hide the interrupt."""
    store = make()[0] if engine == "memory" else servers("moto").open_store(servers("moto").bucket())
    store.put("k", b"x")
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name.startswith("s3loader-"):
            raise KeyboardInterrupt
        start(thread)

    with store:
        results = store.get_many(["k"] * 8, concurrency=2, driver="threads")
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(results)
        monkeypatch.undo()
        assert [bytes(result.data) for result in store.get_many(["k"] * 8, concurrency=2, driver="threads")] == [b"x"] * 8


def test_leaving_does_not_wait_for_a_slow_request() -> None:
    """What is on the wire cannot be called back; it is left to end by itself."""
    release = threading.Event()
    stuck = threading.Event()

    def hold(seen: Seen, moment: Moment) -> None:
        if seen.key == "slow" and moment == "before":
            stuck.set()
            release.wait(600)

    store, _ = make(hook=hold)
    store.put("k", b"x")
    results = store.get_many(["k", "slow"], concurrency=2, driver="threads")
    next(results)
    assert stuck.wait(600)
    results.close()  # type: ignore[attr-defined]
    assert not release.is_set()
    assert bulk_threads() >= 1
    release.set()
    assert wait_until(lambda: bulk_threads() == 0)


def test_a_thread_that_waits_to_retry_is_called_out_of_it() -> None:
    _, broken = make(Fault("unavailable", op="get", key="bad", times=None))
    waiting = threading.Event()

    def sleep(seconds: float) -> None:
        waiting.set()
        pause(3600)

    store = ObjectStore("memory://", Pipeline(broken, retry=RetryPolicy(sleep=sleep)))
    store.put("k", b"x")
    results: Any = store.get_many(["k", "bad"], concurrency=2, driver="threads")
    next(results)
    assert waiting.wait(600)
    results.close()
    assert wait_until(lambda: bulk_threads() == 0)


@pytest.mark.parametrize("driver", ["threads", "pump"])
def test_ctrl_c_ends_a_call_within_a_second(driver: str) -> None:
    code = """
        import os, sys, time
        from s3loader.store import ObjectStore
        from s3loader.testing.fault_backend import FaultBackend
        from s3loader.store.memory import MemoryBackend
        def hold(seen, moment):
            if seen.op == "get":
                os.write(1, b"stuck\\n")  # print writes the newline by itself: threads mixed them
                time.sleep(3600)
        store = ObjectStore("memory://", FaultBackend(MemoryBackend("x"), hook=hold))
        store.put("k", b"x")
        try:
            list(store.get_many(["k"] * 5, driver=sys.argv[1]))
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), driver], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "stuck\n"
        child.send_signal(signal.SIGINT)
        assert "interrupted" in child.stdout.read()
        assert child.wait(600) == 0
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_a_forked_child_cannot_go_on() -> None:
    store, _ = make()
    store.put("k", b"x")
    results = store.get_many(["k"] * 100, max_bytes=10, driver="threads", concurrency=2)
    next(results)

    def refused() -> None:
        with pytest.raises(ClosedError):
            list(results)

    in_child(refused)
    assert len(list(results)) == 99


def test_the_source_is_not_read_to_its_end() -> None:
    store, _ = make()
    store.put("k", bytes(100))
    drawn = 0

    def endless() -> Iterator[ReadRequest]:
        nonlocal drawn
        while True:
            drawn += 1
            yield ReadRequest("k", 0, 100)

    results = store.read_many(endless(), max_bytes=1000, concurrency=2, driver="threads")
    for _ in range(5):
        next(results)
    results.close()  # type: ignore[attr-defined]
    assert drawn <= 5 + 1000 // 100 + 1
