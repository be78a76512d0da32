"""Retries: when, how long, and what becomes of writes whose answer is lost."""

from __future__ import annotations

import itertools
import pickle
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3loader import events
from s3loader.errors import (
    ConflictError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    OutcomeUnknownError,
    S3LoaderError,
    StoreConnectionError,
    StoreTimeoutError,
    ThrottledError,
    TruncatedError,
    UnavailableError,
)
from s3loader.store import ObjectStore
from s3loader.store.fault import Fault, FaultBackend, Seen
from s3loader.store.memory import MemoryBackend
from s3loader.store.retry import RetryBackend
from s3loader.store.settle import WRITE_ID
from s3loader.types import DeleteFailure, Update


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def make(
    *faults: Fault,
    max_attempts: int = 5,
    budget: float = 60.0,
    seed: int = 0,
    hook: Callable[[Seen, str], None] | None = None,
    jitter: Callable[[float, float], float] = lambda low, high: high,
) -> tuple[ObjectStore, MemoryBackend, FaultBackend, Clock]:
    """A store with these faults, what lies under it, the fault layer, and its clock."""
    memory = MemoryBackend(uuid.uuid4().hex)
    broken = FaultBackend(memory, faults, seed=seed, hook=hook)
    clock = Clock()
    retrying = RetryBackend(broken, max_attempts=max_attempts, budget=budget, clock=clock, sleep=clock.sleep, jitter=jitter)
    return ObjectStore(memory.url, retrying), memory, broken, clock


@pytest.mark.parametrize("kind", ["unavailable", "throttled", "timeout", "refused", "reset", "drop_reply"])
def test_passing_errors_are_retried(kind: Any) -> None:
    store, memory, broken, clock = make(Fault(kind, times=3))
    memory.put("k", b"data")
    assert store.get("k") == b"data"
    assert len(broken.seen) == 4
    assert clock.slept == [0.2, 0.4, 0.8]


def test_other_errors_are_not() -> None:
    store, _, broken, clock = make()
    with pytest.raises(ObjectNotFoundError) as caught:
        store.get("missing")
    assert (len(broken.seen), clock.slept, caught.value.attempts) == (1, [], 1)


def test_attempts_end_and_are_told() -> None:
    store, memory, broken, _ = make(Fault("unavailable", times=None), max_attempts=4)
    memory.put("k", b"x")
    with pytest.raises(UnavailableError, match="4 attempts") as caught:
        store.get("k")
    assert caught.value.attempts == len(broken.seen) == 4
    assert pickle.loads(pickle.dumps(caught.value)).attempts == 4


def test_the_budget_ends_them_too() -> None:
    store, memory, _, clock = make(Fault("timeout", times=None), max_attempts=1000, budget=7.0)
    memory.put("k", b"x")
    with pytest.raises(StoreTimeoutError):
        store.head("k")
    assert sum(clock.slept) <= 7.0
    assert len(clock.slept) >= 4


def test_waits_are_jittered_and_capped() -> None:
    highs: list[float] = []

    def jitter(low: float, high: float) -> float:
        assert low == 0.0
        highs.append(high)
        return high / 2

    store, _, _, clock = make(Fault("unavailable", times=None), max_attempts=12, budget=1e9, jitter=jitter)
    with pytest.raises(UnavailableError):
        store.head("k")
    assert highs[:3] == [0.2, 0.4, 0.8]
    assert max(highs) == highs[-1] == 10.0
    assert clock.slept == [high / 2 for high in highs]


def test_what_the_server_asks_for_is_waited() -> None:
    store, memory, _, clock = make()
    memory.put("k", b"x")
    calls = itertools.count()

    class Asking(MemoryBackend):
        def head(self, key: str, *, version_id: str | None = None) -> Any:
            if next(calls) == 0:
                raise ThrottledError("slow down", retry_after=3.5)
            return super().head(key)

    inner = Asking(memory.name)
    store = ObjectStore("memory://", RetryBackend(inner, clock=clock, sleep=clock.sleep))
    assert store.head("k").size == 1
    assert clock.slept == [3.5]


