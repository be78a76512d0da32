"""Bulk reads and writes by threads, in place, and through an engine's own bulk verbs."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader.errors import (
    ClosedError,
    ConfigError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    RangeError,
    S3LoaderError,
    UnavailableError,
)
from s3loader.store import ObjectStore, open_store
from s3loader.store.base import ReadResult
from s3loader.store.bulk import PutFailure, ReadFailure
from s3loader.store.fault import Fault, FaultBackend, Moment, Seen
from s3loader.store.limit import LimitBackend
from s3loader.store.memory import MemoryBackend
from s3loader.store.ordered import run_ordered
from s3loader.store.prefix import PrefixBackend
from s3loader.store.retry import RetryBackend
from s3loader.store.threads import pause
from s3loader.types import Buffer, ObjectMeta, PutRequest, PutResult, ReadRequest

DRIVERS = ("pump", "threads", "auto")


def make(*faults: Fault, hook: Callable[[Seen, Moment], None] | None = None) -> tuple[ObjectStore, FaultBackend]:
    broken = FaultBackend(MemoryBackend(uuid.uuid4().hex), faults, hook=hook)
    return ObjectStore(broken.url, broken), broken


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def bulk_threads() -> int:
    return sum(thread.name.startswith(("s3loader-read", "s3loader-put")) for thread in threading.enumerate())


class Engine(MemoryBackend):
    """An engine with bulk verbs of its own; keys that begin with "!" fail there as often as `failures` says."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.failures: dict[str, list[BaseException]] = {}
        self.bulk = 0
        self.closed = 0

    def read_outcomes(self, requests: Iterable[ReadRequest], **_: Any) -> Iterator[ReadResult | BaseException]:
        return self._outcomes(requests, self._read)

    def put_outcomes(self, requests: Iterable[PutRequest], **_: Any) -> Iterator[PutResult | BaseException]:
        return self._outcomes(requests, lambda r: self.put(r.key, r.data))

    def _read(self, request: ReadRequest) -> ReadResult:
        meta, data = self.get(request.key, request.start, request.end, if_match=request.if_match)
        return ReadResult(request, memoryview(data), meta.etag, meta.size)

    def _outcomes(self, requests: Iterable[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
        try:
            for request in requests:
                self.bulk += 1
                waiting = self.failures.get(request.key)
                if waiting:
                    yield waiting.pop(0)
                    continue
                try:
                    yield work(request)
                except S3LoaderError as error:
                    yield error
        finally:
            self.closed += 1


# -- order, errors, bounds ------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 200), max_size=30),
    order=st.randoms(use_true_random=False),
    max_bytes=st.integers(1, 1000),
    concurrency=st.integers(1, 6),
    driver=st.sampled_from(DRIVERS),
    broken=st.sets(st.integers(0, 29)),
)
def test_results_keep_the_order(
    sizes: list[int], order: random.Random, max_bytes: int, concurrency: int, driver: Any, broken: set[int]
) -> None:
    """Duplicates, gaps, objects larger than the bound: what comes is what was asked for, in place."""
    store, _ = make()
    data = {f"{i}": bytes([i]) * size for i, size in enumerate(sizes)}
    for key, value in data.items():
        store.put(key, value)
    keys = [order.choice(["missing", *data]) if i in broken else order.choice([*data]) for i in range(30)] if data else []
    results = store.get_many(keys, max_bytes=max_bytes, concurrency=concurrency, driver=driver, errors="return")
    for key, result in zip(keys, results, strict=True):
        assert result.request.key == key
        if key == "missing":
            assert isinstance(result, ReadFailure)
            assert isinstance(result.error, ObjectNotFoundError)
        else:
            assert isinstance(result, ReadResult)
            assert bytes(result.data) == data[key]
            assert result.size == len(data[key])


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_error_is_raised_in_its_place(driver: Any) -> None:
    store, _ = make()
    for i in range(10):
        store.put(f"{i}", b"%d" % i)
    results = store.get_many(["0", "1", "missing", "3"], driver=driver)
    assert [bytes(next(results).data) for _ in range(2)] == [b"0", b"1"]
    with pytest.raises(ObjectNotFoundError) as caught:
        next(results)
    assert caught.value.url is not None
    assert caught.value.url.endswith("missing")
    assert list(results) == []
    assert wait_until(lambda: bulk_threads() == 0)


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_error_of_the_source_waits_its_turn(driver: Any) -> None:
    store, _ = make()
    store.put("k", b"x")

    def requests() -> Iterator[ReadRequest]:
        yield from [ReadRequest("k")] * 3
        raise KeyError("the plan")

    results = store.read_many(requests(), driver=driver)
    assert [bytes(next(results).data) for _ in range(3)] == [b"x"] * 3
    with pytest.raises(KeyError, match="the plan"):
        next(results)
    wrong: list[Any] = [ReadRequest("k"), "k"]
    results = store.read_many(wrong, driver=driver)
    next(results)
    with pytest.raises(ConfigError):
        next(results)


def test_bytes_in_hand_are_bounded() -> None:
    """Fetched and not yet taken, objects of unknown size included."""
    in_hand = most = 0
    lock = threading.Lock()

    class Counting(MemoryBackend):
        def get(self, key: str, *args: Any, **kwargs: Any) -> tuple[ObjectMeta, Buffer]:
            nonlocal in_hand, most
            meta, data = super().get(key, *args, **kwargs)
            with lock:
                in_hand += len(data)
                most = max(most, in_hand)
            return meta, data

        def read_into(self, key: str, start: int, buffer: memoryview, **kwargs: Any) -> ObjectMeta:
            nonlocal in_hand, most
            with lock:
                in_hand += len(buffer)
                most = max(most, in_hand)
            return super().read_into(key, start, buffer, **kwargs)

    store = ObjectStore("memory://", Counting(uuid.uuid4().hex))
    sizes = [10_000, 300_000, 100, 900_000, 70_000, 0, 400_000] * 3
    data = [os.urandom(size) for size in sizes]
    for i, value in enumerate(data):
        store.put(f"{i}", value)
    budget = 1_000_000
    for i, result in enumerate(store.get_many(map(str, range(21)), max_bytes=budget, concurrency=8, driver="threads")):
        assert bytes(result.data) == data[i]
        with lock:
            in_hand -= len(result.data)
    assert most <= budget + 900_000, "one object above the bound, and no more"
    assert in_hand == 0


def test_a_large_object_is_of_one_version() -> None:
    """Its size is unknown at first, so it takes two requests; between them it is replaced."""
    holder: list[ObjectStore] = []
    done = threading.Event()

    def replace(seen: Seen, moment: Moment) -> None:
        if seen.op == "read" and moment == "before" and not done.is_set():
            done.set()
            holder[0].put("k", bytes(300_000))

    store, _ = make(hook=replace)
    holder.append(store)
    store.put("k", os.urandom(300_000))
    with pytest.raises(ObjectChangedError):
        list(store.get_many(["k"], max_bytes=100_000, concurrency=2, driver="threads"))
    assert [bytes(r.data) for r in store.get_many(["k"], max_bytes=100_000, concurrency=2, driver="threads")] == [
        bytes(300_000)
    ]


def test_targets_are_filled() -> None:
    store, _ = make()
    store.put("k", bytes(range(100)))
    target = bytearray(20)
    view = memoryview(target)
    requests = [ReadRequest("k", 10 * i, into=view[5 * i : 5 * i + 5], tag=i) for i in range(4)]
    for driver in DRIVERS:
        target[:] = bytes(20)
        found = list(store.read_many(requests, driver=driver))  # type: ignore[arg-type]
        assert [r.request.tag for r in found] == [0, 1, 2, 3]
        assert target == b"".join(bytes(range(10 * i, 10 * i + 5)) for i in range(4))
        with pytest.raises(RangeError):
            list(store.read_many([ReadRequest("k", 98, into=view[:5])], driver=driver))  # type: ignore[arg-type]


@pytest.mark.parametrize("driver", DRIVERS)
def test_puts(driver: Any) -> None:
    store, _ = make(Fault("unavailable", op="put", key="bad", times=None))
    keys = ["a", "bad", "b", "c"]
    results = list(store.put_many([PutRequest(k, k.encode()) for k in keys], errors="return", driver=driver))
    assert [isinstance(result, PutFailure) for result in results] == [False, True, False, False]
    assert isinstance(results[1], PutFailure)
    assert isinstance(results[1].error, UnavailableError)
    assert [entry.key for entry in store.list()] == ["a", "b", "c"]
    with pytest.raises(ObjectExistsError):
        list(store.put_many([PutRequest("a", b"", mode="create")], driver=driver))
    with pytest.raises(ConfigError):
        list(store.put_many([PutRequest("a", "text")], driver=driver))  # type: ignore[arg-type]


class Remote(MemoryBackend):
    """Memory that passes for a store far away."""

    @property
    def engine(self) -> str:
        return "remote"


def test_a_large_read_into_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3loader.store.objectstore._PIECE", 1000)
    holder: list[ObjectStore] = []
    replace_at = 0

    def hook(seen: Seen, moment: Moment) -> None:
        if seen.number == replace_at and moment == "before":
            holder[0].put("k", bytes(6000))

    broken = FaultBackend(Remote(uuid.uuid4().hex), hook=hook)
    store = ObjectStore("remote://", broken)
    holder.append(store)
    data = os.urandom(6000)
    store.put("k", data)
    buffer = bytearray(5500)
    assert store.read_into("k", 400, buffer).size == 6000
    assert buffer == data[400:5900]
    assert [seen.op for seen in broken.seen] == ["put", "head", *["read"] * 6]
    with pytest.raises(RangeError):
        store.read_into("k", 600, buffer)
    replace_at = len(broken.seen) + 4
    with pytest.raises(ObjectChangedError):
        store.read_into("k", 0, buffer)


def test_ranges_of_two_versions_are_no_answer() -> None:
    """Also where the store ignores If-Match: the ETags that come are compared."""
    holder: list[ObjectStore] = []

    def hook(seen: Seen, moment: Moment) -> None:
        if seen.number == 3 and moment == "before":
            holder[0].put("k", bytes(10_000))

    store, _ = make(hook=hook)
    holder.append(store)
    store.put("k", os.urandom(10_000))
    with pytest.raises(ObjectChangedError):
        store.get_ranges("k", [(0, 10), (5000, 5010), (9000, 9010)], max_gap=0)
    assert len(store.get_ranges("k", [(0, 10), (5000, 5010)], max_gap=0)) == 2


def test_options_are_checked_at_the_call() -> None:
    store, _ = make()
    wrong: list[dict[str, Any]] = [
        {"concurrency": 0},
        {"concurrency": -1},
        {"concurrency": 1.5},
        {"driver": "horses"},
        {"errors": "ignore"},
        {"max_bytes": "lots"},
    ]
    for options in wrong:
        with pytest.raises(ConfigError):
            store.get_many(["k"], **options)
        with pytest.raises(ConfigError):
            store.put_many([], **options)
    for letters in (store.get_many, store.delete_many):
        with pytest.raises(ConfigError, match="one key"):
            letters("abc")  # type: ignore[operator]


# -- being left -------------------------------------------------------------------------------------


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


def test_leaving_does_not_wait_for_a_slow_request() -> None:
    """What is on the wire cannot be called back; it is left to end by itself."""
    release = threading.Event()
    stuck = threading.Event()

    def hold(seen: Seen, moment: Moment) -> None:
        if seen.key == "slow" and moment == "before":
            stuck.set()
            release.wait(60)

    store, _ = make(hook=hold)
    store.put("k", b"x")
    results = store.get_many(["k", "slow"], concurrency=2, driver="threads")
    next(results)
    assert stuck.wait(30)
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

    store = ObjectStore("memory://", RetryBackend(broken, sleep=sleep))
    store.put("k", b"x")
    results: Any = store.get_many(["k", "bad"], concurrency=2, driver="threads")
    next(results)
    assert waiting.wait(30)
    results.close()
    assert wait_until(lambda: bulk_threads() == 0)


@pytest.mark.parametrize("driver", ["threads", "pump"])
def test_ctrl_c_ends_a_call_within_a_second(driver: str) -> None:
    code = """
        import sys, time, uuid
        from s3loader.store import ObjectStore
        from s3loader.store.fault import FaultBackend
        from s3loader.store.memory import MemoryBackend
        def hold(seen, moment):
            if seen.op == "get":
                print("stuck", flush=True)
                time.sleep(60)
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
        assert child.wait(30) == 0
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_a_forked_child_cannot_go_on() -> None:
    store, _ = make()
    store.put("k", b"x")
    results = store.get_many(["k"] * 100, max_bytes=10, driver="threads", concurrency=2)
    next(results)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            list(results)
        except ClosedError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
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


def test_work_of_any_kind_in_order() -> None:
    """`run_ordered` by itself: what the work raises ends up in its slot."""

    def work(slot: Any, _: Any) -> int:
        if slot.item == 3:
            raise ValueError("three")
        return slot.item * 2

    slots = list(run_ordered(range(6), work, lambda item: 1, max_bytes=3, concurrency=3, name="test"))
    assert [slot.result for slot in slots] == [0, 2, 4, None, 8, 10]
    assert isinstance(slots[3].error, ValueError)


# -- an engine's own bulk verbs --------------------------------------------------------------------


def through(prefix: str = "", **retry: Any) -> tuple[ObjectStore, Engine]:
    engine = Engine(uuid.uuid4().hex)
    backend: Any = RetryBackend(engine, sleep=lambda _: None, **retry)
    return ObjectStore(engine.url, PrefixBackend(backend, prefix) if prefix else backend), engine


@pytest.mark.parametrize("prefix", ["", "a/b/"])
def test_an_engine_is_handed_everything(prefix: str) -> None:
    store, engine = through(prefix)
    requests = [PutRequest(f"{i}", b"%d" % i, tag=i) for i in range(5)]
    assert [result.key for result in store.put_many(requests)] == [f"{i}" for i in range(5)]
    assert [entry.key for entry in engine.list()] == [f"{prefix}{i}" for i in range(5)]
    reads = [ReadRequest(f"{i}", 0, 1, tag=i) for i in (3, 1, 1, 0)]
    results = list(store.read_many(reads))
    assert [bytes(r.data) for r in results] == [b"3", b"1", b"1", b"0"]
    assert [r.request for r in results] == reads
    assert engine.bulk == 9
    assert engine.closed == 2


@pytest.mark.parametrize("prefix", ["", "p/"])
def test_what_it_fails_at_goes_through_the_wrappers(prefix: str) -> None:
    store, engine = through(prefix)
    for i in range(6):
        store.put(f"{i}", b"%d" % i)
    engine.failures = {f"{prefix}2": [UnavailableError("for now")], f"{prefix}4": [UnavailableError("for now")] * 2}
    assert [bytes(r.data) for r in store.get_many(["0", "1", "2", "3", "4", "4", "5"])] == [
        b"%d" % i for i in (0, 1, 2, 3, 4, 4, 5)
    ]
    engine.failures = {f"{prefix}2": [ObjectNotFoundError("gone")]}
    results = store.get_many(["1", "2", "3"])
    assert bytes(next(results).data) == b"1"
    with pytest.raises(ObjectNotFoundError):
        next(results)
    engine.failures = {f"{prefix}2": [ObjectNotFoundError("gone")]}
    mixed = list(store.get_many(["1", "2", "3"], errors="return"))
    assert [type(r) for r in mixed] == [ReadResult, ReadFailure, ReadResult]
    assert [r.request.key for r in mixed] == ["1", "2", "3"]
    engine.failures = {f"{prefix}7": [UnavailableError("for now")]}
    assert [r.key for r in store.put_many([PutRequest("6", b""), PutRequest("7", b"seven")])] == ["6", "7"]
    assert store.get("7") == b"seven"


def test_its_try_counts() -> None:
    """The engine's own try is the first of the request's: there is a wait behind it, and one less to come."""
    waits: list[float] = []
    engine = Engine(uuid.uuid4().hex)
    broken: Any = RetryBackend(engine, max_attempts=3, sleep=waits.append)
    store = ObjectStore("memory://", broken)
    engine.failures = {"k": [UnavailableError("for now")]}
    calls = 0

    def failing(*_: Any, **__: Any) -> Any:
        nonlocal calls
        calls += 1
        raise UnavailableError("for now")

    engine.get = failing  # type: ignore[method-assign]
    with pytest.raises(UnavailableError) as caught:
        list(store.get_many(["k"]))
    assert (calls, len(waits), caught.value.attempts) == (2, 2, 3)


def test_a_crash_of_the_engine_is_not_taken_for_an_answer() -> None:
    store, engine = through()
    store.put("k", b"")
    engine.failures = {"k": [MemoryError()]}
    with pytest.raises(MemoryError):
        list(store.get_many(["k"], errors="return"))


def test_conditional_puts_go_the_general_way() -> None:
    """They need a write id, which the bulk verbs do not carry."""
    store, engine = through("p/")
    store.put("taken", b"theirs")
    engine.bulk = 0
    requests = [
        PutRequest("a", b"1"),
        PutRequest("b", b"2", mode="create"),
        PutRequest("taken", b"3", mode="create"),
        PutRequest("c", b"4"),
        PutRequest("d", b"5"),
    ]
    results = list(store.put_many(requests, errors="return"))
    assert [type(r) for r in results] == [PutResult, PutResult, PutFailure, PutResult, PutResult]
    assert engine.bulk == 3
    assert store.head("b").metadata
    assert store.get("taken") == b"theirs"


def test_an_engine_keeps_to_the_rate() -> None:
    clock = [0.0]
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        clock[0] += seconds

    engine = Engine(uuid.uuid4().hex)
    limited = LimitBackend(engine, 10.0, clock=lambda: clock[0], sleep=sleep)
    store = ObjectStore("memory://", RetryBackend(limited))
    engine.put("k", b"x")
    assert len(list(store.get_many(["k"] * 11))) == 11
    assert engine.bulk == 11
    assert sum(waits) == pytest.approx(1.0)
    store.get("k")
    assert sum(waits) == pytest.approx(1.1)


def test_errors_of_the_source_through_an_engine() -> None:
    store, engine = through("p/")
    store.put("k", b"x")

    def requests() -> Iterator[ReadRequest]:
        yield ReadRequest("k")
        raise KeyError("the plan")

    results = store.read_many(requests())
    assert bytes(next(results).data) == b"x"
    with pytest.raises(KeyError):
        next(results)
    assert engine.closed == 1
    leaving: Any = store.get_many(["k"] * 5)
    next(leaving)
    leaving.close()
    assert engine.closed == 2


def test_faults_see_every_request_of_a_bulk_call() -> None:
    """Around an engine with bulk verbs the fault layer is no hole."""
    engine = Engine(uuid.uuid4().hex)
    broken = FaultBackend(engine, [Fault("unavailable", op="get", nth=2)])
    store = ObjectStore("memory://", RetryBackend(broken, sleep=lambda _: None))
    engine.put("k", b"x")
    assert len(list(store.get_many(["k"] * 4, driver="pump"))) == 4
    assert engine.bulk == 0
    assert len(broken.seen) == 5


# -- files ------------------------------------------------------------------------------------------


def test_slow_files_are_read_by_threads(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that makes us wait is a reason for threads; the page cache is none."""
    store = open_store(tmp_path)
    for i in range(30):
        (tmp_path / f"{i}").write_bytes(b"%d" % i)
    assert [bytes(r.data) for r in store.get_many([f"{i}" for i in range(30)])] == [b"%d" % i for i in range(30)]
    names: set[str] = set()
    pread = os.pread

    def slow(*args: Any) -> bytes:
        names.add(threading.current_thread().name)
        time.sleep(0.005)
        return pread(*args)

    monkeypatch.setattr(os, "pread", slow)
    assert [bytes(r.data) for r in store.get_many([f"{i}" for i in range(30)])] == [b"%d" % i for i in range(30)]
    assert any(name.startswith("s3loader-read") for name in names)
