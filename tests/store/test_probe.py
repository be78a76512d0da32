"""What a store can do is found by trying, not by believing; and one event for each try."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from s3loader import events
from s3loader.errors import (
    AccessDeniedError,
    IntegrityError,
    ObjectChangedError,
    ObjectNotFoundError,
    S3LoaderError,
    UnsupportedOperationError,
)
from s3loader.store import MemoryBackend, ObjectStore, Pipeline, RateLimit, RetryPolicy, open_store
from s3loader.store.probe import conditional_writes, probe
from s3loader.testing import Fault, FaultBackend, FaultProxy, Rule, Server, server
from s3loader.types import Buffer, Capabilities, DeleteFailure, ObjectMeta, PartResult, PutMode, PutRequest, PutResult, Update

FULL = Capabilities(
    create=True, update=True, multipart_create=True, multipart_update=True, get_if_match=True, upload_checksum=True
)
ABILITIES = ("create", "update", "multipart_create", "multipart_update", "get_if_match", "upload_checksum")


class Ignorant(MemoryBackend):
    """Says yes to everything; `knows` are the conditions that it looks at."""

    knows: frozenset[str] = frozenset()

    def __init__(self, *knows: str) -> None:
        super().__init__(uuid.uuid4().hex)
        self.knows = frozenset(knows)

    @property
    def engine(self) -> str:
        return "ignorant"

    def _mode(self, mode: PutMode, kind: str) -> PutMode:
        name = f"{kind}{'create' if mode == 'create' else 'update'}"
        return mode if name in self.knows else "overwrite"

    def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite", **rest: Any) -> PutResult:
        return super().put(key, data, mode=self._mode(mode, ""), **rest)

    def complete_multipart(
        self, key: str, upload_id: str, parts: Sequence[PartResult], *, mode: PutMode = "overwrite"
    ) -> PutResult:
        return super().complete_multipart(key, upload_id, parts, mode=self._mode(mode, "multipart_"))

    def get(self, key: str, start: int = 0, end: int | None = None, **rest: Any) -> tuple[ObjectMeta, Buffer]:
        try:
            return super().get(key, start, end, **rest)
        except ObjectChangedError as error:  # as an engine does that compares the answer, or a server
            error.status = 412 if "get_if_match" in self.knows else None
            raise

    def put_with_checksum(self, key: str, data: Buffer, checksum: str) -> PutResult:
        if "upload_checksum" in self.knows:
            return super().put_with_checksum(key, data, checksum)
        return self.put(key, data)


@pytest.mark.parametrize("can", ["", *ABILITIES])
def test_each_ability_is_found_by_itself(can: str) -> None:
    backend = Ignorant(can)
    expected = Capabilities(**{name: name == can for name in ABILITIES})
    assert probe(Pipeline(backend)) == expected
    assert list(backend.list()) == []
    assert list(backend.list_multipart()) == []


def test_our_own_stores_can_do_it_all(tmp_path: Path) -> None:
    for store in (open_store(tmp_path / "a"), open_store(f"memory://{uuid.uuid4().hex}/p")):
        assert store.capabilities() == FULL
        assert store.capabilities().conditional_writes
        assert list(store.list()) == []


def test_a_store_whose_updates_always_fail() -> None:
    """As Ceph did: the condition is never true, right or wrong."""

    class Never(MemoryBackend):
        def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite", **rest: Any) -> PutResult:
            if isinstance(mode, Update):
                raise ObjectChangedError("no")
            return super().put(key, data, mode=mode, **rest)

    assert probe(Never(uuid.uuid4().hex)) == replace(FULL, update=False)


def test_a_store_that_refuses_conditions() -> None:
    class Plain(MemoryBackend):
        def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite", **rest: Any) -> PutResult:
            if mode != "overwrite" or rest.get("metadata"):
                raise UnsupportedOperationError("not here")
            return super().put(key, data, mode=mode, **rest)

    assert probe(Plain(uuid.uuid4().hex)) == replace(FULL, create=False, update=False, metadata=False)


def test_who_may_not_write_is_told_so() -> None:
    class ReadOnly(MemoryBackend):
        def put(self, *_: Any, **__: Any) -> PutResult:
            raise AccessDeniedError("read only")

    with pytest.raises(AccessDeniedError):
        probe(ReadOnly(uuid.uuid4().hex))


def test_what_cannot_be_cleaned_up_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Keeper(MemoryBackend):
        def delete_many(self, keys: Sequence[str]) -> list[DeleteFailure]:
            return [DeleteFailure(key, AccessDeniedError("no")) for key in keys]

    assert probe(Keeper(uuid.uuid4().hex)) == FULL
    assert "left behind" in caplog.text
    caplog.clear()
    probe(FaultBackend(MemoryBackend(uuid.uuid4().hex), [Fault("unavailable", op="list", times=None)]))
    assert "left behind" in caplog.text


@pytest.mark.parametrize("can", ["", *ABILITIES, "create update"])
def test_conditions_are_found_by_themselves(can: str) -> None:
    backend = Ignorant(*can.split())
    seen: list[events.OpEvent] = []
    stop = events.subscribe(seen.append)
    try:
        assert conditional_writes(Pipeline(backend), None) is (can == "create update")
    finally:
        stop()
    assert len(seen) <= 6
    assert list(backend.list()) == []


@pytest.mark.parametrize("lies", ["applies what it refuses", "gives no ETags"])
def test_conditions_that_are_answered_right_and_done_wrong(lies: str) -> None:
    class Liar(MemoryBackend):
        def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite", **rest: Any) -> PutResult:
            try:
                done = super().put(key, data, mode=mode, **rest)
            except ObjectChangedError:
                if lies.startswith("applies"):
                    super().put(key, data)
                raise
            return replace(done, etag="") if lies.startswith("gives") else done

    assert conditional_writes(Liar(uuid.uuid4().hex), None) is lies.startswith("gives")


def test_conditions_are_asked_once_per_bucket(caplog: pytest.LogCaptureFixture) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    assert open_store(url).conditional_writes()
    seen: list[events.OpEvent] = []
    stop = events.subscribe(seen.append)
    try:
        assert open_store(url).conditional_writes()
        assert open_store(url + "/deeper").conditional_writes()
        assert seen == []
        store = open_store(url + "2")
        assert store.capabilities()
        seen.clear()
        assert store.conditional_writes()
        assert open_store(url + "2").conditional_writes()
        assert seen == []
        alone = ObjectStore("memory://alone", Pipeline(MemoryBackend(uuid.uuid4().hex)))
        assert alone.conditional_writes()
        assert len(seen) == 6
        assert alone.conditional_writes()
        assert len(seen) == 6
    finally:
        stop()

    class Keeper(MemoryBackend):
        def delete(self, key: str, **_: Any) -> None:
            raise AccessDeniedError("no")

    assert conditional_writes(Keeper(uuid.uuid4().hex), None)
    assert "left behind" in caplog.text


def test_it_is_asked_once_per_root() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    seen: list[events.OpEvent] = []
    first = open_store(url).capabilities()
    stop = events.subscribe(seen.append)
    try:
        assert open_store(url).capabilities() is first
        assert open_store(url + "/deeper").capabilities() is first
        assert seen == []
        open_store(url + "2").capabilities()
        assert seen
    finally:
        stop()


# -- events -----------------------------------------------------------------------------------------


def watched(*faults: Fault) -> tuple[ObjectStore, list[events.OpEvent], Any]:
    backend = Pipeline(FaultBackend(MemoryBackend(uuid.uuid4().hex), faults), retry=RetryPolicy(sleep=lambda _: None))
    seen: list[events.OpEvent] = []
    return ObjectStore("memory://", backend), seen, events.subscribe(seen.append)


def test_each_attempt_is_an_event() -> None:
    store, seen, stop = watched(Fault("throttled", op="get", times=2))
    try:
        store.put("k", b"12345")
        store.get("k")
        with pytest.raises(ObjectNotFoundError):
            store.head("none")
    finally:
        stop()
    shown = [(e.op, e.attempt, e.bytes, e.status, (e.error or "").partition(":")[0]) for e in seen]
    assert shown == [
        ("PUT", 1, 5, None, ""),
        ("GET", 1, 0, 503, "ThrottledError"),
        ("RETRY", 2, 0, 503, "ThrottledError"),
        ("GET", 2, 0, 503, "ThrottledError"),
        ("RETRY", 3, 0, 503, "ThrottledError"),
        ("GET", 3, 5, None, ""),
        ("HEAD", 1, 0, None, "ObjectNotFoundError"),
    ]
    assert all(e.start <= e.end and e.engine == "memory" for e in seen)


def test_what_counts_several_objects() -> None:
    store, seen, stop = watched(Fault("truncate", op="list", nth=2))
    try:
        list(store.put_many(PutRequest(f"{i}", b"") for i in range(6)))
        seen.clear()
        assert len(list(store.list())) == 6
        assert len(list(store.list())) == 6
        store.delete_many([f"{i}" for i in range(6)])
    finally:
        stop()
    shown = [(e.op, e.objects, e.error is None) for e in seen]
    assert shown == [("LIST", 6, True), ("LIST", 3, False), ("RETRY", 1, False), ("LIST", 3, True), ("DELETE", 6, True)]


def test_a_listing_left_early_is_an_event() -> None:
    store, seen, stop = watched()
    try:
        store.put("a", b"")
        store.put("b", b"")
        entries: Any = store.list()
        next(entries)
        entries.close()
    finally:
        stop()
    assert [(e.op, e.objects) for e in seen][-1] == ("LIST", 1)


def test_waits_for_the_rate_are_events() -> None:
    seen: list[events.OpEvent] = []
    slept: list[float] = []
    limit = RateLimit(200, clock=lambda: 7.0 + sum(slept), sleep=slept.append)
    store = ObjectStore("memory://", Pipeline(MemoryBackend(uuid.uuid4().hex), limit=limit))
    stop = events.subscribe(seen.append)
    try:
        for _ in range(4):
            store.exists("k")
    finally:
        stop()
    waits = [e for e in seen if e.op == "WAIT"]
    assert len(waits) == len(slept) == 3
    assert all(e.end >= e.start for e in waits)


def test_the_whole_key_is_told() -> None:
    """Under a prefix, too."""
    seen: list[events.OpEvent] = []
    url = f"memory://{uuid.uuid4().hex}/a/b"
    stop = events.subscribe(seen.append)
    try:
        open_store(url).put("k", b"")
    finally:
        stop()
    assert [e.url for e in seen] == [f"{url}/k"]


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with server("ministack") as running:
        yield running


OPTIONS: dict[str, Any] = {"error": {"status": 503, "code": "SlowDown"}, "done_error": {"status": 500, "forward": True}}


@pytest.mark.parametrize("action", ["refuse", "drop_reply", "error", "done_error", "truncate", "flip"])
def test_a_network_that_fails_never_decides_whether_conditions_hold(s3: Server, action: str) -> None:
    """Each of the probe's requests is struck, alone and with many that follow: what is found is the truth, or an error."""
    kind: Any = "error" if action == "done_error" else action
    for number, row in ((number, row) for number in itertools.count(1) for row in (1, 9)):
        rules = [Rule(kind, nth=nth, **OPTIONS.get(action, {})) for nth in range(number, number + row)]
        with FaultProxy(s3.endpoint_url, rules) as proxy:
            store = s3.open_store(s3.bucket(), endpoint_url=proxy.endpoint_url)
            store.backend.retry = RetryPolicy(sleep=lambda _: None)  # type: ignore[attr-defined]
            try:
                assert store.conditional_writes(), (number, row)
            except S3LoaderError as error:
                assert row > 1, error  # noqa: PT017
            if not any(rule.fired for rule in rules):
                break
    assert number > 4


@pytest.mark.parametrize("kind", ["unavailable", "throttled", "timeout", "refused", "reset", "drop_reply", "truncate", "flip"])
def test_a_network_that_fails_never_decides_what_a_store_can_do(kind: Any) -> None:
    for number in itertools.count(1):
        faulty = FaultBackend(MemoryBackend(uuid.uuid4().hex), [Fault(kind, nth=number)])
        try:
            assert probe(Pipeline(faulty, retry=RetryPolicy(sleep=lambda _: None))) == FULL, number
        except IntegrityError:  # of what was damaged on its way to the store
            assert kind == "flip"
        if all(seen.fault is None for seen in faulty.seen):
            break
    assert number > 20