def test_retries_are_events() -> None:
    store, memory, _, _ = make(Fault("throttled", times=2))
    memory.put("k", b"x")
    seen: list[events.OpEvent] = []
    stop = events.subscribe(seen.append)
    try:
        store.get("k")
    finally:
        stop()
    retries = [event for event in seen if event.op == "RETRY"]
    assert [event.attempt for event in retries] == [2, 3]
    assert all(event.status == 503 and "ThrottledError" in (event.error or "") for event in retries)
    assert all(event.url.endswith("/k") for event in retries)


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_a_short_body_is_not_believed(size: int) -> None:
    store, memory, broken, _ = make(Fault("truncate", op="get", times=1))
    memory.put("k", b"x" * size)
    assert store.get("k") == b"x" * size
    assert len(broken.seen) == 2
    store, memory, broken, _ = make(Fault("truncate", op="get", times=None), max_attempts=3)
    memory.put("k", b"x" * size)
    with pytest.raises(TruncatedError):
        store.get("k")
    with pytest.raises(TruncatedError):
        store.get_range("k", 0, size)


def test_a_short_read_into_is_repeated() -> None:
    store, memory, _, _ = make(Fault("truncate", op="read", times=1))
    memory.put("k", bytes(range(200)))
    buffer = bytearray(100)
    store.read_into("k", 50, buffer)
    assert buffer == bytes(range(50, 150))


# -- listings ---------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    keys=st.sets(st.text("ab/", min_size=1, max_size=5), min_size=1, max_size=20),
    prefix=st.text("ab/", max_size=2),
    delimiter=st.sampled_from(["", "/", "b"]),
    start_after=st.text("ab/", max_size=3),
)
def test_a_listing_that_breaks_goes_on(keys: set[str], prefix: str, delimiter: str, start_after: str) -> None:
    store, memory, _, _ = make(Fault("truncate", op="list", times=3))
    for key in keys:
        memory.put(key, b"")
    expected = list(memory.list(prefix, delimiter=delimiter, start_after=start_after))
    assert list(store.list(prefix, delimiter=delimiter, start_after=start_after)) == expected


def test_progress_renews_the_attempts_of_a_listing() -> None:
    """Each break comes after new entries: that is a long listing over a bad line, not a dead store."""
    store, memory, _, _ = make(Fault("truncate", op="list", times=8), max_attempts=2)
    for i in range(600):
        memory.put(f"{i:03}", b"")
    assert [entry.key for entry in store.list()] == [f"{i:03}" for i in range(600)]


# -- conditional writes -------------------------------------------------------------------------


def test_a_lost_answer_to_create_is_found_by_its_id() -> None:
    store, memory, broken, _ = make(Fault("drop_reply", op="put"))
    result = store.put("k", b"mine", mode="create")
    assert [seen.op for seen in broken.seen] == ["put", "put", "head"]
    assert (result.etag, result.size) == (memory.head("k").etag, 4)
    assert memory.head("k").metadata[WRITE_ID]


def test_a_lost_answer_to_update_is_found_by_its_id() -> None:
    store, memory, _, _ = make(Fault("drop_reply", op="put"))
    first = memory.put("k", b"old")
    result = store.put("k", b"new", mode=Update(first.etag))
    assert result.etag == memory.head("k").etag
    assert store.get("k") == b"new"


def test_user_metadata_stays_beside_the_id() -> None:
    store, memory, _, _ = make()
    store.put("k", b"x", mode="create", metadata={"a": "b"})
    assert memory.head("k").metadata["a"] == "b"
    store.put("plain", b"x")
    assert WRITE_ID not in memory.head("plain").metadata


def test_another_writer_is_no_success() -> None:
    """Our request never arrived; meanwhile somebody took the key."""
    rival: list[MemoryBackend] = []

    def hook(seen: Seen, moment: str) -> None:
        if seen.number == 1 and moment == "before":
            rival[0].put("k", b"theirs")

    store, memory, _, _ = make(Fault("reset", op="put"), hook=hook)
    rival.append(memory)
    with pytest.raises(ObjectExistsError) as caught:
        store.put("k", b"mine", mode="create")
    assert caught.value.details["ambiguous"]
    assert store.get("k") == b"theirs"


