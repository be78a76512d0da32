"""The fault layer is a measuring instrument: it has to be exact."""

from __future__ import annotations

import os
import signal
import uuid
from typing import Any

import pytest

from s3loader.errors import (
    ConfigError,
    ConflictError,
    ObjectExistsError,
    S3LoaderError,
    StoreConnectionError,
    StoreTimeoutError,
    ThrottledError,
    TruncatedError,
    UnavailableError,
)
from s3loader.store import MemoryBackend
from s3loader.testing import Fault, FaultBackend, Seen


def make(*faults: Fault, **options: Any) -> FaultBackend:
    return FaultBackend(MemoryBackend(uuid.uuid4().hex), faults, **options)


@pytest.mark.parametrize(
    ("kind", "error", "applied"),
    [
        ("unavailable", UnavailableError, False),
        ("throttled", ThrottledError, False),
        ("conflict", ConflictError, False),
        ("timeout", StoreTimeoutError, False),
        ("refused", StoreConnectionError, False),
        ("reset", StoreConnectionError, False),
        ("drop_reply", StoreConnectionError, True),
    ],
)
def test_kinds(kind: Any, error: type[S3LoaderError], applied: bool) -> None:
    backend = make(Fault(kind, op="put"))
    with pytest.raises(error) as caught:
        backend.put("k", b"x")
    assert (caught.value.op, caught.value.url) == ("put", f"{backend.url}/k")
    assert caught.value.retryable
    assert bool(list(backend.list())) == applied
    backend.put("k", b"y")
    assert [seen.fault for seen in backend.seen if seen.op == "put"] == [kind, None]


def test_rules_match_verb_key_and_number() -> None:
    backend = make(Fault("unavailable", op="head", key="a", nth=2), Fault("throttled", key="b", times=2))
    for key in ("a", "ab", "c"):
        backend.inner.put(key, b"")
    outcomes = []
    for key in ("c", "a", "c", "ab", "ab", "ab", "a"):
        try:
            backend.head(key)
            outcomes.append("ok")
        except S3LoaderError as error:
            outcomes.append(type(error).__name__)
    assert outcomes == ["ok", "ok", "ok", "UnavailableError", "ThrottledError", "ThrottledError", "ok"]
    assert [seen.number for seen in backend.seen] == list(range(1, 8))
    with pytest.raises(ConfigError):
        make(Fault("unavailable", nth=0))


def test_chance_is_seeded() -> None:
    def run(seed: int) -> list[bool]:
        backend = make(Fault("unavailable", probability=0.3, times=None), seed=seed)
        for _ in range(200):
            try:
                backend.put("k", b"")
            except UnavailableError:
                continue
        return [seen.fault is not None for seen in backend.seen]

    assert run(1) == run(1) != run(2)
    assert 30 < sum(run(1)) < 90


def test_bodies_are_damaged_silently() -> None:
    data = bytes(range(256))
    for op in ("get", "read", "put", "upload part"):
        backend = make(Fault("flip", op=op), seed=5)  # type: ignore[arg-type]
        buffer = bytearray(256)
        if op == "upload part":
            upload_id = backend.create_multipart("k")
            part = backend.upload_part("k", upload_id, 1, data)
            backend.complete_multipart("k", upload_id, [part])
        else:
            backend.put("k", data)
        first = bytes(backend.get("k")[1])
        backend.read_into("k", 0, memoryview(buffer))
        damaged = {"get": first, "read": bytes(buffer), "put": first, "upload part": first}[op]
        wrong = [a ^ b for a, b in zip(damaged, data, strict=True) if a != b]
        assert len(wrong) == 1
        assert wrong[0].bit_count() == 1


def test_bodies_are_cut() -> None:
    backend = make(Fault("truncate", op="get"), Fault("truncate", op="read"), Fault("truncate", op="list"))
    backend.put("k", b"0123456789")
    meta, data = backend.get("k")
    assert (meta.size, bytes(data)) == (10, b"01234")
    buffer = bytearray(b"X" * 10)
    with pytest.raises(TruncatedError):
        backend.read_into("k", 0, memoryview(buffer))
    assert buffer == b"01234" + bytes(5)
    backend.put("l", b"")
    entries = backend.list()
    assert next(entries).key == "k"
    with pytest.raises(StoreConnectionError):
        next(entries)


def test_the_hook_sees_before_and_after() -> None:
    moments: list[tuple[str, str, bool]] = []
    backend = make()
    backend.hook = lambda seen, moment: moments.append((seen.op, moment, bool(list(backend.inner.list()))))
    backend.put("k", b"x")
    assert moments == [("put", "before", False), ("put", "after", True)]

    def refuse(seen: Seen, moment: str) -> None:
        raise ObjectExistsError("not today")

    backend.hook = refuse
    with pytest.raises(ObjectExistsError):
        backend.get("k")


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_killed_at_a_request(tmp_path: Any, number: int) -> None:
    """The hook as tests of commits use it: a process dies at its request n, before or after it is done."""
    from s3loader.store import LocalBackend, ObjectStore

    def die(seen: Seen, moment: str) -> None:
        if (2 * seen.number - (moment == "before")) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            store = ObjectStore("file://", FaultBackend(LocalBackend(str(tmp_path)), hook=die))
            for i in range(3):
                store.put(f"{i}", b"x")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert [entry.key for entry in LocalBackend(str(tmp_path)).list()] == [f"{i}" for i in range(number // 2)]