def test_an_update_that_was_overtaken_is_unknown() -> None:
    """Ours was done, its answer lost, and another writer built on it: their refusal of our second try is
    no proof that ours did not happen."""
    holder: list[MemoryBackend] = []

    def hook(seen: Seen, moment: str) -> None:
        if seen.number == 1 and moment == "after":
            ours = holder[0].head("k")
            holder[0].put("k", b"ours and theirs", mode=Update(ours.etag))

    store, memory, _, _ = make(Fault("drop_reply", op="put"), hook=hook)
    holder.append(memory)
    old = memory.put("k", b"old")
    with pytest.raises(OutcomeUnknownError):
        store.put("k", b"ours", mode=Update(old.etag))
    assert isinstance(_error(lambda: store.put("k", b"ours", mode=Update(old.etag))), ObjectChangedError)


@pytest.mark.parametrize("mode", ["create", "update"])
def test_nothing_left_to_read_back_is_unknown(mode: str) -> None:
    """Ours may have been there and been deleted, or never have been: nobody can tell."""
    holder: list[MemoryBackend] = []

    def hook(seen: Seen, moment: str) -> None:
        if seen.op == "head" and moment == "before":
            holder[0].delete("k")

    store, memory, _, _ = make(Fault("drop_reply", op="put"), hook=hook)
    holder.append(memory)
    how: Any = "create" if mode == "create" else Update(memory.put("k", b"old").etag)
    with pytest.raises(OutcomeUnknownError) as caught:
        store.put("k", b"mine", mode=how)
    assert caught.value.hint
    assert not caught.value.retryable


def test_unreadable_is_unknown() -> None:
    store, _, _, _ = make(Fault("drop_reply", op="put"), Fault("unavailable", op="head", times=None), max_attempts=3)
    with pytest.raises(OutcomeUnknownError):
        store.put("k", b"mine", mode="create")


def test_all_answers_lost() -> None:
    """The attempts run out, but the write is there: reading back tells."""
    store, memory, _, _ = make(Fault("drop_reply", op="put", times=None), max_attempts=1)
    result = store.put("k", b"mine", mode="create")
    assert result.etag == memory.head("k").etag


def test_never_arrived_is_unknown_not_failed() -> None:
    """After a time-out the request may still be on its way."""
    store, memory, _, _ = make(Fault("timeout", op="put", times=None), max_attempts=2)
    old = memory.put("k", b"old")
    with pytest.raises(OutcomeUnknownError):
        store.put("k", b"mine", mode=Update(old.etag))
    with pytest.raises(OutcomeUnknownError):
        store.put("new", b"mine", mode="create")
    with pytest.raises(OutcomeUnknownError):  # what is there now may have been built on ours
        store.put("k", b"mine", mode=Update("another"))
    assert isinstance(_error(lambda: store.put("k", b"mine", mode="create")), ObjectExistsError)


def test_an_update_that_another_built_upon_is_no_failure() -> None:
    """Ours happened, its answer was lost, a rival updated the result: "changed" would have us write twice."""
    holder: list[MemoryBackend] = []

    def hook(seen: Seen, moment: str) -> None:
        if seen.op == "put" and moment == "after":
            holder[0].put("k", holder[0].get("k")[1] + b" theirs", mode=Update(holder[0].head("k").etag))

    store, memory, _, _ = make(Fault("drop_reply", op="put", nth=1), hook=hook)
    holder.append(memory)
    with pytest.raises(OutcomeUnknownError):
        store.put("k", b"mine", mode=Update(memory.put("k", b"old").etag))
    assert memory.get("k")[1] == b"mine theirs"


def test_refused_connections_are_plain_failures() -> None:
    store, _, broken, _ = make(Fault("refused", op="put", times=None), max_attempts=3)
    error = _error(lambda: store.put("k", b"mine", mode="create"))
    assert isinstance(error, StoreConnectionError)
    assert error.attempts == 3
    assert {seen.op for seen in broken.seen} == {"put"}, "there was nothing to read back"


def test_conflicts_are_repeated() -> None:
    store, _, _, _ = make(Fault("conflict", op="put", times=2))
    store.put("k", b"x", mode="create")
    store, _, _, _ = make(Fault("conflict", op="put", times=None), max_attempts=2)
    assert isinstance(_error(lambda: store.put("k", b"x", mode="create")), ConflictError)


def test_a_refusal_without_doubt_is_not_read_back() -> None:
    store, memory, broken, _ = make()
    memory.put("k", b"theirs")
    assert isinstance(_error(lambda: store.put("k", b"x", mode="create")), ObjectExistsError)
    assert [seen.op for seen in broken.seen] == ["put"]


def test_an_unsure_conditional_copy_is_unknown() -> None:
    store, memory, _, _ = make(Fault("drop_reply", op="copy"))
    memory.put("a", b"x")
    assert isinstance(_error(lambda: store.copy("a", "b", mode="create")), OutcomeUnknownError)
    store, memory, _, _ = make(Fault("drop_reply", op="copy"))
    memory.put("a", b"x")
    assert store.copy("a", "b").key == "b"


@settings(max_examples=50, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["unavailable", "throttled", "conflict", "timeout", "reset", "drop_reply"]), max_size=6),
    modes=st.lists(st.sampled_from(["create", "update"]), min_size=1, max_size=4),
)
def test_told_outcomes_are_true(kinds: Sequence[Any], modes: Sequence[str]) -> None:
    """Whatever fails: a success means the data is there, an error other than unknown means that it is not."""
    faults = [Fault(kind, op="put", nth=i + 1) for i, kind in enumerate(kinds)]
    store, memory, _, _ = make(*faults, max_attempts=3)
    old = memory.put("k", b"old").etag
    for i, mode in enumerate(modes):
        data = b"new %d" % i
        key = f"c{i}" if mode == "create" else "k"
        how: Any = "create" if mode == "create" else Update(old)
        try:
            old_or_new = store.put(key, data, mode=how)
        except OutcomeUnknownError:
            old = memory.head("k").etag
            continue
        except S3LoaderError:
            assert not _holds(memory, key, data)
            continue
        assert _holds(memory, key, data)
        if mode == "update":
            old = old_or_new.etag
            assert old == memory.head("k").etag


# -- multipart and bulk deletes -----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["overwrite", "create"])
def test_a_lost_answer_to_complete(mode: Any) -> None:
    """The second completion finds the upload gone: the write id says that it is done."""
    store, memory, broken, _ = make(Fault("drop_reply", op="complete upload"))
    with store.multipart("k", part_size=10, mode=mode) as writer:
        writer.write(b"x" * 25)
    assert [seen.op for seen in broken.seen][-3:] == ["complete upload", "complete upload", "head"]
    assert writer.result is not None
    assert writer.result.etag == memory.head("k").etag
    assert store.get("k") == b"x" * 25


def test_an_upload_that_vanished_is_unknown() -> None:
    store, memory, broken, _ = make(Fault("reset", op="complete upload"))

    def vanish(seen: Seen, moment: str) -> None:
        if seen.op == "complete upload" and moment == "before":
            for key, upload_id, _ in list(memory.list_multipart()):
                memory.abort_multipart(key, upload_id)

    broken.hook = vanish
    writer = store.multipart("k", part_size=10)
    writer.write(b"x" * 25)
    with pytest.raises(OutcomeUnknownError):
        writer.close()
    assert not _memory_has(memory, "k")


def test_an_upload_that_never_was_is_not_found() -> None:
    store, _, _, _ = make()
    with pytest.raises(ObjectNotFoundError):
        store.backend.complete_multipart("k", "never", [])


def test_delete_many_repeats_what_may_pass() -> None:
    failing = {"b": 2, "d": 99}

    class Moody(MemoryBackend):
        def delete_many(self, keys: Sequence[str]) -> Any:
            failures = []
            for key in keys:
                if failing.get(key, 0):
                    failing[key] -= 1
                    failures.append(DeleteFailure(key, ThrottledError("slow down")))
                elif key == "denied":
                    failures.append(DeleteFailure(key, ObjectExistsError("no")))
                else:
                    self.delete(key)
            return failures

    clock = Clock()
    memory = Moody(uuid.uuid4().hex)
    store = ObjectStore("memory://", RetryBackend(memory, clock=clock, sleep=clock.sleep, max_attempts=3))
    for key in "abcd":
        memory.put(key, b"")
    failures = store.delete_many(["a", "b", "c", "d", "denied"])
    assert {failure.key for failure in failures} == {"d", "denied"}
    assert [entry.key for entry in memory.list()] == ["d"]


def _error(call: Callable[[], Any]) -> S3LoaderError:
    with pytest.raises(S3LoaderError) as caught:
        call()
    return caught.value


def _holds(memory: MemoryBackend, key: str, data: bytes) -> bool:
    return _memory_has(memory, key) and bytes(memory.get(key)[1]) == data


def _memory_has(memory: MemoryBackend, key: str) -> bool:
    return any(entry.key == key for entry in memory.list(key))
